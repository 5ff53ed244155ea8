"""A checkpoint of a shape that nobody has trained yet: what it costs and how fast it serves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import Manifest, require_new, save
from models.registry import build
from models.supernet import Supernet
from models.training.calibrate import calibrate
from models.transform import InputSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Per RGB channel, those of ImageNet."""
CROP_SHARE = 0.875
"""Input size over shorter side, as in the published evaluations on ImageNet."""
CALIBRATION_BATCHES, CALIBRATION_IMAGES = 4, 8


def create(out_dir: Path, architecture: str, config: dict[str, Any], seed: int, resize_filter: str) -> Manifest:
    """Write seeded weights as the version folder ``out_dir``; the batch-norm statistics of every width fit them.

    Raises ValueError for a bad config, CheckpointError for a folder that is no new version.
    """
    require_new(out_dir)
    torch.manual_seed(seed)
    net = build(architecture, config)
    calibrate(net, _noise(net))
    shape = net.input_shape
    shorter_side = int(min(shape.height, shape.width) / CROP_SHARE)
    spec = InputSpec(shape.height, shape.width, MEAN, STD, shorter_side, resize_filter)
    classes = tuple(map(str, range(net.classes)))
    return save(out_dir, net, classes=classes, input_spec=spec, recipe={"seeded_weights": seed})


def _noise(net: Supernet) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of normalised pixels: without statistics of its own a deep network's activations die or explode."""
    shape = net.input_shape
    for _ in range(CALIBRATION_BATCHES):
        yield torch.randn(CALIBRATION_IMAGES, shape.channels, shape.height, shape.width), torch.zeros(0)
