import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from support import TINY, TINY_INPUT, encode

from models import cli
from models.layers import SlicedBatchNorm2d
from models.training.recipes import RECIPES, GateRecipe, Recipe, SupernetRecipe
from models.training.report import average_gain, by_targets
from models.training.study import SupernetArm, measure_step_cost, share_statistics, shortened

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
    data = ["--recipe", "toy", "--data", str(folder), "--test", str(folder)]
    arms = ["--run-dir", str(tmp_path / "study")]
    assert cli.main(["report", str(tmp_path), *data, *arms, "--out", str(tmp_path / "r.md")]) == 1
    assert "run `slicewise-models study` first" in capsys.readouterr().err
    study = ["study", *data, *arms, "--epochs", "2", "--targets", "bootstrapping", "labels", "--seeds", "0", "1"]
    assert cli.main(study) == 0
    results = {file.name: file.read_bytes() for file in (tmp_path / "study").glob("*.npz")}
    assert set(results) == {f"{t}-{s}.npz" for t in ("bootstrapping", "labels") for s in (0, 1)}
    assert cli.main(study) == 0
    assert results == {file.name: file.read_bytes() for file in (tmp_path / "study").glob("*.npz")}

    out = tmp_path / "zoo" / "toy" / "1"
    assert cli.main(["train", *data, "--run-dir", str(tmp_path / "run"), "--out", str(out)]) == 0
    report = tmp_path / "docs" / "training.md"
    arguments = [str(out), *data, *arms, "--out", str(report), "--seeds", "0", "--step-pairs", "2"]
    assert cli.main(["report", *arguments]) == 0
    numbers = json.loads(report.with_suffix(".json").read_text())
    text = report.read_text()
    assert [len(members) for members in numbers["supernet_arms"].values()] == [2, 2]
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
    assert [[a.seed for a in members] for members in by_targets([*ours[::-1], *theirs]).values()] == [[0, 1], [0, 2]]
    ours[0].save(tmp_path / "arm.npz")
    assert np.array_equal(SupernetArm.load(tmp_path / "arm.npz").correct_NL, ours[0].correct_NL)


def test_shared_statistics_are_the_widests():
    norm = SlicedBatchNorm2d((2, 4))
    norm.running_mean[1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    share_statistics(torch.nn.Sequential(norm))
    assert norm.running_mean[0, :2].tolist() == [1.0, 2.0]


def test_an_arm_differs_in_targets_seed_and_length_alone():
    arm_recipe = shortened(TOY, "labels", 7, 2)
    assert (arm_recipe.seed, arm_recipe.supernet.targets, arm_recipe.supernet.cycles) == (7, "labels", (2,))
    assert arm_recipe.supernet.ema_decay == pytest.approx(0.8)  # 5 steps in half the run are 10 in the whole
    restored = replace(arm_recipe.supernet, targets="bootstrapping", cycles=(4,), warmup_epochs=1.0, ema_decay=0.9)
    assert replace(arm_recipe, seed=0, supernet=restored) == TOY


def test_the_step_cost_counts_both_kinds_of_step():
    cost = measure_step_cost(TOY, pairs=3)
    assert cost.sandwich_s > cost.plain_s > 0
    assert (cost.batch_size, cost.pairs) == (16, 3)
