import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from support import TINY, TINY_INPUT, encode

from models import cli
from models.checkpoint import CheckpointError, load
from models.training import commands
from models.training.recipes import RECIPES, GateRecipe, Recipe, SupernetRecipe
from models.training.run import DataPaths, train

RELEASED = GateRecipe("released", epochs=20, batch_size=16)
TOY = Recipe(
    "toy",
    "colours",
    "ds_mbnet",
    lambda: asdict(replace(TINY, classes=4)),
    TINY_INPUT,
    SupernetRecipe(cycles=(4, 4), batch_size=16, lr=0.05, ema_decay=0.9, crop_padding=1, calibration_batches=4),
    (RELEASED, GateRecipe("correctness", epochs=5, batch_size=16)),
    gate_views=1,
    hold_out=40,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two ImageFolders: one colour per class, and a third of the images without any."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 15)):
        for k, colour in enumerate(((190, 60, 60), (60, 190, 60), (60, 60, 190), (180, 180, 60))):
            folder = root / split / f"class{k}"
            folder.mkdir(parents=True)
            for i in range(count):
                hopeless = i % 3 == 0  # grey noise: what a gate can tell from colours, and no width gets right
                mean = np.array((128, 128, 128) if hopeless else colour)
                pixels = mean + rng.normal(0, 70 if hopeless else 20, (16, 16, 3))
                (folder / f"{i:03}.png").write_bytes(encode(pixels.clip(0, 255).astype(np.uint8)))
    return root


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    manifest = train(TOY, DataPaths(folders / "train", folders / "test"), root / "run", root / "zoo" / "toy" / "1")
    return root, manifest


def test_a_run_ends_in_a_checkpoint_whose_numbers_name_their_split_and_count(trained):
    root, manifest = trained
    assert load(root / "zoo" / "toy" / "1").manifest == manifest
    for record in manifest.slices:
        assert [(m.split, m.count) for m in record.accuracy] == [("hold-out", 40), ("test", 60)]
    assert [(m.split, m.count) for m in manifest.gate.accuracy] == [("hold-out", 40), ("test", 60)]
    assert sum(manifest.gate.hold_out_shares) == pytest.approx(1)
    assert manifest.dataset == {"name": "colours", "train_images": 200, "hold_out_images": 40, "test_images": 60}
    assert manifest.recipe["supernet"]["lr"] == 0.05
    assert (root / "run" / "log.csv").read_text().count("\n") == 9


def test_a_finished_run_is_not_trained_again_and_never_overwrites(trained, folders):
    root, manifest = trained
    again = train(TOY, DataPaths(folders / "train", folders / "test"), root / "run", root / "zoo" / "toy" / "2")
    assert again.digest == manifest.digest
    with pytest.raises(CheckpointError, match="already there"):
        train(TOY, DataPaths(folders / "train"), root / "other", root / "zoo" / "toy" / "1")
    assert not (root / "other").exists()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"seed": 1}, {"seed", "training images"}),
        ({"hold_out": 20}, {"hold_out", "training images"}),
        ({"supernet": replace(TOY.supernet, lr=0.1)}, {"supernet"}),
        ({"input_spec": replace(TINY_INPUT, mean=(0.1, 0.1, 0.1))}, {"input"}),
        ({"config": lambda: asdict(replace(TINY, classes=4, se_ratio=0.5))}, {"network"}),
    ],
)
def test_a_run_is_resumed_by_itself_only(trained, folders, tmp_path, change, parts):
    out = tmp_path / "zoo" / "toy" / "1"
    with pytest.raises(ValueError, match="is of another run") as caught:
        train(replace(TOY, **change), DataPaths(folders / "train"), trained[0] / "run", out)
    differing = str(caught.value).split("another run: ")[1].split("; ")
    assert {fault.split(" is ")[0] for fault in differing} == parts
    assert not out.exists()


def test_other_images_are_another_run(trained, folders, tmp_path):
    with pytest.raises(ValueError, match=r'training images is "sha256:[0-9a-f]{64}", stored is "sha256:[0-9a-f]{64}"$'):
        train(TOY, DataPaths(folders / "test"), trained[0] / "run", tmp_path / "zoo" / "toy" / "1")


def test_the_gate_may_be_fitted_anew_with_another_recipe(trained, folders, tmp_path):
    recipe = replace(TOY, gates=(replace(RELEASED, hard_weight=2.0),))
    manifest = train(recipe, DataPaths(folders / "train"), trained[0] / "run", tmp_path / "zoo" / "toy" / "1")
    assert [gate["hard_weight"] for gate in manifest.recipe["gates"]] == [2.0]


def test_the_commands_train_and_evaluate(trained, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "toy", lambda: TOY)
    out = tmp_path / "zoo" / "toy" / "1"
    arguments = [
        "--recipe",
        "toy",
        "--data",
        str(folders / "train"),
        "--run-dir",
        str(tmp_path / "run"),
        "--out",
        str(out),
    ]
    assert cli.main(["train", *arguments, "--seed", "3"]) == 0
    assert load(out).manifest.recipe["seed"] == 3
    answers = tmp_path / "answers.json"
    assert cli.main(["evaluate", str(out.parent), "--data", str(folders / "test"), "--json", str(answers)]) == 0
    report = json.loads(answers.read_text())
    printed = capsys.readouterr().out
    assert len(report["images"]) == report["count"] == 60
    right = np.mean([image["answers"][3] == image["label"] for image in report["images"]])
    assert right == pytest.approx(report["accuracy"][3])
    assert f"width 3: top-1 {right:.4f}" in printed
    assert all(min(image["margins"]) >= 0 and image["gate_margin"] >= 0 for image in report["images"])
    assert commands.RECIPES is RECIPES


def test_fine_tuning_begins_with_a_checkpoint_and_may_have_other_classes(
    trained, folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(RECIPES, "toy", lambda: replace(TOY, supernet=replace(TOY.supernet, origin_weight=0.5)))
    own = tmp_path / "own"
    for k in (0, 1, 2):
        (own / f"mine{k}").mkdir(parents=True)
        for file in (folders / "train" / f"class{k}").iterdir():
            (own / f"mine{k}" / file.name).write_bytes(file.read_bytes())
    flags = ["--recipe", "toy", "--data", str(own), "--hold-out", "30", "--dataset-name", "mine", "--epochs", "1"]
    out = tmp_path / "zoo" / "mine" / "1"
    flags += ["--origin-weight", "0"]
    begin = ["--init-from", str(trained[0] / "zoo" / "toy"), "--lr", "0.0"]
    assert cli.main(["train", *flags, *begin, "--run-dir", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert "fresh: classifier.weight, classifier.bias" in capsys.readouterr().out
    tuned, source = load(out), load(trained[0] / "zoo" / "toy" / "1")
    assert tuned.manifest.classes == ("mine0", "mine1", "mine2")
    assert tuned.manifest.dataset["name"] == "mine"
    assert tuned.manifest.recipe["init_from"] == source.manifest.digest
    # With a learning rate of 0 only what is refitted may differ: statistics, gate and the fresh classifier.
    assert torch.equal(tuned.net.stem.conv.weight, source.net.stem.conv.weight)
    assert tuned.net.classifier.weight.shape[0] == 3
    fresh_run = ["train", *flags, "--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "zoo" / "mine" / "2")]
    assert cli.main(fresh_run) == 1
    assert "origin is null" in capsys.readouterr().err


def test_who_cannot_teach_is_told_before_the_hours(trained, folders, tmp_path):
    recipe = replace(TOY, then=(replace(TOY.supernet, origin_weight=0.5),))
    paths = DataPaths(folders / "train"), tmp_path / "run", tmp_path / "zoo" / "toy" / "1"
    with pytest.raises(ValueError, match="there is none; needed: --init-from"):
        train(recipe, *paths)
    source = trained[0] / "zoo" / "toy"
    with pytest.raises(ValueError, match=r"whose input is .*; needed: "):
        train(replace(recipe, input_spec=replace(TOY.input_spec, mean=(0.1, 0.1, 0.1))), *paths, init_from=source)
    renamed = tmp_path / "renamed"
    shutil.copytree(folders / "train", renamed)
    (renamed / sorted(entry.name for entry in renamed.iterdir())[0]).rename(renamed / "zebra")
    with pytest.raises(ValueError, match=r"whose classes are .*; needed: those of the images, .*zebra"):
        train(recipe, DataPaths(renamed), *paths[1:], init_from=source)
    with pytest.raises(ValueError, match=r"learns is 'exit\.', with which no parameter begins; allowed: .*stem\. and"):
        train(replace(TOY, then=(replace(TOY.supernet, learns="exit."),)), *paths)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("seed", "warned"), [(0, False), (1, True)])
def test_images_that_the_origin_may_have_learnt_are_warned_of(trained, folders, tmp_path, capsys, seed, warned):
    recipe = replace(TOY, seed=seed, supernet=replace(TOY.supernet, cycles=(1,)))
    out = tmp_path / "zoo" / "toy" / "1"
    train(recipe, DataPaths(folders / "train"), tmp_path / "run", out, init_from=trained[0] / "zoo" / "toy")
    assert ("images by seed 0, this run" in capsys.readouterr().err) == warned


def test_rounds_follow_each_other_and_resume_where_they_were(trained, folders, tmp_path):
    source, run_dir = trained[0] / "zoo" / "toy", tmp_path / "run"
    second = replace(TOY.supernet, cycles=(2,), lr=0.02, origin_weight=0.5)
    recipe = replace(TOY, supernet=replace(TOY.supernet, cycles=(1,)), then=(second,))

    def run(version, recipe=recipe):
        out = tmp_path / "zoo" / "toy" / version
        return train(recipe, DataPaths(folders / "train"), run_dir, out, init_from=source)

    manifest = run("1")
    assert [stage["cycles"] for stage in manifest.to_json()["recipe"]["then"]] == [[2]]
    first, then = (torch.load(run_dir / f"supernet{part}.pt", weights_only=True) for part in ("", "_2"))
    assert (first["epochs_done"], then["epochs_done"]) == (1, 2)
    assert not torch.equal(first["net"]["classifier.weight"], then["net"]["classifier.weight"])
    assert (run_dir / "log_2.csv").read_text().count("\n") == 3
    assert run("2").digest == manifest.digest
    (run_dir / "supernet_2.pt").unlink()
    assert run("3").digest == manifest.digest
    with pytest.raises(ValueError, match="is of another run: then is"):
        run("4", replace(recipe, then=(replace(second, lr=0.01),)))


@pytest.mark.parametrize(
    ("device", "fault"),
    [
        ("cuda:1", "have 1 CUDA devices"),
        ("gpu", "allowed: cpu, cuda, cuda:0"),
        ("cuda:last", "allowed: cpu, cuda, cuda:0"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_any_work(folders, tmp_path, monkeypatch, capsys, device, fault):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    flags = ["--recipe", "ds_mbnet_cifar10", "--data", str(folders / "train"), "--run-dir", str(tmp_path / "run")]
    assert cli.main(["train", *flags, "--out", str(tmp_path / "zoo" / "x" / "1"), "--device", device]) == 1
    error = capsys.readouterr().err
    assert fault in error
    assert device in error
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_ends_with_the_step(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "toy", lambda: TOY)
    flags = ["--recipe", "toy", "--data", str(folders / "train"), "--run-dir", str(tmp_path / "run"), "--lr", "1e30"]
    assert cli.main(["train", *flags, "--out", str(tmp_path / "zoo" / "x" / "1")]) == 1
    assert "loss is nan at epoch 0, step " in capsys.readouterr().err
