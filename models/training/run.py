"""One training run from images to a checkpoint: both stages, calibration, measurement, manifest."""

from __future__ import annotations

import csv
import hashlib
import json
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from models.checkpoint import Manifest, Measured, require_new, save
from models.registry import build
from models.supernet import Supernet
from models.training.calibrate import calibrate
from models.training.data import Batches, load_folder, split_hold_out
from models.training.evaluate import Evaluation, evaluate
from models.training.gate_stage import fit_gate
from models.training.recipes import Recipe
from models.training.supernet_stage import SupernetTrainer


def _log_rows(path: Path) -> Any:
    def log(row: dict[str, float]) -> None:
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    return log


def run_identity(recipe: Recipe, net: Supernet, train_names: Iterable[str]) -> dict[str, str]:
    """What stage I depends on, part by part as JSON text: a state is resumed only where all of it is equal.

    train_names  of the images without the hold-out; kept as a digest. Their pixels are not compared.

    The gate's recipe is left out: stage II begins anew in every call.
    """
    parts = {key: value for key, value in recipe.to_json().items() if key != "gate"} | {
        "input": recipe.input_spec.to_json(),
        "network": {"architecture": net.architecture, "config": net.config_dict()},
        "training images": f"sha256:{hashlib.sha256(json.dumps(sorted(train_names)).encode()).hexdigest()}",
    }
    return {part: json.dumps(value, sort_keys=True) for part, value in parts.items()}


def train(recipe: Recipe, train_data: Path, test_data: Path | None, run_dir: Path, out_dir: Path) -> Manifest:
    """Train and write a checkpoint to ``out_dir`` (``<root>/<name>/<version>``).

    run_dir keeps ``supernet.pt`` (rewritten after every epoch; a later call resumes from it) and
    ``log.csv``. Without test data the manifest carries hold-out figures only. Raises ValueError when
    ``supernet.pt`` is of a run that differs in ``run_identity``.
    """
    require_new(out_dir)  # before the hours, not after them
    began_s = time.monotonic()
    run_dir.mkdir(parents=True, exist_ok=True)
    images = load_folder(train_data, recipe.input_spec)
    rest, hold_out = split_hold_out(images, recipe.hold_out, recipe.seed)
    torch.manual_seed(recipe.seed)
    net = build(recipe.architecture, recipe.config()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stage = recipe.supernet
    batches = Batches(rest, recipe.input_spec, stage.batch_size, recipe.seed, stage.crop_padding)
    trainer = SupernetTrainer(net, stage, recipe.seed, run_identity(recipe, net, rest.names))
    trainer.fit(batches, run_dir / "supernet.pt", _log_rows(run_dir / "log.csv"))
    calibration = (batch for _, batch in zip(range(stage.calibration_batches), batches.epoch(2_000_000), strict=False))
    calibrate(net, calibration)
    on_hold_out = fit_gate(net, batches, hold_out, recipe.input_spec, recipe.gate, recipe.seed)
    measured = [("hold-out", on_hold_out)]
    if test_data is not None:
        test = load_folder(test_data, recipe.input_spec, images.classes)
        measured.append(("test", evaluate(net, test, recipe.input_spec, "test")))
    dataset = {
        "name": recipe.dataset,
        "train_images": len(rest),
        "hold_out_images": len(hold_out),
        "test_images": len(measured[-1][1].labels_N) if test_data is not None else 0,
    }
    run = recipe.to_json() | {
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "last_call_s": round(time.monotonic() - began_s),
    }
    return _save(out_dir, net, images.classes, recipe, measured, {"dataset": dataset, "recipe": run})


def _save(
    out_dir: Path, net: Supernet, classes: tuple[str, ...], recipe: Recipe,
    measured: list[tuple[str, Evaluation]], about: dict[str, Any],
) -> Manifest:  # fmt: skip
    def on_each(value: Any) -> tuple[Measured, ...]:
        return tuple(Measured(value(e), split, len(e.labels_N)) for split, e in measured)

    return save(
        out_dir,
        net,
        classes=classes,
        input_spec=recipe.input_spec,
        accuracy=[on_each(lambda e, w=width: e.width_accuracy(w)) for width in range(len(net.ladder))],
        gate_accuracy=on_each(lambda e: e.gate_accuracy),
        gate_mean_madds=on_each(lambda e: e.gate_mean_madds),
        hold_out_shares=measured[0][1].gate_shares(net.gate_choices),
        **about,
    )
