import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from support import TINY, TINY_INPUT, encode

from models import cli
from models.layers import SlicedBatchNorm2d
from models.training.ablation import ablation_rows, arm_rows, average_gain, read_study, summarise, write_study
from models.training.recipes import RECIPES, GateRecipe, Recipe, SupernetRecipe
from models.training.study import GateArm, SupernetArm, measure_step_cost, share_statistics, shortened

TOY = Recipe(
    "toy",
    "colours",
    "ds_mbnet",
    lambda: asdict(replace(TINY, classes=4)),
    TINY_INPUT,
    SupernetRecipe(cycles=(4,), batch_size=16, lr=0.05, ema_decay=0.9, crop_padding=1, calibration_batches=4),
    (GateRecipe(epochs=5, batch_size=16),),
    gate_views=1,
    hold_out=40,
)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for k, colour in enumerate(((190, 60, 60), (60, 190, 60), (60, 60, 190), (180, 180, 60))):
        where = tmp_path / "images" / f"class{k}"
        where.mkdir(parents=True)
        for i in range(30):
            pixels = np.array(colour) + rng.normal(0, 60, (16, 16, 3))
            (where / f"{i:03}.png").write_bytes(encode(pixels.clip(0, 255).astype(np.uint8)))
    return tmp_path / "images"


def test_a_study_and_its_report(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "toy", lambda: TOY)
    data = ["--data", str(folder), "--test", str(folder)]
    recipe = ["--recipe", "toy", *data]
    arms = ["--run-dir", str(tmp_path / "study")]
    (tmp_path / "other.json").write_text('{"recipe": 3}')
    wrong = ["--study", str(tmp_path / "other.json"), "--out", str(tmp_path / "r.md")]
    assert cli.main(["report", str(tmp_path), *data, *wrong]) == 1
    assert "other.json is no result of `slicewise-models study`: recipe: " in capsys.readouterr().err
    study = ["study", *recipe, *arms, "--epochs", "2", "--targets", "bootstrapping", "labels", "--seeds", "0", "1"]
    assert cli.main(study) == 0
    results = {file.name: file.read_bytes() for file in (tmp_path / "study").glob("*.npz")}
    assert set(results) == {f"{t}-{s}.npz" for t in ("bootstrapping", "labels") for s in (0, 1)}
    assert cli.main(study) == 0
    assert results == {file.name: file.read_bytes() for file in (tmp_path / "study").glob("*.npz")}

    assert cli.main([*study[:-7], "3", "--targets", "labels"]) == 1
    assert "labels-0.npz is an arm of 2 epochs; needed: 3, or another run folder" in capsys.readouterr().err

    out = tmp_path / "zoo" / "toy" / "1"
    assert cli.main(["train", *recipe, "--run-dir", str(tmp_path / "run"), "--out", str(out)]) == 0
    report = tmp_path / "docs" / "training.md"
    found = ["--study", str(tmp_path / "study" / "study.json")]
    arguments = [str(out), *data, *found, "--out", str(report), "--seeds", "0", "--step-pairs", "2"]
    assert cli.main(["report", *arguments]) == 0
    numbers = json.loads(report.with_suffix(".json").read_text())
    text = report.read_text()
    assert text.count("| targets of the narrower slices |") == text.count("| batch-norm statistics |") == 2
    assert text.count("| how the gate learns |") == 3
    assert f"{100 * numbers['accuracy'][-1]:.2f}" in text
    assert "--targets labels --seeds 0 1" in text
    assert len(numbers["gate_arms"]) == 5
    assert str(tmp_path) not in text


def arm(targets, seed, correct):
    return SupernetArm(targets, seed, 2, 1.0, np.asarray(correct, bool), np.zeros((2, 2), bool))


def test_an_average_gain_pairs_seeds_and_images(tmp_path):
    ours = [arm("bootstrapping", 0, [[1, 1], [1, 0]]), arm("bootstrapping", 1, [[1, 1], [1, 1]])]
    theirs = [arm("labels", 0, [[0, 1], [1, 0]]), arm("labels", 2, [[0, 0], [0, 0]])]
    assert average_gain(ours, theirs).value == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no seed in common"):
        average_gain(ours[1:], theirs)
    ours[0].save(tmp_path / "arm.npz")
    assert np.array_equal(SupernetArm.load(tmp_path / "arm.npz").correct_NL, ours[0].correct_NL)


def test_a_study_is_told_from_its_file_alone(tmp_path):
    ours = [arm("bootstrapping", 1, [[1, 1], [1, 1]]), arm("bootstrapping", 0, [[1, 1], [1, 0]])]
    theirs = [arm("labels", 0, [[0, 1], [1, 0]]), arm("in_place_distillation", 5, [[0, 1], [1, 0]])]
    write_study(tmp_path / "study.json", summarise("toy", "a machine", [*theirs, *ours]))
    study = read_study(tmp_path / "study.json")
    assert study == summarise("toy", "a machine", [*ours, *theirs])
    assert study.kinds == ["bootstrapping", "in_place_distillation", "labels"]
    assert [command.split("--epochs ")[1] for command in study.commands] == [
        "2 --targets bootstrapping --seeds 0 1",
        "2 --targets in_place_distillation --seeds 5",
        "2 --targets labels --seeds 0",
    ]
    assert arm_rows(study)[0] == ["bootstrapping", "0 1", "100.00", "75.00"]
    assert arm_rows(study)[-1][2:] == ["0.00", "0.00"]
    correct_NL = np.array([[0, 1], [1, 1]], bool)
    gates = [GateArm("one", "calibrated", 0, np.array([0, 0])), GateArm("two", "calibrated", 0, np.array([1, 1]))]
    rows = ablation_rows(study, correct_NL, [*gates, GateArm("two", "argmax", 0, np.array([0, 0]))])
    assert [row[3:5] for row in rows] == [
        ["2", "87.50 ± 17.68"],
        ["1", "50.00"],
        ["1", "50.00"],
        ["2", "87.50 ± 17.68"],
        ["2", "0.00 ± 0.00"],
        ["1", "50.00"],
        ["1", "100.00"],
    ]
    assert [row[5][:6] for row in rows] == ["", "", "-25.00", "", "-87.50", "", "+50.00"]


def test_shared_statistics_are_the_widests():
    norm = SlicedBatchNorm2d((2, 4))
    norm.running_mean[1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    share_statistics(torch.nn.Sequential(norm))
    assert norm.running_mean[0, :2].tolist() == [1.0, 2.0]


def test_an_arm_differs_in_targets_seed_and_length_alone():
    arm_recipe = shortened(replace(TOY, supernet=replace(TOY.supernet, origin_weight=0.5)), "labels", 7, 2)
    assert (arm_recipe.seed, arm_recipe.supernet.targets, arm_recipe.supernet.cycles) == (7, "labels", (2,))
    assert arm_recipe.supernet.ema_decay == pytest.approx(0.8)  # 5 steps in half the run are 10 in the whole
    restored = replace(arm_recipe.supernet, targets="bootstrapping", cycles=(4,), warmup_epochs=1.0, ema_decay=0.9)
    assert replace(arm_recipe, seed=0, supernet=restored) == TOY


def test_the_step_cost_counts_both_kinds_of_step():
    taught = replace(TOY, supernet=replace(TOY.supernet, origin_weight=0.5))  # there is no origin here
    cost = measure_step_cost(taught, pairs=3)
    assert cost.sandwich_s > cost.plain_s > 0
    assert (cost.batch_size, cost.pairs) == (16, 3)
