"""The subcommands of ``slicewise-models`` that train."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from models.training.recipes import RECIPES, Recipe
from models.training.run import DataPaths, Where, train


def configure_train(parser: argparse.ArgumentParser) -> None:
    """Flags of ``train``."""
    parser.add_argument("--recipe", choices=sorted(RECIPES), required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help="ImageFolder directory or zip; the hold-out is split off"
    )
    parser.add_argument("--test", type=Path, help="the same for the test split, used for final figures only")
    parser.add_argument(
        "--run-dir", type=Path, required=True, help="state after every epoch; a later call resumes from it"
    )
    parser.add_argument("--out", type=Path, required=True, help="new version folder: ROOT/NAME/VERSION")
    parser.add_argument("--init-from", type=Path, metavar="CHECKPOINT", help="fine-tune: begin with its tensors")
    parser.add_argument("--dataset-name", help="for the manifest, instead of the recipe's")
    parser.add_argument("--hold-out", type=int, metavar="IMAGES", help="instead of the recipe's; a multiple of classes")
    parser.add_argument(
        "--epochs", type=positive, help="one round of one learning-rate cycle of so many, instead of the recipe's"
    )
    parser.add_argument("--lr", type=float, help="highest learning rate, instead of the recipe's")
    parser.add_argument(
        "--origin-weight", type=share, help="how much slices learn from the checkpoint of --init-from (0..1), likewise"
    )
    parser.add_argument("--seed", type=int, help="instead of the recipe's")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode and augment; 0: none (default)")
    parser.add_argument("--threads", type=positive, help="CPU threads; all cores when absent")


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} given; needed: at least 1")
    return number


def share(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} given; allowed: 0 to 1")
    return number


def adjusted(recipe: Recipe, arguments: argparse.Namespace) -> Recipe:
    """The recipe with what the flags replace."""
    stage, then = recipe.supernet, recipe.then
    if arguments.epochs is not None:
        then = ()
        stage = replace(stage, cycles=(arguments.epochs,), warmup_epochs=min(stage.warmup_epochs, arguments.epochs / 4))
    if arguments.lr is not None:
        stage, then = replace(stage, lr=arguments.lr), tuple(replace(later, lr=arguments.lr) for later in then)
    if arguments.origin_weight is not None:
        stage, *rest = (replace(each, origin_weight=arguments.origin_weight) for each in (stage, *then))
        then = tuple(rest)
    seed = recipe.seed if arguments.seed is None else arguments.seed
    hold_out = recipe.hold_out if arguments.hold_out is None else arguments.hold_out
    return replace(recipe, supernet=stage, then=then, seed=seed, hold_out=hold_out)


def _require_device(device: str) -> None:
    """ValueError for a device that is none, or not there."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"device {device} asked for; allowed: cpu, cuda, cuda:0, cuda:1, ...")
    gpus = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= gpus:
        raise ValueError(f"device {device} asked for; this machine and this build of PyTorch have {gpus} CUDA devices")


def run_train(arguments: argparse.Namespace) -> None:
    """Train a recipe to a checkpoint."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    where = Where(arguments.device, arguments.workers)
    _require_device(where.device)
    manifest = train(
        adjusted(RECIPES[arguments.recipe](), arguments),
        DataPaths(arguments.data, arguments.test, arguments.dataset_name),
        arguments.run_dir, arguments.out, where, arguments.init_from,
    )  # fmt: skip
    print(f"{arguments.out}: {len(manifest.slices)} slices, {manifest.digest}")
