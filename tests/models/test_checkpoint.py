import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import CLASSES, TINY_INPUT, calibrated_gate, tiny_net

from models.checkpoint import (
    CheckpointError,
    GateRecord,
    Manifest,
    Measured,
    OperatingPoint,
    load,
    locate,
    models_in,
    read_manifest,
    resolve,
    save,
    versions,
)
from models.decision import GateCalibration, GateDecision


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound checkpoint, to be damaged."""
    folder = tmp_path / "zoo" / "tiny" / "1"
    save(folder, tiny_net(), classes=CLASSES, input_spec=TINY_INPUT)
    return folder


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "manifest.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors and make the digest agree, so that only the change itself is wrong."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    seal(folder)


def seal(folder: Path) -> None:
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edit_manifest(folder, lambda data: data.update(digest=f"sha256:{digest}"))


def test_round_trip(tmp_path):
    net = tiny_net()
    calibration = GateCalibration(tuple((0.1 * k, -1e-9, 3.0) for k in range(4)), (0.5, 1 / 3, -2.0, 7.0))
    gate = GateRecord(
        choices=(0, 1, 3),
        hold_out_shares=(0.5, 0.25, 0.25),
        accuracy=(Measured(0.7, "test", 100),),
        mean_madds=(Measured(12345.5, "test", 100),),
        calibration=calibration,
        calibration_error=((Measured(0.01, "hold-out", 50),),) * 4,
        operating_points=(
            OperatingPoint(0.0, 5000.0, 0.7, (0.5, 0.25, 0.25)),
            OperatingPoint(0.2, 4000.5, 0.6, (1.0, 0.0, 0.0)),
        ),
        default_point=0,
    )
    manifest = save(
        tmp_path / "m" / "3",
        net.train().to(memory_format=torch.channels_last),
        classes=CLASSES,
        input_spec=TINY_INPUT,
        accuracy=[[Measured(0.5 + k / 10, "test", 100), Measured(0.6, "hold-out", 50)] for k in range(4)],
        gate=gate,
        dataset={"name": "toy", "train_images": 10},
        recipe={"name": "none", "lr": 0.1},
    )
    loaded = load(tmp_path / "m" / "3")
    assert loaded.manifest == manifest
    assert (manifest.name, manifest.version) == ("m", 3)
    assert [record.test_accuracy for record in manifest.slices] == [0.5, 0.6, 0.7, 0.8]
    assert manifest.gate == gate
    assert manifest.input == TINY_INPUT
    assert not any(module.training for module in loaded.net.modules())
    expected, given = net.state_dict(), loaded.net.state_dict()
    assert list(given) == list(expected)
    assert all(torch.equal(given[name], expected[name]) for name in expected)


@pytest.fixture
def pointed(tmp_path) -> Path:
    """A sound checkpoint with a calibration and three operating points, to be damaged."""
    folder, net = tmp_path / "zoo" / "pointed" / "1", tiny_net()
    save(folder, net, classes=CLASSES, input_spec=TINY_INPUT, gate=calibrated_gate(net))
    return folder


def test_the_decision_is_at_the_default_point_unless_another_is_asked_for(pointed):
    manifest = load(pointed).manifest
    madds = tuple(record.madds_served for record in manifest.slices)
    points = manifest.gate.operating_points
    for asked, used in ((None, 1), (0, 0), (1, 1), (2, 2)):
        expected = GateDecision((0, 1, 3), madds, manifest.gate.calibration, points[used].lambda_)
        assert manifest.decision(asked) == expected


@pytest.mark.parametrize("asked", [-1, 3])
def test_an_operating_point_that_is_not_there(pointed, asked):
    with pytest.raises(ValueError, match=rf"operating point {asked} of pointed/1; allowed: 0\.\.2"):
        load(pointed).manifest.decision(asked)


def test_without_points_the_greatest_logit_wins_and_no_point_can_be_asked_for(folder):
    manifest = load(folder).manifest
    assert manifest.decision() == GateDecision((0, 1, 3), tuple(record.madds_served for record in manifest.slices))
    with pytest.raises(ValueError, match="operating point 0 of tiny/1; allowed: none, the model has no"):
        manifest.decision(0)


def test_points_without_a_default_are_used_only_when_asked_for(pointed):
    edit_manifest(pointed, lambda data: data["gate"].update(default_point=None))
    manifest = load(pointed).manifest
    assert manifest.decision().calibration is None
    assert manifest.decision(2).lambda_ == manifest.gate.operating_points[2].lambda_


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g["calibration"]["weight"].pop(), "calibration has 3 rows of lengths .3. and 4 biases"),
        (lambda g: g["calibration"]["weight"][1].pop(), r"calibration has 4 rows of lengths \[2, 3\] and 4 biases"),
        (
            lambda g: (g["calibration"]["weight"].pop(), g["calibration"]["bias"].pop()),
            r"calibration's slices x choices is \(3, 3\), the network has \(4, 3\)",
        ),
        (
            lambda g: [row.append(0.0) for row in g["calibration"]["weight"]],
            r"calibration's slices x choices is \(4, 4\), the network has \(4, 3\)",
        ),
        (lambda g: g["calibration"].update(scale=1.0), "gate.calibration.scale: Unexpected keyword argument"),
        (lambda g: g["calibration"]["bias"].__setitem__(0, "x"), "gate.calibration.bias.0: Input should be a valid"),
        (lambda g: g.update(calibration=None), "3 operating points without a calibration"),
        (lambda g: g.update(default_point=3), r"default operating point is 3; allowed: 0\.\.2"),
        (lambda g: g.update(default_point=-1), r"default operating point is -1; allowed: 0\.\.2"),
        (
            lambda g: g.update(operating_points=[], default_point=0),
            "is 0; allowed: null, there are no operating points",
        ),
        (lambda g: g["operating_points"].reverse(), "operating points must go from costly to cheap"),
        (lambda g: g["operating_points"][1]["shares"].pop(), "operating point 1 has 2 shares, the gate has 3 choices"),
        (lambda g: g.update(default_point=0.5), "gate.default_point: Input should be a valid integer"),
        (lambda g: g["operating_points"][0].update({"lambda": -0.1}), "operating_points.0.lambda: Input should be"),
        (lambda g: g["operating_points"][0].pop("shares"), "operating_points.0.shares: Field required"),
    ],
)
def test_a_calibration_or_points_that_contradict_the_network_or_each_other(pointed, change, message):
    edit_manifest(pointed, lambda data: change(data["gate"]))
    with pytest.raises(CheckpointError, match=message):
        load(pointed)


def test_costs_in_the_manifest_are_the_networks(folder):
    manifest = read_manifest(folder)
    for record, cost in zip(manifest.slices, tiny_net().costs(), strict=True):
        assert record.madds_published == cost.trunk_madds + cost.body_madds
        assert record.madds_served == record.madds_published + cost.slimming_madds
        assert record.parameters == cost.parameters
        assert record.test_accuracy is None


def test_files_are_readable_by_others_and_nothing_else_is_left(folder):
    assert [f.name for f in sorted(folder.parent.rglob("*"))] == ["1", "manifest.json", "model.safetensors"]
    assert folder.stat().st_mode & 0o050 == 0o050 & ~_umask()
    written = json.loads((folder / "manifest.json").read_text())
    assert {"name", "version"}.isdisjoint(written)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path / "m" / "1", tiny_net(), classes=CLASSES, input_spec=TINY_INPUT, recipe={"lr": float("nan")})
    assert list((tmp_path / "m").iterdir()) == []


def test_save_refuses_facts_that_contradict_the_network(tmp_path):
    with pytest.raises(CheckpointError, match="number of classes is 3, the network has 10"):
        save(tmp_path / "m" / "1", tiny_net(), classes="abc", input_spec=TINY_INPUT)
    assert not (tmp_path / "m").exists()


def test_save_never_overwrites(folder):
    before = read_manifest(folder)
    with pytest.raises(CheckpointError, match="already there"):
        save(folder, tiny_net(1), classes=CLASSES, input_spec=TINY_INPUT)
    assert load(folder).manifest == before


def test_a_copy_takes_name_and_version_from_its_folder(folder, tmp_path):
    copy = tmp_path / "elsewhere" / "12"
    copy.parent.mkdir()
    folder.rename(copy)
    manifest = load(copy).manifest
    assert (manifest.name, manifest.version) == ("elsewhere", 12)


@pytest.mark.parametrize("name", ["latest", "0", "01", "-1", "1.0"])
def test_folders_that_are_no_version(folder, name):
    with pytest.raises(CheckpointError, match="is no version folder"):
        load(folder.rename(folder.with_name(name)))


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file} cannot be read: No such file"):
        load(folder)


def test_a_single_flipped_bit_is_noticed(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    given = hashlib.sha256(data).hexdigest()
    expected = read_manifest(folder).digest
    with pytest.raises(CheckpointError, match=f"has digest sha256:{given}, the manifest says {expected}"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_tensor_file_is_no_tensor_file(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    seal(folder)
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("classifier.bias"), "missing classifier.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda t: t.update({"classifier.bias": torch.zeros(11)}),
            r"classifier.bias has shape \[11\], expected \[10\]",
        ),
        (
            lambda t: t.update({"classifier.bias": torch.zeros(10, dtype=torch.float64)}),
            "classifier.bias has dtype torch.float64, expected torch.float32",
        ),
    ],
)
def test_tensors_that_are_not_the_networks(folder, change, message):
    rewrite_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def set_slice(data: dict[str, Any], key: str, value: Any) -> None:
    data["slices"][2][key] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(architecture="resnet"), "unknown architecture 'resnet'; known: ds_mbnet"),
        (lambda d: d["config"].update(classes=11), r"classifier.bias has shape \[10\], expected \[11\]"),
        (lambda d: d["config"].update(gated_stage=7), "gated_stage is 7; allowed: 0..2"),
        (lambda d: d["config"].update(input_size="big"), "input_size: Input should be a valid integer"),
        (lambda d: d["config"].pop("stages"), "stages: Field required"),
        (lambda d: d["config"].update(depth=3), "depth: Unexpected keyword argument"),
        (lambda d: d["config"]["stages"][0].update(stride=0), "stride 0 must be at least 1"),
        (lambda d: d["classes"].pop(), "number of classes is 9, the network has 10"),
        (lambda d: d["input"].update(height=15), r"input height x width is \(15, 16\), the network has \(16, 16\)"),
        (lambda d: d["input"]["resize"].update(shorter_side=8), "shorter_side 8 must cover the 16x16 input"),
        (lambda d: d["gate"].update(choices=[0, 1, 2]), r"gate choices is \(0, 1, 2\), the network has \(0, 1, 3\)"),
        (lambda d: d["gate"].update(hold_out_shares=[1.0]), "number of hold-out shares is 1, the network has 3"),
        (lambda d: d["slices"].pop(), "number of slices is 3, the network has 4"),
        (lambda d: set_slice(d, "madds_served", 5), r"slices.2.madds_served is 5, the network has \d+"),
        (lambda d: set_slice(d, "madds_published", 5), r"slices.2.madds_published is 5, the network has \d+"),
        (lambda d: set_slice(d, "parameters", 5), r"slices.2.parameters is 5, the network has \d+"),
        (lambda d: set_slice(d, "width", 3), "slices.2.width is 3, the network has 2"),
        (lambda d: set_slice(d, "madds_served", 5.5), "slices.2.madds_served: Input should be a valid integer"),
        (lambda d: set_slice(d, "accuracy", [{"value": 1}]), "slices.2.accuracy.0.split: Field required"),
        (lambda d: d.pop("digest"), "digest: Field required"),
        (lambda d: d.update(surprise=1), "surprise: Unexpected keyword argument"),
        (lambda d: d.update(classes="abc"), "classes: Input should be a valid array, given 'abc'"),
        (lambda d: d.update(input=[]), "input: Value error, input transform"),
    ],
)
def test_a_manifest_that_contradicts_the_tensors_or_itself(folder, change, message):
    edit_manifest(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "must hold an object, given list"), ("[" * 100_000, "is not JSON")],
)
def test_manifests_that_are_no_objects(folder, text, message):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(folder)


def test_all_faults_of_a_manifest_are_named_at_once():
    with pytest.raises(CheckpointError) as caught:
        Manifest.from_json({"classes": 3}, "m", 1)
    assert "m/1/manifest.json: " in str(caught.value)
    assert all(f"{field}: Field required" in str(caught.value) for field in ("architecture", "gate", "digest"))


@pytest.fixture
def root(folder) -> Path:
    """Versions 1, 2, 10 of `tiny`, an empty model, and files that mean nothing."""
    zoo = folder.parents[1]
    for name in ("tiny/2", "tiny/10", "tiny/latest", "tiny/.11.partial-7", "tiny/007", "empty", ".hidden/1"):
        (zoo / name).mkdir(parents=True)
    (zoo / "tiny" / "20").write_text("a file")
    return zoo


def test_versions_are_numbers(root):
    assert versions(root, "tiny") == (1, 2, 10)
    assert versions(root, "empty") == versions(root, "absent") == ()
    assert models_in(root) == ("tiny",)
    assert models_in(root / "absent") == ()


def test_the_highest_version_unless_one_is_named(root):
    assert resolve(root, "tiny") == root / "tiny" / "10"
    assert resolve(root, "tiny", 2) == root / "tiny" / "2"


def test_what_is_there_is_listed_when_it_is_not_that(root):
    with pytest.raises(CheckpointError, match="has no version 3; there: 1, 2, 10"):
        resolve(root, "tiny", 3)
    with pytest.raises(CheckpointError, match=r"no model 'tinny' in .*; there: tiny"):
        resolve(root, "tinny")
    with pytest.raises(CheckpointError, match="there: none"):
        resolve(root / "absent", "tiny")


@pytest.mark.parametrize("name", ["..", "../zoo/tiny", "tiny/../tiny", "."])
def test_a_name_cannot_lead_out_of_the_repository(root, name):
    with pytest.raises(CheckpointError, match="no model"):
        resolve(root, name)


def test_locate_takes_a_version_or_a_model_folder(root, monkeypatch):
    assert locate(root / "tiny" / "1") == root / "tiny" / "1"
    assert locate(root / "tiny") == root / "tiny" / "10"
    monkeypatch.chdir(root / "tiny" / "1")
    assert locate(Path(".")) == root / "tiny" / "1"
