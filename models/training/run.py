"""One training run from images to a checkpoint: both stages, calibration, measurement, manifest."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from models.checkpoint import Checkpoint, GateRecord, Manifest, Measured, load, locate, require_new, save
from models.machine import processor
from models.registry import build
from models.supernet import Supernet
from models.tensors import round_weights
from models.training.calibrate import calibrate
from models.training.data import Batches, LabelledImages, load_folder, split_hold_out
from models.training.evaluate import Evaluation, evaluate
from models.training.fine_tune import initialise, other_hold_out, require_teacher, with_classes
from models.training.gate_stage import GateFit, fit_gate
from models.training.operating import calibration_error, cross_fitted
from models.training.recipes import Recipe, SupernetRecipe
from models.training.supernet_stage import SupernetTrainer, require_learner


def _log_rows(path: Path) -> Any:
    def log(row: dict[str, float]) -> None:
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    return log


def run_identity(
    recipe: Recipe, net: Supernet, train_names: Iterable[str], origin: str | None = None
) -> dict[str, str]:  # fmt: skip
    """What stage I depends on, part by part as JSON text: a state is resumed only where all of it is equal.

    train_names  of the images without the hold-out; kept as a digest. Their pixels are not compared.
    origin       digest of the checkpoint that the weights began as; None: fresh weights.

    The gates' recipes are left out: stage II begins anew in every call.
    """
    parts = {key: recipe.to_json()[key] for key in ("name", "seed", "hold_out", "supernet", "then")} | {
        "input": recipe.input_spec.to_json(),
        "network": {"architecture": net.architecture, "config": net.config_dict()},
        "training images": f"sha256:{hashlib.sha256(json.dumps(sorted(train_names)).encode()).hexdigest()}",
        "origin": origin,
    }
    return {part: json.dumps(value, sort_keys=True) for part, value in parts.items()}


@dataclass(frozen=True, slots=True)
class DataPaths:
    """ImageFolder directories or zips; the hold-out is split off ``train``. name: for the manifest."""

    train: Path
    test: Path | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Where:
    """Where a run happens; none of it changes what is learnt, beyond rounding.

    device: "cpu", "cuda", "cuda:1". workers: processes that decode and augment; 0: none.
    """

    device: str = "cpu"
    workers: int = 0

    def batches(self, images: LabelledImages, recipe: Recipe) -> Batches:
        """Training batches of ``recipe`` on this device."""
        stage = recipe.supernet
        return Batches(
            images, recipe.input_spec, stage.batch_size, recipe.seed, stage.crop_padding, stage.erase_pixels,
            self.workers, torch.device(self.device),
        )  # fmt: skip

    def describe(self) -> str:
        """Hardware and version, for manifests and reports."""
        if self.device.startswith("cuda"):
            return f"{torch.cuda.get_device_name(self.device)}, torch {torch.__version__}"
        return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def new_network(recipe: Recipe, classes: int, where: Where) -> Supernet:
    """The recipe's network for so many classes, its weights drawn by the recipe's seed."""
    torch.manual_seed(recipe.seed)
    net = build(recipe.architecture, with_classes(recipe.config(), classes))
    return net.to(device=where.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def train_supernet(
    recipe: Recipe, net: Supernet, rest: LabelledImages, where: Where, run_dir: Path, origin: Checkpoint | None = None
) -> float:
    """Stage I, rounding and calibration, in place; returns the seconds of all epochs, those of earlier calls included.

    run_dir  keeps ``supernet.pt``, rewritten after every epoch, from which a later call resumes, and
    ``log.csv``; of the second round ``supernet_2.pt`` and ``log_2.csv``, and so on. origin: what the weights
    began as, if not fresh. Raises ValueError when a state is of a run that differs in ``run_identity``.
    """
    for stage in recipe.rounds:
        require_learner(net, stage)  # before the hours of the rounds in front of it
    run_dir.mkdir(parents=True, exist_ok=True)
    identity = run_identity(recipe, net, rest.names, None if origin is None else origin.manifest.digest)
    teacher = None if origin is None else origin.net.eval().to(device=where.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    train_s, average = 0.0, None
    for number, stage in enumerate(recipe.rounds):
        suffix, seed = f"_{number + 1}" if number else "", recipe.seed + number
        trainer = SupernetTrainer(net, stage, seed, identity, teacher)
        if average is not None:
            trainer.ema.load_state_dict(average)
        batches = where.batches(rest, replace(recipe, supernet=stage, seed=seed))
        trainer.fit(batches, run_dir / f"supernet{suffix}.pt", _log_rows(run_dir / f"log{suffix}.csv"))
        train_s, average = train_s + trainer.train_s, trainer.ema.state_dict()
    net.requires_grad_(True)
    if recipe.half_weights:
        round_weights(net)
    calibrate(net, _statistics(batches, stage))
    return train_s


def _statistics(batches: Batches, stage: SupernetRecipe) -> Iterable[tuple[Tensor, Tensor]]:
    """What batch norm's statistics are taken from: augmented images, of an epoch that no round trains on."""
    return batches.epoch(2_000_000, min(stage.calibration_batches, len(batches)))


def train(
    recipe: Recipe,
    splits: DataPaths,
    run_dir: Path,
    out_dir: Path,
    where: Where | None = None,
    init_from: Path | None = None,
) -> Manifest:
    """Train and write a checkpoint to ``out_dir`` (``<root>/<name>/<version>``).

    run_dir  as in ``train_supernet``. init_from: a checkpoint whose tensors the weights begin as, where
    names and shapes agree. Without test data the manifest carries hold-out figures only.
    """
    where = where or Where()
    require_new(out_dir)  # before the hours, not after them
    origin = None if init_from is None else load(locate(init_from))
    images = load_folder(splits.train, recipe.input_spec)
    classes = images.classes
    require_teacher(recipe, classes, origin)
    test = None if splits.test is None else load_folder(splits.test, recipe.input_spec, classes)
    rest, hold_out = split_hold_out(images, recipe.hold_out, recipe.seed)
    del images  # both parts are copies
    net = new_network(recipe, len(classes), where)
    if origin is not None:
        fresh = initialise(net, origin)
        tqdm.write(f"began with {init_from}; fresh: {', '.join(fresh) or 'nothing'}")
        warning = other_hold_out(recipe, origin)
        if warning is not None:
            tqdm.write(f"warning: {warning}", file=sys.stderr)
        # The EMA teacher begins as a copy: with statistics of no image it would teach nonsense for an epoch or two.
        calibrate(net, _statistics(where.batches(rest, recipe), recipe.supernet))
    train_s = train_supernet(recipe, net, rest, where, run_dir, origin)
    batches = where.batches(rest, replace(recipe, supernet=recipe.last_round))
    fit = fit_gate(net, batches, hold_out, recipe.input_spec, recipe)
    measured = [("hold-out", fit.evaluation)]
    if test is not None:
        measured.append(("test", evaluate(net, test, recipe.input_spec, fit.evaluation.decision, "test")))
    counts = {"train_images": len(rest), "hold_out_images": len(hold_out), "test_images": len(test) if test else 0}
    began = None if origin is None else origin.manifest.digest
    run = recipe.to_json() | {"init_from": began, "hardware": where.describe(), "supernet_train_s": round(train_s)}
    return save(
        out_dir, net, classes=classes, input_spec=recipe.input_spec, accuracy=slice_accuracy(measured),
        gate=gate_record(fit, measured), dataset={"name": splits.name or recipe.dataset} | counts, recipe=run,
    )  # fmt: skip


Splits = Sequence[tuple[str, Evaluation]]
"""Evaluations with the name of their split, the hold-out first."""


def _on_each(splits: Splits, value: Callable[[Evaluation], float]) -> tuple[Measured, ...]:
    return tuple(Measured(value(evaluation), split, len(evaluation)) for split, evaluation in splits)


def slice_accuracy(splits: Splits) -> list[tuple[Measured, ...]]:
    """Top-1 of every slice on every split, in ladder order."""
    widths = range(splits[0][1].logits_NLK.shape[1])
    return [_on_each(splits, lambda e, w=width: e.width_accuracy(w)) for width in widths]  # type: ignore[misc]


def gate_record(fit: GateFit, splits: Splits) -> GateRecord:
    """What the manifest says of a fitted gate; on the hold-out its calibration error is cross-fitted."""

    def error(evaluation: Evaluation, width: int) -> float:
        if evaluation is fit.evaluation:
            p_NL = cross_fitted(evaluation.gate_logits_NG, evaluation.correct_NL)
        else:
            p_NL = fit.calibration.probabilities(evaluation.gate_logits_NG)
        return calibration_error(p_NL[:, width], evaluation.correct_NL[:, width])

    widths = range(len(fit.calibration.bias))
    return GateRecord(
        choices=fit.evaluation.decision.choices,
        hold_out_shares=fit.evaluation.gate_shares,
        accuracy=_on_each(splits, lambda e: e.gate_accuracy),
        mean_madds=_on_each(splits, lambda e: e.gate_mean_madds),
        calibration=fit.calibration,
        calibration_error=tuple(_on_each(splits, lambda e, w=width: error(e, w)) for width in widths),  # type: ignore[misc]
        operating_points=fit.points,
        default_point=fit.default_point,
    )
