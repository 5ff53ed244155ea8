import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support import CLASSES, TINY_EXIT, TINY_INPUT, calibrated_gate, random_image, tiny_resnet
from torch import nn

from models.checkpoint import load, resolve, save
from models.export import to_onnx
from models.transform import load_image, load_pixels, normalise
from service.engine.base import TrunkResult
from service.engine.blocked import pad_hidden
from service.engine.graphs import SessionFactory
from service.engine.measure import LARGEST_BATCH, Work, measure
from service.engine.onnx import OnnxEngine
from service.engine.torch_engine import TorchEngine


@pytest.fixture(scope="module")
def checkpoint(repository):
    return load(resolve(repository, "tiny"))


@pytest.fixture(scope="module")
def exit_checkpoint(tmp_path_factory):
    net, folder = tiny_resnet(config=TINY_EXIT), tmp_path_factory.mktemp("exit") / "tiny" / "1"
    save(folder, net, classes=CLASSES, input_spec=TINY_INPUT, gate=calibrated_gate(net))
    return load(folder)


@pytest.fixture(scope="module")
def net(checkpoint):
    return checkpoint.net


@pytest.fixture(scope="module", params=["onnxruntime", "torch"])
def engine(request, checkpoint):
    if request.param == "torch":
        return TorchEngine(checkpoint, 2, "cpu")
    return OnnxEngine(checkpoint, 2, SessionFactory(None))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_gpu_computes_in_half_precision_what_the_supernet_computes(net, checkpoint):
    engine = TorchEngine(checkpoint, 1, "cuda")
    pixels = [load_pixels(random_image(seed), TINY_INPUT) for seed in range(5)]
    x = torch.from_numpy(np.stack([normalise(p, TINY_INPUT) for p in pixels]))
    features, gate_inputs = engine.trunk(pixels)
    with torch.no_grad():
        expected = net.gate_logits(net.trunk(x).gate_input).numpy()
        assert np.abs(engine.gate(gate_inputs) - expected).max() <= 0.02 * np.abs(expected).max()
        for width in range(len(net.ladder)):
            expected = net(x, width).numpy()
            assert np.abs(engine.body(width, features) - expected).max() <= 0.02 * np.abs(expected).max()


def close(found, expected):
    return np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_engine_computes_what_the_supernet_computes_at_every_width_and_batch_size(net, engine, count):
    images = [load_image(random_image(seed), TINY_INPUT) for seed in range(count)]
    x = torch.from_numpy(np.stack(images))
    features, gate_inputs = engine.trunk(images)
    assert len(features) == count
    with torch.no_grad():
        assert close(engine.gate(gate_inputs), net.gate_logits(net.trunk(x).gate_input).numpy())
        for width in range(len(net.ladder)):
            assert close(engine.body(width, features), net(x, width).numpy())


def test_pixels_and_normalised_images_are_the_same_to_the_trunk(engine):
    pixels = [load_pixels(random_image(seed), TINY_INPUT) for seed in range(3)]
    floats = [normalise(p, TINY_INPUT) for p in pixels]
    expected, gate_inputs = engine.trunk(floats)
    for images in (pixels, [pixels[0], floats[1], pixels[2]]):
        features, inputs = engine.trunk(images)
        assert close(np.stack(features), np.stack(expected))
        assert close(inputs, gate_inputs)


def test_features_of_different_batches_may_share_one(net, engine):
    images = [load_image(random_image(seed), TINY_INPUT) for seed in range(4)]
    features = [engine.trunk(images[:1]).features[0], *engine.trunk(images[1:]).features]
    mixed = engine.body(2, [features[i] for i in (3, 0, 2)])
    with torch.no_grad():
        expected = net(torch.from_numpy(np.stack([images[i] for i in (3, 0, 2)])), 2).numpy()
    assert close(mixed, expected)


@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
@torch.no_grad()
def test_an_early_exit_needs_no_body(kind, exit_checkpoint):
    net = exit_checkpoint.net
    factory = SessionFactory(None)
    engine = (
        OnnxEngine(exit_checkpoint, 2, factory) if kind == "onnxruntime" else TorchEngine(exit_checkpoint, 2, "cpu")
    )
    assert engine.has_exit
    assert [part for part in engine.part_bytes if part.startswith("body")] == ["body 1", "body 2", "body 3"]
    images = [load_image(random_image(seed), TINY_INPUT) for seed in range(5)]
    x = torch.from_numpy(np.stack(images))
    features, gate_inputs = engine.trunk(images)
    for width in range(len(net.ladder)):
        assert close(engine.body(width, features), net(x, width).numpy())
        assert close(engine.body(width, [features[3], features[1]]), net(x[[3, 1]], width).numpy())
    assert close(engine.gate(gate_inputs), net.gate_logits(net.trunk(x).gate_input).numpy())
    timings = measure(Work(engine, exit_checkpoint), len(net.ladder), 0.0, threading.Event())
    assert {timing.width for timing in timings} == {None, 0, 1, 2, 3}


class SlowEngine:
    """Needs 20 ms for every trunk and body, whatever the batch, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def _work(self, count, columns):
        self.calls += 1
        time.sleep(0.02)
        return np.zeros((count, columns), np.float32)

    def trunk(self, images):
        return TrunkResult(list(images), self._work(len(images), 2))

    def gate(self, inputs):
        return np.zeros((len(inputs), 2), np.float32)

    def body(self, width, features):
        return self._work(len(features), 3)


class LinearEngine(SlowEngine):
    """Needs 2 ms for every image: larger batches never pay."""

    def _work(self, count, columns):
        time.sleep(0.002 * count)
        return np.zeros((count, columns), np.float32)


def test_batch_sizes_grow_as_long_as_they_pay(checkpoint):
    sizes = {(None, 2**k) for k in range(7)} | {(0, 2**k) for k in range(7)}
    timings = measure(Work(SlowEngine(), checkpoint), 1, 60.0, threading.Event(), runs=3)
    assert {(t.width, t.batch) for t in timings} == sizes  # 20 ms for 64 images is a bargain
    timings = measure(Work(LinearEngine(), checkpoint), 1, 1.0, threading.Event())
    assert max(t.batch for t in timings) < LARGEST_BATCH
    assert {t.width for t in timings if t.batch == 2} == {None, 0}


def test_measuring_stops_when_its_time_is_up(checkpoint):
    engine = SlowEngine()
    timings = measure(Work(engine, checkpoint), 1, 0.001, threading.Event())
    assert all(t.runs == 1 and t.p99_s >= t.p50_s >= 0.02 for t in timings)
    # One warm-up and one timed run each, and the first trunk.
    assert engine.calls == 2 * len(timings) + 1 == 5


def test_runs_are_bounded(checkpoint):
    timings = measure(Work(LinearEngine(), checkpoint), 1, 60.0, threading.Event(), runs=5)
    assert {t.runs for t in timings} == {5}


def test_measuring_stops_when_it_is_cancelled(checkpoint):
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(InterruptedError):
        measure(Work(SlowEngine(), checkpoint), 3, 10, cancelled)


@pytest.fixture
def factory(tmp_path):
    return SessionFactory(tmp_path / "graphs", "digest", "processor")


def a_graph(net):
    return to_onnx(net.subnet(0).slimming, (torch.zeros(2, net.gate.slimming.in_features),), ["x"], ["y"])


def answer(session, seed=0):
    x = np.random.default_rng(seed).normal(size=(3, session.get_inputs()[0].shape[1])).astype(np.float32)
    return session.run(None, {"x": x})[0]


def test_a_kept_graph_is_neither_exported_nor_optimised_again(net, factory):
    first = factory.session("gate", lambda: a_graph(net))
    assert factory.graph_bytes["gate"] > 0

    def never():
        raise AssertionError("exported again")

    again = factory.session("gate", never)
    assert (answer(first) == answer(again)).all()
    with pytest.raises(AssertionError, match="exported again"):
        factory.session("body 0", never)


def test_a_graph_that_the_disk_has_no_room_for_leaves_nothing_there(net, factory, tmp_path, monkeypatch):
    def full(file, *args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert answer(factory.session("gate", lambda: a_graph(net))).shape[0] == 3
    assert list((tmp_path / "graphs").glob("*/*")) == []


@pytest.mark.parametrize("context", [("other digest", "processor"), ("digest", "other processor")])
def test_graphs_of_another_checkpoint_or_processor_are_not_taken(net, factory, tmp_path, context):
    factory.session("gate", lambda: a_graph(net))
    exported = []
    SessionFactory(tmp_path / "graphs", *context).session("gate", lambda: exported.append(1) or a_graph(net))
    assert exported == [1]


def test_a_damaged_graph_is_made_again(net, factory, tmp_path):
    expected = answer(factory.session("gate", lambda: a_graph(net)))
    (file,) = (tmp_path / "graphs").glob("*/*")
    file.write_bytes(b"damaged")
    assert (answer(factory.session("gate", lambda: a_graph(net))) == expected).all()
    assert file.stat().st_size > 100
    assert list((tmp_path / "graphs").glob("*/*")) == [file]


def test_building_stops_between_parts_when_it_is_cancelled(net, tmp_path):
    cancelled = threading.Event()
    factory = SessionFactory(tmp_path, "digest", cancelled=cancelled)
    factory.session("gate", lambda: a_graph(net))
    cancelled.set()
    with pytest.raises(InterruptedError):
        factory.session("gate", lambda: a_graph(net))


def test_other_code_is_another_graph(net, factory, tmp_path, monkeypatch):
    factory.session("gate", lambda: a_graph(net))
    monkeypatch.setattr("service.engine.graphs.code_digest", lambda: "edited")
    exported = []
    SessionFactory(tmp_path / "graphs", "digest", "processor").session(
        "gate", lambda: exported.append(1) or a_graph(net)
    )
    assert exported == [1]


@pytest.mark.parametrize("error", [PermissionError, OSError])
def test_a_folder_that_cannot_even_be_searched_costs_only_time(net, factory, monkeypatch, error):
    def refused(*_, **__):
        raise error(13, "refused")

    for method in ("read_bytes", "mkdir"):
        monkeypatch.setattr(f"service.engine.graphs.Path.{method}", refused)
    monkeypatch.setattr("service.engine.graphs._optimised", lambda graph: ("a session", graph))
    assert factory.session("gate", lambda: b"graph") == "a session"


def test_a_folder_that_cannot_be_written_costs_only_time(net, tmp_path):
    (tmp_path / "file").write_text("no folder")
    blocked = SessionFactory(tmp_path / "file" / "graphs", "digest")
    assert answer(blocked.session("gate", lambda: a_graph(net))).shape[0] == 3
    nowhere = SessionFactory(None, "digest")
    assert answer(nowhere.session("gate", lambda: a_graph(net))).shape[0] == 3


class Excited(nn.Module):
    """Two convolutions around a squeeze-excite on ``channels`` channels."""

    def __init__(self, channels, hidden=16):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 32, 1)
        self.squeeze, self.excite = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        x = self.first(x).relu()
        scale = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.last(x * scale)


@pytest.mark.parametrize(("channels", "size"), [(32, 14), (48, 7), (16, 5), (24, 6), (12, 8)])
@pytest.mark.parametrize("hidden", [16, 10])
def test_multiplications_stay_blocked_and_compute_the_same(tmp_path, channels, size, hidden):
    torch.manual_seed(channels)
    net = Excited(channels, hidden).eval()
    graph = to_onnx(net, (torch.zeros(2, 3, size, size),), ["x"], ["y"])
    factory = SessionFactory(tmp_path, "digest")
    sessions = [factory.session("all", lambda: graph), factory.session("all", None)]
    for count in (1, 2, 5):
        x = torch.randn(count, 3, size, size)
        with torch.no_grad():
            expected = net(x).numpy()
        for session in sessions:
            assert close(session.run(None, {"x": x.numpy()})[0], expected)
    (file,) = tmp_path.glob("*/*.onnx")
    operators = [node.op_type for node in onnx.load(str(file)).graph.node]
    if "ReorderInput" in operators or "ReorderOutput" in operators:  # a processor with a blocked layout
        assert operators.count("Tile") >= (channels % 16 == 0)  # blocks are 16 channels, or 8


def test_hidden_channels_are_filled_up_where_nobody_else_sees_them():
    graph = onnx.load_from_string(to_onnx(Excited(24, hidden=10).eval(), (torch.zeros(2, 3, 6, 6),), ["x"], ["y"]))
    sizes = [tuple(tensor.dims) for tensor in pad_hidden(graph, 16).graph.initializer]
    assert (16, 24, 1, 1) in sizes
    assert (24, 16, 1, 1) in sizes
    assert (32, 24, 1, 1) in sizes  # no squeeze-excite: left alone
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(hidden_of(graph)))
    assert pad_hidden(graph, 16) == graph


def hidden_of(graph):
    """The name of the squeeze-excite's hidden vector."""
    expand = next(node for node in graph.graph.node if node.op_type == "Sigmoid").input[0]
    return next(node for node in graph.graph.node if node.output[0] == expand).input[0]


def test_a_layout_that_is_guessed_wrong_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("service.engine.graphs.BLOCKS", (4, 2))
    net = Excited(32).eval()
    graph = to_onnx(net, (torch.zeros(2, 3, 14, 14),), ["x"], ["y"])
    session = SessionFactory(tmp_path, "digest").session("all", lambda: graph)
    x = torch.randn(3, 3, 14, 14)
    with torch.no_grad():
        assert close(session.run(None, {"x": x.numpy()})[0], net(x).numpy())
    assert "Tile" not in {node.op_type for node in onnx.load(str(next(tmp_path.glob("*/*.onnx")))).graph.node}
