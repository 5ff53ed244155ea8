import json
import shutil
from dataclasses import asdict

import numpy as np
import onnxruntime as ort
import pytest
import torch
from support import CLASSES, TINY_INPUT, tiny_net

from models import cli
from models.checkpoint import GateRecord, Measured, OperatingPoint, load, read_manifest, save
from models.decision import GateCalibration


@pytest.fixture
def config_file(tmp_path, golden) -> str:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(asdict(golden.config)))
    return str(file)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "shop" / "7"
    gate = GateRecord(
        (0, 1, 3), hold_out_shares=(0.625, 0.25, 0.125), accuracy=(Measured(0.9456, "hold-out", 5000),),
        mean_madds=(Measured(98765.0, "test", 10000),),
        calibration=GateCalibration(((1.0, 0.0, 0.0),) * 4, (0.0,) * 4),
        operating_points=(
            OperatingPoint(0.3, 77777.0, 0.9001, (0.5, 0.25, 0.25)), OperatingPoint(1.2, 5555.0, 0.8, (1.0, 0.0, 0.0)),
        ), default_point=1,
    )  # fmt: skip
    save(
        folder, tiny_net(), classes=CLASSES, input_spec=TINY_INPUT,
        accuracy=[[Measured(0.9123, "test", 10000), Measured(0.5, "hold-out", 5000)]] * 4,
        gate=gate, dataset={"name": "CIFAR-10"}, recipe={"name": "quick"},
    )  # fmt: skip
    return folder


def test_inspect_shows_everything_that_was_measured(measured, capsys):
    assert cli.main(["inspect", str(measured)]) == 0
    shown = capsys.readouterr().out
    manifest = read_manifest(measured)
    for record in manifest.slices:
        assert f"{record.madds_published:,}" in shown
        assert f"{record.madds_served:,}" in shown
        assert f"{record.parameters:,}" in shown
    for text in (
        "shop/7: ds_mbnet, 10 classes", "91.23% (test, 10,000)", "50.00% (hold-out, 5,000)", "gate choices: 0, 1, 3",
        "hold-out shares: 62.5%, 25.0%, 12.5%", "gate top-1: 94.56% (hold-out, 5,000)", "98,765 (test, 10,000)",
        "operating point 0: lambda 0.3, 77,777 MAdds, top-1 90.01%, shares 50.0%, 25.0%, 25.0%",
        "operating point 1 (default): lambda 1.2, 5,555 MAdds, top-1 80.00%", '"CIFAR-10"', '"quick"', manifest.digest,
    ):  # fmt: skip
        assert text in shown


def test_inspect_says_what_was_not_measured(repository, capsys):
    assert cli.main(["inspect", str(repository / "blank")]) == 0
    shown = capsys.readouterr().out
    assert "hold-out shares: not measured" in shown
    assert shown.count("not measured") == 4 + 3


def test_inspect_json_is_the_manifest(measured, capsys):
    assert cli.main(["inspect", str(measured.parent), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"name": "shop", "version": 7} | json.loads((measured / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:1000]), "has digest sha256:"),
        (lambda file: file.unlink(), "cannot be read"),
    ],
)
def test_inspect_shows_nothing_of_a_damaged_checkpoint(measured, tmp_path, capsys, damage, reason):
    folder = shutil.copytree(measured, tmp_path / "shop" / "7")
    damage(folder / "model.safetensors")
    for form in ([], ["--json"]):
        assert cli.main(["inspect", str(folder), *form]) == 1
        shown = capsys.readouterr()
        assert not shown.out
        assert f"model.safetensors {reason}" in shown.err


def test_import_then_inspect(golden, publish, config_file, tmp_path, capsys):
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"étiquette {k}\n" for k in range(10)), encoding="utf-8")
    out = tmp_path / "zoo" / "ds" / "1"
    source = str(publish(golden.state))
    assert cli.main(["import-dsnet", source, str(out), "--config", config_file, "--classes", str(labels)]) == 0
    assert "14 slices, 10 classes, sha256:" in capsys.readouterr().out
    assert load(out).manifest.classes[9] == "étiquette 9"
    assert cli.main(["inspect", str(out)]) == 0
    assert f"{golden.madds[0]:,.0f}" in capsys.readouterr().out


def test_import_of_the_moving_average(golden, publish, config_file, tmp_path):
    ema = {name: torch.ones_like(tensor) for name, tensor in golden.state.items()}
    source = str(publish(golden.state, state_dict_ema=ema))
    out = tmp_path / "zoo" / "ds" / "1"
    assert cli.main(["import-dsnet", source, str(out), "--config", config_file, "--ema"]) == 0
    assert load(out).net.state_dict()["classifier.bias"].unique().tolist() == [1.0]


def test_import_of_the_wrong_shape(golden, publish, tmp_path, capsys):
    out = tmp_path / "zoo" / "ds" / "1"
    assert cli.main(["import-dsnet", str(publish(golden.state)), str(out), "--config", "imagenet14"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("slicewise-models: error: ")
    assert "has shape [10], expected [1000]" in shown or "more" in shown
    assert not out.exists()


def test_create_is_seeded_and_alive_at_every_width(config_file, tmp_path, capsys):
    for name in ("a", "b"):
        command = ["create", str(tmp_path / name / "1"), "--config", config_file, "--seed", "7", "--filter", "box"]
        assert cli.main(command) == 0
    first, second = (load(tmp_path / name / "1") for name in ("a", "b"))
    assert "4 slices, seeded weights" in capsys.readouterr().out
    assert first.manifest.digest == second.manifest.digest
    assert first.manifest.input.filter == "box"
    assert first.manifest.recipe == {"seeded_weights": 7}
    shape = first.net.input_shape
    x = torch.randn(2, shape.channels, shape.height, shape.width)
    with torch.no_grad():
        for width in range(len(first.net.ladder)):
            logits = first.net(x, width)
            assert logits.isfinite().all()
            assert logits.std() > 1e-3  # neither dead nor all the same


def test_export_runs_elsewhere(measured, tmp_path, capsys):
    out = tmp_path / "slice.onnx"
    assert cli.main(["export", str(measured), "--width", "2", "--format", "onnx", str(out)]) == 0
    x = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
    (logits,) = ort.InferenceSession(out, providers=["CPUExecutionProvider"]).run(None, {"pixels": x})
    with torch.no_grad():
        expected = tiny_net()(torch.from_numpy(x), 2).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{zoo}/absent"], "no model 'absent'"),
        (["export", "{zoo}/shop", "--width", "9", "{tmp}/x.onnx"], "width is 9; allowed: 0..3"),
        (["export", "{zoo}/shop", "--width", "0", "{tmp}/no/such/x.onnx"], "No such file or directory"),
        (["create", "{tmp}/m/x", "--config", "imagenet14"], "is no version folder"),
        (["create", "{tmp}/m/1", "--config", "{tmp}/absent.json"], "No such file or directory"),
        (["create", "{tmp}/m/1", "--config", "{zoo}/shop/7/manifest.json"], "not a ds_mbnet config"),
        (["import-dsnet", "{tmp}/absent.pth.tar", "{tmp}/m/1", "--config", "imagenet14"], "No such file or directory"),
        (["import-dsnet", "{tmp}/absent.pth.tar", "{tmp}/m/x", "--config", "imagenet14"], "is no version folder"),
        (["import-dsnet", "x", "{tmp}/m/1", "--config", "{tmp}/absent.json"], "No such file or directory"),
        (["import-dsnet", "x", "{tmp}/m/1", "--config", "{zoo}/shop/7/manifest.json"], "not a ds_mbnet config"),
        (["import-dsnet", "x", "{tmp}/m/1", "--config", "{zoo}/shop/7/model.safetensors"], ""),
    ],
)
def test_errors_are_one_line_and_status_1(measured, tmp_path, capsys, arguments, message):
    filled = [a.format(zoo=measured.parents[1], tmp=tmp_path) for a in arguments]
    assert cli.main(filled) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("slicewise-models: error: ")
    assert shown.count("\n") == 1
    assert message in shown


@pytest.mark.parametrize("arguments", [[], ["fly"], ["export", "x", "--width", "wide", "out"]])
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: slicewise-models" in capsys.readouterr().err
