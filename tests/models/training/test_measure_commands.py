import json
import sys

import numpy as np
import pytest
import torch
from support import CLASSES, TINY_INPUT, random_image, tiny_net

from models import cli
from models.checkpoint import GateRecord, load, save
from models.training import measure_commands
from models.training.data import load_folder
from models.training.evaluate import evaluate
from models.training.gate_stage import calibrated
from models.training.operating import calibration_error, sweep
from models.transform import load_image

COUNT = 60
TOTALS = {
    "model", "version", "digest", "count", "mode", "classes", "madds_served", "gate_choices", "operating_point",
    "accuracy", "top1", "top5", "calibration_error", "mean_madds", "gate", "comparison", "images",
}  # fmt: skip
PER_IMAGE = {
    "name", "label", "answers", "probabilities", "margins", "correct", "p_right", "gate_width", "gate_margin",
    "served_width", "served_answer",
}  # fmt: skip


@pytest.fixture(scope="module")
def net():
    return tiny_net()


@pytest.fixture(scope="module")
def folder(net, tmp_path_factory):
    """Random pictures, labelled by what one of the widths says, in turn: so every slice is right sometimes."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        data = random_image(i)
        with torch.no_grad():
            label = int(net(torch.from_numpy(load_image(data, TINY_INPUT))[None], i % 4).argmax())
        (root / CLASSES[label]).mkdir(exist_ok=True)
        (root / CLASSES[label] / f"{i:03}.png").write_bytes(data)
    return root


@pytest.fixture(scope="module")
def zoo(net, folder, tmp_path_factory):
    """`shop/1` with a calibration and operating points, `shop/2` without."""
    root = tmp_path_factory.mktemp("zoo")
    fitted = calibrated(evaluate(net, load_folder(folder, TINY_INPUT, CLASSES), TINY_INPUT), net.slimming_head())
    points = sweep(fitted, np.linspace(1.0, 0.1, 19).tolist())
    assert len(points) > 2
    gate = GateRecord(net.gate_choices, None, calibration=fitted.decision.calibration, operating_points=points,
                      default_point=1)  # fmt: skip
    save(root / "shop" / "1", net, classes=CLASSES, input_spec=TINY_INPUT, gate=gate)
    save(root / "shop" / "2", net, classes=CLASSES, input_spec=TINY_INPUT)
    return root


@pytest.fixture(scope="module")
def measured(zoo, folder):
    """The evaluation by which the commands are judged, at the default point."""
    checkpoint = load(zoo / "shop" / "1")
    images = load_folder(folder, TINY_INPUT, CLASSES)
    return evaluate(checkpoint.net, images, TINY_INPUT, checkpoint.manifest.decision())


@pytest.fixture
def run(zoo, folder, tmp_path, capsys):
    """Runs ``evaluate`` on a version and gives what it printed and wrote."""

    def call(*flags, version="1"):
        out = tmp_path / "answers.json"
        arguments = ["evaluate", str(zoo / "shop" / version), "--data", str(folder), "--json", str(out), *flags]
        assert cli.main(arguments) == 0
        return capsys.readouterr().out, json.loads(out.read_text())

    return call


def test_everything_is_reported_of_every_width_and_of_the_gate(run, measured):
    printed, report = run()
    assert set(report) == TOTALS
    assert all(set(image) == PER_IMAGE for image in report["images"])
    assert report["count"] == len(report["images"]) == COUNT
    correct = np.array([image["correct"] for image in report["images"]])
    assert (correct == measured.correct_NL).all()
    assert report["accuracy"] == report["top1"] == pytest.approx(correct.mean(0).tolist())
    assert all(top1 <= top5 <= 1 for top1, top5 in zip(report["top1"], report["top5"], strict=True))
    p_right = np.array([image["p_right"] for image in report["images"]])
    expected = measured.decision.calibration.probabilities(measured.gate_logits_NG)
    assert np.abs(p_right - expected).max() <= 1e-5
    for width in range(4):
        error = calibration_error(expected[:, width], measured.correct_NL[:, width])
        assert report["calibration_error"][width] == pytest.approx(error)
        assert f"width {width}: top-1 {report['top1'][width]:.4f}, top-5 {report['top5'][width]:.4f}" in printed
        assert f"calibration error {error:.4f}" in printed
    assert f"{COUNT} images of " in printed


def test_the_served_answer_is_the_gates(run, measured):
    printed, report = run()
    widths = np.array([image["served_width"] for image in report["images"]])
    assert (widths == measured.gate_widths_N).all()
    assert len(set(widths)) > 1
    for image in report["images"]:
        assert image["served_width"] == image["gate_width"]
        assert image["served_answer"] == image["answers"][image["served_width"]]
    right = np.mean([image["served_answer"] == image["label"] for image in report["images"]])
    assert report["gate"]["accuracy"] == pytest.approx(right) == pytest.approx(measured.gate_accuracy)
    assert report["mean_madds"] == report["gate"]["mean_madds"] == pytest.approx(measured.gate_mean_madds)
    assert report["gate"]["shares"] == pytest.approx(measured.gate_shares)
    assert f"gate (operating point 1, default, lambda {measured.decision.lambda_:.4g}): top-1 {right:.4f}" in printed


def test_the_gate_is_compared_with_intervals(run):
    printed, report = run()
    found = report["comparison"]
    assert found["count"] == COUNT
    assert found["accuracy"]["low"] <= found["accuracy"]["value"] == pytest.approx(report["gate"]["accuracy"])
    assert found["madds_share"]["value"] == pytest.approx(report["mean_madds"] / report["madds_served"][-1])
    assert found["to_widest"]["reference"] == pytest.approx(report["accuracy"][-1])
    for key, words in (("to_widest", "widest slice"), ("to_ladder", "static ladder"), ("to_random", "random routing")):
        difference = found[key]["difference"]
        assert difference["value"] == pytest.approx(found["accuracy"]["value"] - found[key]["reference"])
        assert difference["low"] <= difference["value"] <= difference["high"]
        assert f"{words}" in printed
        assert f"{difference['value']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]" in printed


def test_probabilities_are_those_of_the_answers(run, measured):
    _, report = run()
    expected = torch.from_numpy(measured.logits_NLK).softmax(2).amax(2).numpy()
    assert np.abs(np.array([image["probabilities"] for image in report["images"]]) - expected).max() <= 1e-5


def test_another_operating_point_is_another_rule(run):
    _, default = run()
    printed, cheap = run("--operating-point", "2")
    assert default["operating_point"]["is_default"]
    assert cheap["operating_point"] == {"index": 2, "is_default": False, "lambda": cheap["operating_point"]["lambda"]}
    assert cheap["operating_point"]["lambda"] > default["operating_point"]["lambda"]
    assert cheap["mean_madds"] < default["mean_madds"]
    assert "gate (operating point 2, lambda" in printed


def test_one_width_runs_that_slice_alone(run, measured, monkeypatch):
    monkeypatch.setattr(measure_commands, "evaluate", None)  # it would run them all
    printed, report = run("--width", "2")
    assert printed.splitlines()[0].startswith(f"width 2: top-1 {measured.width_accuracy(2):.4f}")
    assert "gate" not in printed
    assert "width 1" not in printed
    assert report["mode"] == 2
    assert [value is None for value in report["top1"]] == [True, True, False, True]
    assert report["comparison"] is report["gate"]["accuracy"] is None
    assert report["mean_madds"] == report["madds_served"][2]
    for i, image in enumerate(report["images"]):
        answer = int(measured.logits_NLK[i, 2].argmax())
        assert image["answers"] == [None, None, answer, None]
        assert (image["served_width"], image["served_answer"]) == (2, answer)
        assert image["gate_width"] == measured.gate_widths_N[i]


def test_the_gate_alone_is_reported_alone(run):
    printed, report = run("--width", "gate")
    assert printed.startswith("gate (operating point 1")
    assert "random routing" in printed
    assert report["mode"] == "gate"


def test_without_a_calibration_the_greatest_logit_decides(run, zoo):
    printed, report = run(version="2")
    assert report["operating_point"] is None
    assert report["calibration_error"] == [None] * 4
    assert all(image["p_right"] is None for image in report["images"])
    assert "gate (no operating points, greatest logit): top-1" in printed
    assert "calibration error" not in printed


@pytest.mark.parametrize(
    ("version", "flags", "message"),
    [
        ("1", ["--width", "4"], "--width 4; allowed: all, gate, or a width of 0..3"),
        ("1", ["--width=-1"], "--width -1; allowed: all, gate, or a width of 0..3"),
        ("1", ["--width", "wide"], "--width wide; allowed: all, gate, or a width of 0..3"),
        ("1", ["--operating-point", "9"], "operating point 9 of shop/1; allowed: 0.."),
        ("2", ["--operating-point", "0"], "operating point 0 of shop/2; allowed: none"),
    ],
)
def test_a_bad_width_or_point_is_refused_before_images_are_read(zoo, tmp_path, capsys, version, flags, message):
    assert cli.main(["evaluate", str(zoo / "shop" / version), "--data", str(tmp_path / "missing"), *flags]) == 1
    assert message in capsys.readouterr().err


def test_evaluations_are_plotted(run, zoo, folder, tmp_path, capsys):
    run()
    answers, out = tmp_path / "answers.json", tmp_path / "figures"
    assert cli.main(["plot", str(answers), "--data", str(folder), "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed) == sorted(str(file) for file in out.iterdir())
    assert {"accuracy.png", "shares_shop_1.png", "examples_shop_1.png"} <= {file.name for file in out.iterdir()}


def test_without_matplotlib_plot_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "models.training.plot", raising=False)
    monkeypatch.delattr("models.training.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["plot", str(tmp_path / "answers.json"), "--out", str(tmp_path)]) == 1
    assert "pip install '.[plots]'" in capsys.readouterr().err
