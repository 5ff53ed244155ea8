"""The subcommands of ``slicewise-models`` that train and measure."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.checkpoint import Checkpoint, load, locate
from models.training.data import LabelledImages, load_folder
from models.training.evaluate import Evaluation, evaluate
from models.training.recipes import RECIPES
from models.training.run import train


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
    parser.add_argument("--seed", type=int, help="instead of the recipe's")
    parser.add_argument("--threads", type=int, help="CPU threads; all cores when absent")


def run_train(arguments: argparse.Namespace) -> None:
    """Train a recipe to a checkpoint."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    recipe = RECIPES[arguments.recipe]()
    if arguments.seed is not None:
        recipe = replace(recipe, seed=arguments.seed)
    manifest = train(recipe, arguments.data, arguments.test, arguments.run_dir, arguments.out)
    print(f"{arguments.out}: {len(manifest.slices)} slices, {manifest.digest}")


def configure_evaluate(parser: argparse.ArgumentParser) -> None:
    """Flags of ``evaluate``."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="version folder, or model folder (highest)")
    parser.add_argument("--data", type=Path, required=True, help="ImageFolder directory or zip")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every image's answers at every width")


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Print top-1 per slice and under the gate; with --json keep every image's answers."""
    checkpoint = load(locate(arguments.checkpoint))
    manifest = checkpoint.manifest
    images = load_folder(arguments.data, manifest.input, manifest.classes)
    evaluation = evaluate(checkpoint.net, images, manifest.input, "evaluate")
    for record in manifest.slices:
        accuracy = evaluation.width_accuracy(record.width)
        print(f"width {record.width}: top-1 {accuracy:.4f}, {record.madds_published:,} MAdds published")
    shares = " ".join(
        f"{width}:{share:.3f}"
        for width, share in zip(manifest.gate.choices, evaluation.gate_shares(manifest.gate.choices), strict=True)
    )
    mean_madds = f"{evaluation.gate_mean_madds:,.0f} MAdds served"
    print(f"gate: top-1 {evaluation.gate_accuracy:.4f}, mean {mean_madds}, shares {shares}")
    print(f"{len(images)} images of {arguments.data}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(as_json(checkpoint, images, evaluation)))


def _margins(logits: np.ndarray) -> np.ndarray:
    """Best minus second best along the last axis."""
    best = np.partition(logits, -2, axis=-1)
    return best[..., -1] - best[..., -2]


def as_json(checkpoint: Checkpoint, images: LabelledImages, evaluation: Evaluation) -> dict[str, Any]:
    """Totals, and per image: its label, the answer and top-2 margin of logits at each width, the gate's width."""
    manifest = checkpoint.manifest
    answers_NL = evaluation.logits_NLK.argmax(2)
    margins_NL, gate_margins_N = _margins(evaluation.logits_NLK), _margins(evaluation.gate_logits_NG)
    return {
        "model": manifest.name,
        "version": manifest.version,
        "digest": manifest.digest,
        "count": len(images),
        "accuracy": [evaluation.width_accuracy(record.width) for record in manifest.slices],
        "gate": {"accuracy": evaluation.gate_accuracy, "mean_madds": evaluation.gate_mean_madds},
        "images": [
            {
                "name": images.names[i],
                "label": int(images.labels[i]),
                "answers": answers_NL[i].tolist(),
                "margins": margins_NL[i].tolist(),
                "gate_width": int(evaluation.gate_widths_N[i]),
                "gate_margin": float(gate_margins_N[i]),
            }
            for i in range(len(images))
        ],
    }
