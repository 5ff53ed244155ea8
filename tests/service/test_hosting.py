"""Served models whose gate has operating points, and an architecture that the service never names."""

import math
import os
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from support import CLASSES, TINY_INPUT, calibrated_gate, random_image, tiny_net, tiny_resnet

import service.hosting
import service.priority
from models.checkpoint import Measured, load, resolve, save
from models.transform import load_image
from service.api.schemas import ModelInfo
from service.app import load_checkpoints
from service.hosting import HostedModel, WarmEngine, chosen_device, curve_of, takes_every_core
from service.latency import LatencyTable, Overhead
from service.request import Window
from service.settings import SettingError, Settings, usable_cores
from service.telemetry import Telemetry

IMAGES = [random_image(seed) for seed in range(100, 148)]
CLEAR_MARGIN = 1e-3


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A repository: `pointed` and `resnet` with three operating points each, `plain` without."""
    root = tmp_path_factory.mktemp("calibrated")
    for name, net, points in (
        ("pointed", tiny_net(), True),
        ("plain", tiny_net(), False),
        ("resnet", tiny_resnet(), True),
    ):
        save(
            root / name / "1", net, classes=CLASSES, input_spec=TINY_INPUT,
            accuracy=[(Measured(0.5 + width / 10, "test", 100),) for width in range(len(net.ladder))],
            gate=calibrated_gate(net) if points else None,
        )  # fmt: skip
    return root


def ask(client, model, **headers):
    """The slices that answered, and the whole answers, as /v1/classify/batch tells them."""
    parts = [("image", ("i.png", image, "image/png")) for image in IMAGES]
    response = client.post("/v1/classify/batch", files=parts, headers=headers, params={"model": model})
    assert response.status_code == 200, response.text
    answers = response.json()["results"]
    return [answer["slice"] for answer in answers], answers


@torch.no_grad()
def offline(root, model):
    """The checkpoint, the inputs and the gate's logits of all images."""
    checkpoint = load(resolve(root, model))
    x = torch.from_numpy(np.stack([load_image(image, TINY_INPUT) for image in IMAGES]))
    return checkpoint, x, checkpoint.net.gate_logits(checkpoint.net.trunk(x).gate_input).numpy()


@pytest.mark.parametrize("point", [None, 0, 1, 2])
def test_the_service_wishes_what_the_decision_says_offline_and_the_point_moves_the_widths(start, calibrated, point):
    checkpoint, _, gate_logits = offline(calibrated, "pointed")
    decision = checkpoint.manifest.decision(point)
    best = np.sort(decision.utility(gate_logits))
    clear = best[:, -1] - best[:, -2] > CLEAR_MARGIN
    assert clear.mean() > 0.9
    with start(repository=calibrated, model=["pointed"], operating_point=point) as server:
        slices, _ = ask(server.client, "pointed")
        forced, _ = ask(server.client, "pointed", **{"slice-width": "1"})
        gate = ModelInfo.model_validate(server.client.get("/v1/models/pointed").json()).gate
    wished = np.array([slice_["gate_width"] for slice_ in slices])
    assert (wished == decision.widths(gate_logits))[clear].all()
    assert all((s["width"], s["reason"]) == (s["gate_width"], "gate") for s in slices)
    assert {(s["width"], s["gate_width"]) for s in forced} == {(1, None)}
    mix = set(wished.tolist())
    assert {0: mix == {3}, 2: mix == {0}}.get(point, {0, 3} <= mix)
    assert gate.operating_point == (1 if point is None else point)


def test_models_show_their_operating_points_and_the_one_in_use(start, calibrated):
    points = load(resolve(calibrated, "pointed")).manifest.gate.operating_points
    with start(repository=calibrated, model=["pointed", "plain"]) as server:
        pointed, plain = (model["gate"] for model in server.client.get("/v1/models").json()["models"])
    assert pointed == {
        "choices": [0, 1, 3],
        "operating_points": [{"lambda": p.lambda_, "madds": p.madds, "accuracy": p.accuracy} for p in points],
        "operating_point": 1,
    }
    assert plain == {"choices": [0, 1, 3], "operating_points": [], "operating_point": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda"}, "setting device is cuda; PyTorch finds 0 CUDA devices"),
        ({"device": "cuda:7"}, "setting device is cuda:7; PyTorch finds 0 CUDA devices"),
    ],
)
def test_a_device_that_is_not_there_stops_the_start(make_settings, monkeypatch, changes, message):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SettingError, match=message):
        load_checkpoints(make_settings(**changes))


def test_an_engine_that_cannot_use_the_device_stops_the_start(make_settings, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SettingError, match="engine is onnxruntime, device cuda; allowed there: auto, torch"):
        load_checkpoints(make_settings(engine="onnxruntime", device="auto"))
    assert chosen_device(make_settings(device="auto")) == "cuda"
    assert chosen_device(make_settings(device="cpu")) == "cpu"


def test_pytorch_serves_on_the_cpu_when_asked_to(start):
    with start(engine="torch", device="cpu") as server:
        answer = server.client.post("/v1/classify", content=random_image(1), headers={"content-type": "image/png"})
        assert answer.status_code == 200
        assert 'engine="torch"' in server.client.get("/metrics").text


@pytest.mark.parametrize("point", [3, -1])
def test_an_operating_point_that_a_model_lacks_stops_the_start(make_settings, calibrated, point):
    settings = make_settings(repository=calibrated, model=["resnet", "pointed"], operating_point=point)
    message = rf"setting operating_point: operating point {point} of resnet/1; allowed: 0\.\.2"
    with pytest.raises(SettingError, match=message):
        load_checkpoints(settings)


def test_one_model_without_the_point_is_enough(make_settings, calibrated):
    settings = make_settings(repository=calibrated, model=["pointed", "plain"], operating_point=0)
    with pytest.raises(SettingError, match="operating point 0 of plain/1; allowed: none, the model has no"):
        load_checkpoints(settings)


@pytest.fixture(scope="module")
def resnet(start, calibrated):
    """A server of that architecture, and what it logged at start."""
    with pytest.MonkeyPatch.context() as patch:
        log = Mock()
        patch.setattr("service.app.log", log)
        with start(repository=calibrated, model=["resnet"]) as server:
            yield server, log


@torch.no_grad()
def test_another_architecture_is_served_at_every_width(resnet, calibrated):
    server, _ = resnet
    checkpoint, x, gate_logits = offline(calibrated, "resnet")
    info = server.client.get("/v1/models/resnet").json()
    assert (info["architecture"], len(info["slices"])) == ("ds_resnet", 3)
    for width in range(3):
        slices, answers = ask(server.client, "resnet", **{"slice-width": str(width)})
        expected = checkpoint.net(x, width).softmax(1).numpy()
        costs = checkpoint.manifest.slices[width]
        assert {(s["width"], s["widest"], s["madds"]) for s in slices} == {(width, 2, costs.madds_published)}
        for answer, row in zip(answers, expected, strict=True):
            given = {p["index"]: p["probability"] for p in answer["predictions"]}
            np.testing.assert_allclose([*given.values()], row[[*given]], atol=1e-4)
            assert next(iter(given)) == row.argmax()
    slices, _ = ask(server.client, "resnet")
    assert {s["gate_width"] for s in slices} == {0, 2}
    agreeing = checkpoint.manifest.decision().widths(gate_logits) == [s["gate_width"] for s in slices]
    assert agreeing.mean() > 0.9  # the others lie on the edge that cuts the images in halves
    assert {s["madds"] for s in slices} == {checkpoint.manifest.slices[w].madds_served for w in (0, 2)}


def test_the_start_logs_the_operating_point_in_use(resnet):
    _, log = resnet
    (ready,) = [call.kwargs for call in log.info.call_args_list if call.args == ("model_ready",)]
    assert (ready["model"], ready["operating_point"]) == ("resnet", 1)


def test_the_curve_is_what_the_hold_out_says_less_what_the_point_asks(calibrated, tmp_path):
    manifest = load(resolve(calibrated, "pointed")).manifest
    assert curve_of(manifest, manifest.decision(1)) is None  # its slices were measured on the test split alone
    net = tiny_net()
    accuracy = [
        (Measured(0.9, "test", 100), Measured(0.5 + width / 10, "hold-out", 100)) for width in range(len(net.ladder))
    ]
    gate = calibrated_gate(net)
    save(tmp_path / "m" / "1", net, classes=CLASSES, input_spec=TINY_INPUT, accuracy=accuracy, gate=gate)
    manifest = load(tmp_path / "m" / "1").manifest
    decision = manifest.decision(1)
    curve = curve_of(manifest, decision)
    assert curve is not None
    widest = len(net.ladder) - 1
    assert curve.worth_L[widest] == pytest.approx(0.5 + widest / 10 - decision.lambda_)
    assert curve.worth_L[0] == pytest.approx(0.5 - decision.lambda_ * decision.madds[0] / decision.madds[-1])
    point = manifest.gate.operating_points[2]
    worth, shares = curve.asked[2]
    assert worth == pytest.approx(point.accuracy - decision.lambda_ * point.madds / decision.madds[-1])
    assert shares == point.shares
    assert curve_of(load(resolve(calibrated, "plain")).manifest, decision) is None


@pytest.mark.parametrize(("device", "spare", "every"), [("cpu", 0, True), ("cpu", 1, False), ("cuda", 0, False)])
def test_an_engine_takes_every_core_unless_it_leaves_one_or_is_no_processor(device, spare, every):
    assert takes_every_core(Mock(device=device, workers=usable_cores() - spare)) == every


@pytest.mark.parametrize("every", [True, False])
def test_plans_count_the_overhead_where_it_is_taken_from_the_workers(monkeypatch, calibrated, every):
    """Told of by every engine's batches, whoever bears it."""
    monkeypatch.setattr(service.hosting, "takes_every_core", lambda engine: every)
    checkpoint, now_s, process = load(resolve(calibrated, "pointed")), time.monotonic(), Overhead()
    warm = WarmEngine(Mock(device="cpu", workers=2), LatencyTable({(k, 1): 1.0 for k in (None, 0, 1, 2, 3)}))
    model = HostedModel(checkpoint.manifest, warm, Settings(_cli_parse_args=[]), Telemetry(), process)
    bare_s = model._scheduler.finish_s(now_s, math.inf, Window(0, 3))
    process.learn(now_s, 0.0)
    process.worked(0.0, 100)
    process.learn(now_s + 0.5, 100 * 0.5)
    model._scheduler.make_room(now_s + 0.5, math.inf, Window(0, 3), 3)
    assert (model._scheduler.finish_s(now_s, math.inf, Window(0, 3)) > bare_s) == every


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no thread has a core of its own here")
@pytest.mark.parametrize(
    ("seconds", "device", "given", "is_pinned"),
    [
        (1e-3, "cpu", {}, True),
        (1e-6, "cpu", {}, False),  # of the narrowest slice; the widest takes a second
        (1e-6, "cpu", {"worker_priority": "idle"}, True),
        (1e-6, "cpu", {"pin_workers": True}, True),
        (1e-3, "cpu", {"pin_workers": False}, False),
        (1e-3, "cpu", {"model": ["pointed", "resnet"]}, False),
        (1e-3, "cpu", {"model_control": "explicit"}, False),
        (1e-3, "cuda", {"pin_workers": True}, False),
    ],
)
def test_workers_are_pinned_where_the_settings_or_the_machine_have_it_so(
    monkeypatch, calibrated, seconds, device, given, is_pinned
):
    monkeypatch.setattr(service.priority, "quota_cores", lambda _: None)
    cores = sorted(os.sched_getaffinity(0))
    checkpoint = load(resolve(calibrated, "pointed"))
    engine = Mock(device=device, workers=len(cores), has_exit=False)
    times = {(None, 1): seconds, (0, 1): seconds} | {(width, 1): 1.0 for width in (1, 2, 3)}
    settings = Settings(_cli_parse_args=[], **given)
    model = HostedModel(checkpoint.manifest, WarmEngine(engine, LatencyTable(times)), settings, Telemetry(), Overhead())
    seen = list(model.batcher._pool.map(lambda _: sorted(os.sched_getaffinity(0)), range(1)))
    assert seen == ([cores[:1]] if is_pinned else [cores])
