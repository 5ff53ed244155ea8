"""The published code's outputs on a toy network, reproduced after an import."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import ArrayLike

from models.checkpoint import load
from models.dsnet_import import import_dsnet
from models.export import export_subnet, fold_batch_norm
from models.supernet import Supernet

WIDTHS = range(14)


def assert_close(actual: ArrayLike, expected: np.ndarray, tolerance: float) -> None:
    """max|difference| within ``tolerance`` of max|expected|."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(scope="module")
def net(golden, tmp_path_factory) -> Supernet:
    folder = tmp_path_factory.mktemp("golden")
    state = {f"module.{name}": tensor for name, tensor in golden.state.items()}
    torch.save({"state_dict": state}, folder / "tiny.pth.tar")
    import_dsnet(folder / "tiny.pth.tar", folder / "tiny" / "1", golden.config)
    return load(folder / "tiny" / "1").net


@pytest.fixture(scope="module")
def x(golden) -> torch.Tensor:
    return torch.from_numpy(golden.arrays["input"])


@torch.no_grad()
def test_every_slice_gives_the_published_logits(net, x, golden):
    for width in WIDTHS:
        assert_close(net(x, width), golden.arrays["logits"][width], 1e-5)
    assert_close(net(x, 0), golden.arrays["smallest"], 1e-5)


@torch.no_grad()
def test_the_teacher_gives_the_published_logits(net, x, golden):
    assert net.has_wide_trunk
    assert_close(net.largest(x), golden.arrays["largest"], 1e-5)


@torch.no_grad()
def test_the_gate_gives_the_published_logits_without_noise(net, x, golden):
    for _ in range(2):
        logits = net.gate_logits(net.trunk(x).gate_input)
        assert_close(logits, golden.arrays["gate_logits"], 1e-5)
    assert set(logits.argmax(1).tolist()) == {0, 1, 2, 3}


@torch.no_grad()
def test_a_static_slice_equals_the_supernet_at_its_width(net, x):
    gate_logits = net.gate_logits(net.trunk(x).gate_input).numpy()
    for width in WIDTHS:
        subnet = net.subnet(width)
        assert_close(subnet(x), net(x, width).numpy(), 1e-5)
        assert_close(subnet.slimming(subnet.trunk(x).gate_input), gate_logits, 1e-5)


@torch.no_grad()
def test_folded_slices_give_the_published_logits(net, x, golden):
    for width in WIDTHS:
        assert_close(fold_batch_norm(net.subnet(width))(x), golden.arrays["logits"][width], 1e-4)


def test_exported_slices_give_the_published_logits(net, golden):
    for width in WIDTHS:
        session = ort.InferenceSession(export_subnet(net, width), providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], {"pixels": golden.arrays["input"]})
        assert_close(logits, golden.arrays["logits"][width], 1e-4)


def test_madds_are_those_of_the_published_counter(net, golden):
    assert [cost.published_madds for cost in net.costs()] == golden.madds
