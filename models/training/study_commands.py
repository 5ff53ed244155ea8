"""The subcommands of ``slicewise-models`` that compare ways of training: ``study`` and ``report``."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from models.checkpoint import Manifest, load, locate
from models.training.ablation import REFERENCE, StudyResult, read_study, summarise, write_study
from models.training.commands import positive
from models.training.data import load_folder, split_hold_out
from models.training.evaluate import evaluate
from models.training.gate_stage import collect
from models.training.recipes import RECIPES, Recipe
from models.training.report import Findings, as_json, as_markdown
from models.training.run import Where
from models.training.study import (
    TARGETS,
    SupernetArm,
    measure_step_cost,
    shortened,
    train_arm,
    train_gate_arms,
)


def _configure_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="ImageFolder directory or zip of the training split")
    parser.add_argument("--test", type=Path, required=True, help="the same for the test split")
    parser.add_argument("--threads", type=positive, help="CPU threads; all cores when absent")


def configure_study(parser: argparse.ArgumentParser) -> None:
    """Flags of ``study``."""
    parser.add_argument("--recipe", choices=sorted(RECIPES), required=True)
    _configure_data(parser)
    parser.add_argument("--run-dir", type=Path, required=True, help="one result per arm, kept, and study.json of all")
    parser.add_argument("--epochs", type=positive, required=True, help="of every arm, in one learning-rate cycle")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])


def run_study(arguments: argparse.Namespace) -> None:
    """Train every arm that has no result yet, one after another; several calls may share a run folder.

    Its ``study.json`` tells of all arms that lie there.
    """
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    recipe = RECIPES[arguments.recipe]()
    images = load_folder(arguments.data, recipe.input_spec)
    test = load_folder(arguments.test, recipe.input_spec, images.classes)
    rest, _ = split_hold_out(images, recipe.hold_out, recipe.seed)
    for seed in arguments.seeds:
        for targets in arguments.targets:
            file = arguments.run_dir / f"{targets}-{seed}.npz"
            if file.exists():
                _require_arm(file, arguments.epochs)
                continue
            arm_recipe = shortened(recipe, targets, seed, arguments.epochs)
            arm = train_arm(arm_recipe, rest, test, arguments.run_dir / f"{targets}-{seed}")
            arm.save(file)
            accuracies = " ".join(f"{accuracy:.4f}" for accuracy in arm.correct_NL.mean(0))
            print(f"{targets}, seed {seed}: top-1 {accuracies}, {arm.train_s:.0f} s")
    arms = [SupernetArm.load(file) for file in sorted(arguments.run_dir.glob("*.npz"))]
    write_study(arguments.run_dir / "study.json", summarise(recipe.name, Where().describe(), arms))


def _require_arm(file: Path, epochs: int) -> None:
    """ValueError where the arm that is kept is of another length: it must not be told as one of this."""
    kept = SupernetArm.load(file).epochs
    if kept != epochs:
        raise ValueError(f"{file} is an arm of {kept} epochs; needed: {epochs}, or another run folder")


def configure_report(parser: argparse.ArgumentParser) -> None:
    """Flags of ``report``."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="version folder, or model folder (highest)")
    _configure_data(parser)
    parser.add_argument("--study", type=Path, required=True, metavar="STUDY.json", help="what `study` wrote")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the gates that are compared")
    parser.add_argument("--step-pairs", type=int, default=20, help="pairs of steps that are timed")
    parser.add_argument("--out", type=Path, required=True, metavar="REPORT.md", help="a .json is written beside it")


def run_report(arguments: argparse.Namespace) -> None:
    """Measure the checkpoint and the gates, read what ``study`` found, write the report."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    study = read_study(arguments.study)
    if not study.members(REFERENCE):
        raise ValueError(f"{arguments.study} has no arm {REFERENCE}, which all others are held against")
    checkpoint = load(locate(arguments.checkpoint))
    manifest, recipe = checkpoint.manifest, _recipe_of(checkpoint.manifest)
    images = load_folder(arguments.data, manifest.input, manifest.classes)
    test = load_folder(arguments.test, manifest.input, manifest.classes)
    rest, hold_out = split_hold_out(images, recipe.hold_out, recipe.seed)
    last = recipe.last_round
    batches = Where().batches(rest, replace(recipe, supernet=last))
    data = collect(checkpoint.net, batches, recipe.gate_views, first_epoch=1_000_000, bf16=last.bf16)
    gate_arms = train_gate_arms(checkpoint, data, hold_out, test, recipe, arguments.seeds)
    findings = Findings(
        manifest,
        evaluate(checkpoint.net, test, manifest.input, manifest.decision(), "test"),
        study,
        gate_arms,
        measure_step_cost(recipe, arguments.step_pairs),
        Where().describe(),
        _commands(arguments, manifest, study),
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(as_markdown(findings))
    arguments.out.with_suffix(".json").write_text(json.dumps(as_json(findings), indent=1) + "\n")
    print(f"{arguments.out}: {len(study.arms)} supernet arms, {len(gate_arms)} gates")


def _recipe_of(manifest: Manifest) -> Recipe:
    """The recipe that the checkpoint was trained by, with the seed and the hold-out of that run."""
    trained = manifest.recipe or {}
    if trained.get("name") not in RECIPES:
        given = f"{manifest.name}/{manifest.version} was trained by {trained.get('name') or 'no recipe'}"
        raise ValueError(f"{given}; allowed: {', '.join(sorted(RECIPES))}")
    return replace(RECIPES[trained["name"]](), seed=trained["seed"], hold_out=trained["hold_out"])


def _commands(arguments: argparse.Namespace, manifest: Manifest, study: StudyResult) -> list[str]:
    """What a reader types to get these numbers, with the reader's own paths."""
    trained = manifest.recipe or {}
    origin = " --init-from ORIGIN" if trained.get("init_from") else ""
    return [
        f"slicewise-models train --recipe {trained.get('name')} --data TRAIN --test TEST{origin} --run-dir RUN "
        "--out NAME/VERSION",
        *study.commands,
        f"slicewise-models report NAME/VERSION --data TRAIN --test TEST "
        f"--study STUDY/study.json --out {arguments.out.name}",
    ]
