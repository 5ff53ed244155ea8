import argparse
import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.ds_mbnet import DsMbnetConfig
from models.stages import parse_config

GOLDEN = Path(__file__).parents[1] / "golden"


class Golden(NamedTuple):
    """What the published code computed on a toy network, and that network."""

    config: DsMbnetConfig
    state: dict[str, Tensor]
    arrays: dict[str, np.ndarray]
    madds: list[int]


@pytest.fixture(scope="session")
def golden() -> Golden:
    folder = GOLDEN / "ds_mbnet_tiny"
    reference = json.loads((folder / "reference.json").read_text())
    with np.load(folder / "reference.npz") as arrays:
        return Golden(
            parse_config(DsMbnetConfig, json.loads((folder / "config.json").read_text()), "ds_mbnet"),
            load_file(folder / "state_dict.safetensors"),
            dict(arrays),
            reference["madds_published_convention"],
        )


@pytest.fixture(scope="session")
def full_size_shapes() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of the published ImageNet checkpoint."""
    rows = [line.split("\t") for line in (GOLDEN / "dsnet_state_dict_keys.tsv").read_text().splitlines()]
    return {
        name: (tuple(ast.literal_eval(shape)), getattr(torch, dtype.removeprefix("torch.")))
        for name, shape, dtype in rows
    }


@pytest.fixture
def publish(tmp_path) -> Callable[..., Path]:
    """Writes a state dict as the published training script does, and gives the file's path."""

    def write(state: dict[str, Tensor], legacy: bool = False, **more: Any) -> Path:
        file = tmp_path / "published.pth.tar"
        data = {
            "epoch": 159,
            "arch": "slimmable_mbnet_v1_bn_uniform",
            "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.08, "params": [0, 1]}]},
            "args": argparse.Namespace(model="slimmable_mbnet_v1_bn_uniform", lr=0.08, mean=None, amp=False),
            "version": 2,
            "metric": 74.6,
        }
        torch.save(data | more, file, _use_new_zipfile_serialization=not legacy)
        return file

    return write
