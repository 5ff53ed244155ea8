import threading
import warnings

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from support import tiny_net
from torch import nn

from models.export import export_subnet, fold_batch_norm, to_onnx

X = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net():
    return tiny_net()


def session(graph: bytes) -> ort.InferenceSession:
    return ort.InferenceSession(graph, providers=["CPUExecutionProvider"])


def assert_close(actual: np.ndarray, expected: torch.Tensor) -> None:
    assert actual.shape == tuple(expected.shape)
    assert np.abs(actual - expected.numpy()).max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_folding_leaves_no_batch_norm_and_the_same_function(net):
    for width in range(4):
        subnet = net.subnet(width)
        folded = fold_batch_norm(subnet)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        assert any(isinstance(m, nn.BatchNorm2d) for m in subnet.modules())
        assert_close(folded(X).numpy(), subnet(X))


@torch.no_grad()
def test_only_a_norm_right_behind_its_convolution_is_folded():
    norm = nn.BatchNorm2d(3)
    norm.running_mean += 2.0
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.ReLU(), norm).eval()
    folded = fold_batch_norm(module)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded) == 2
    assert torch.equal(folded(X), module(X))


@torch.no_grad()
def test_folding_does_not_share_weights_with_the_original():
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    folded = fold_batch_norm(module)
    before = folded(X).clone()
    module[0].weight.zero_()
    assert torch.equal(folded(X), before)


def test_folding_in_training_mode_is_refused():
    with pytest.raises(AssertionError, match="eval"):
        fold_batch_norm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))


@pytest.mark.parametrize("batch", [1, 2, 7])
@torch.no_grad()
def test_the_parts_agree_with_torch_at_any_batch_size(net, batch):
    subnet = net.subnet(1)
    features, gate_input = subnet.trunk(X)
    trunk = session(to_onnx(fold_batch_norm(subnet.trunk), (X,), ["images"], ["features", "gate_input"]))
    gate = session(to_onnx(subnet.slimming, (gate_input,), ["gate_input"], ["gate_logits"]))
    body = session(to_onnx(fold_batch_norm(subnet.body), (features,), ["features"], ["logits"]))
    got_features, got_gate_input = trunk.run(["features", "gate_input"], {"images": X[:batch].numpy()})
    assert_close(got_features, features[:batch])
    assert_close(got_gate_input, gate_input[:batch])
    assert_close(gate.run(None, {"gate_input": got_gate_input})[0], subnet.slimming(gate_input[:batch]))
    assert_close(body.run(None, {"features": got_features})[0], net(X[:batch], 1))


@torch.no_grad()
def test_a_whole_slice_as_one_graph(net):
    for width in range(4):
        graph = export_subnet(net, width)
        onnx.checker.check_model(graph, full_check=True)
        running = session(graph)
        (given,), (made,) = running.get_inputs(), running.get_outputs()
        assert (given.name, given.shape, made.name, made.shape) == (
            "pixels", ["batch", 3, 16, 16], "logits", ["batch", 10],
        )  # fmt: skip
        assert "BatchNormalization" not in {node.op_type for node in onnx.load_from_string(graph).graph.node}
        for batch in (1, 5):
            assert_close(running.run(None, {"pixels": X[:batch].numpy()})[0], net(X[:batch], width))


@pytest.mark.parametrize("width", [-1, 4])
def test_a_width_outside_the_ladder(net, width):
    with pytest.raises(ValueError, match=rf"width is {width}; allowed: 0\.\.3"):
        export_subnet(net, width)


def test_exports_in_parallel_are_those_in_a_row_and_leave_the_filters_alone(net):
    filters = list(warnings.filters)
    expected = [export_subnet(net, width) for width in range(4)]
    given: dict[int, bytes] = {}
    threads = [threading.Thread(target=lambda w=width: given.update({w: export_subnet(net, w)})) for width in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [given[width] for width in range(4)] == expected
    assert list(warnings.filters) == filters
