"""The training study: one network, one budget of epochs, and what each ingredient is worth.

Supernet arms differ in what the narrower widths learn from (``SupernetRecipe.targets``) and in nothing
else: same images, order, augmentation, initial weights and random widths for one seed. Gate arms differ
in how the slimming head of one frozen supernet is trained. Every arm keeps, per test image, whether
each slice was right, so that differences are paired.

Shapes: N images, L ladder length.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tqdm import tqdm

from models.checkpoint import Checkpoint
from models.layers import SlicedBatchNorm2d
from models.registry import build
from models.supernet import Supernet
from models.training.data import LabelledImages
from models.training.evaluate import evaluate
from models.training.gate_stage import GateData, calibrated, fresh_head, train_head
from models.training.operating import at_cost
from models.training.recipes import GateRecipe, Recipe, Targets
from models.training.run import Where, new_network, train_supernet
from models.training.supernet_stage import SupernetTrainer

TARGETS: tuple[Targets, ...] = ("bootstrapping", "ensemble_bootstrapping", "in_place_distillation", "labels")


@dataclass(frozen=True, slots=True)
class SupernetArm:
    """One trained arm. correct_NL: on the test split; shared_NL: the same with the widest's statistics."""

    targets: str
    seed: int
    epochs: int
    train_s: float
    correct_NL: NDArray[np.bool_]
    shared_NL: NDArray[np.bool_]

    def save(self, file: Path) -> None:
        facts = {key: value for key, value in asdict(self).items() if not key.endswith("_NL")}
        partial = file.with_name(f".{file.name}")
        with partial.open("wb") as stream:
            np.savez_compressed(stream, facts=json.dumps(facts), correct_NL=self.correct_NL, shared_NL=self.shared_NL)
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> SupernetArm:
        with np.load(file) as stored:
            facts: dict[str, Any] = json.loads(str(stored["facts"]))
            return cls(**facts, correct_NL=stored["correct_NL"], shared_NL=stored["shared_NL"])


def shortened(recipe: Recipe, targets: Targets, seed: int, epochs: int) -> Recipe:
    """``recipe`` as an arm: one round of one learning-rate cycle of ``epochs``, other targets, another seed.

    An arm begins with fresh weights, so no checkpoint teaches it.

    The teacher's average reaches as far back, measured in lengths of the run, as it does in ``recipe``:
    else it would lag behind for much of a short run, and the short run would say little about the long one.
    """
    stage = recipe.supernet
    stage = replace(
        stage, cycles=(epochs,), targets=targets, warmup_epochs=min(stage.warmup_epochs, epochs / 4),
        ema_decay=max(0.0, 1 - (1 - stage.ema_decay) * stage.epochs / epochs), origin_weight=0.0,
    )  # fmt: skip
    return replace(recipe, supernet=stage, then=(), seed=seed)


def share_statistics(net: Supernet) -> None:
    """Give every width the widest's batch-norm statistics, as a network without switchable ones has."""
    for norm in net.modules():
        if isinstance(norm, SlicedBatchNorm2d):
            for row, channels in enumerate(norm.widths):
                norm.running_mean[row, :channels] = norm.running_mean[-1, :channels]
                norm.running_var[row, :channels] = norm.running_var[-1, :channels]


def train_arm(recipe: Recipe, images: LabelledImages, test: LabelledImages, run_dir: Path) -> SupernetArm:
    """Train one arm, resuming from ``run_dir``, and measure it on the test split."""
    where = Where()
    net = new_network(recipe, len(images.classes), where)
    train_s = train_supernet(recipe, net, images, where, run_dir)
    correct_NL = evaluate(net, test, recipe.input_spec).correct_NL
    share_statistics(net)
    shared_NL = evaluate(net, test, recipe.input_spec).correct_NL
    return SupernetArm(recipe.supernet.targets, recipe.seed, recipe.supernet.epochs, train_s, correct_NL, shared_NL)


GATES: dict[str, GateRecipe] = {
    "released: SGS, task and MAdds losses": GateRecipe("released"),
    "the same without SGS": GateRecipe("released", sgs_weight=0.0),
    "ours: correctness per slice": GateRecipe("correctness"),
}


@dataclass(frozen=True, slots=True)
class GateArm:
    """One trained gate on the test split. rule: "argmax" of its logits, or "calibrated" at a cost.

    widths_N: ladder index that it gives every image.
    """

    name: str
    rule: str
    seed: int
    widths_N: NDArray[np.int64]


def train_gate_arms(
    checkpoint: Checkpoint, data: GateData, hold_out: LabelledImages, test: LabelledImages, recipe: Recipe,
    seeds: Sequence[int],
) -> list[GateArm]:  # fmt: skip
    """Every gate of ``GATES`` for every seed, under the rules that it has, on the test split.

    The calibrated rule is fitted on the hold-out to ``recipe.operating.compare_at`` of the widest's cost.
    """
    net, spec = checkpoint.net, checkpoint.manifest.input
    base, on_test = evaluate(net, hold_out, spec), evaluate(net, test, spec)
    madds_G = torch.tensor([float(base.decision.madds[choice]) for choice in net.gate_choices])
    arms = []
    for name, gate in GATES.items():
        for seed in seeds:
            head = train_head(fresh_head(net.slimming_head(), seed), data, madds_G / madds_G[-1], gate, seed)
            fitted = calibrated(base, head)
            with torch.no_grad():
                logits_NG = head(torch.from_numpy(on_test.gate_inputs_NR)).numpy()
            rules = {"calibrated": at_cost(fitted, recipe.operating.compare_at)}
            if gate.objective == "released":
                rules["argmax"] = on_test.decision
            arms += [GateArm(name, rule, seed, decision.widths(logits_NG)) for rule, decision in rules.items()]
    return arms


@dataclass(frozen=True, slots=True)
class StepCost:
    """Median seconds of a sandwich step and of a plain step of the widest slice, taken in turn."""

    sandwich_s: float
    plain_s: float
    batch_size: int
    threads: int
    pairs: int


def measure_step_cost(recipe: Recipe, pairs: int = 20) -> StepCost:
    """Time both kinds of step on random images, alternating; the data pipeline is left out of both."""
    torch.manual_seed(0)
    stage = replace(recipe.supernet, origin_weight=0.0)  # a second teacher would be neither's own cost
    nets = [
        build(recipe.architecture, recipe.config()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for _ in range(2)
    ]
    sandwich, plain = (SupernetTrainer(net.train(), stage, 0, {}) for net in nets)
    shape = nets[0].input_shape
    x = torch.randn(stage.batch_size, shape.channels, shape.height, shape.width).to(memory_format=torch.channels_last)
    labels = torch.randint(0, nets[0].classes, (stage.batch_size,))
    widest = len(nets[0].ladder) - 1
    middle = [1 + index * (widest - 1) // max(1, stage.random_widths) for index in range(stage.random_widths)]

    def plain_step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.bf16):
            logits_BK = plain.net(x, widest)
        F.cross_entropy(logits_BK.float(), labels, label_smoothing=stage.label_smoothing).backward()  # type: ignore[no-untyped-call]
        plain.optimizer.step()
        plain.optimizer.zero_grad(set_to_none=True)

    times: tuple[list[float], list[float]] = ([], [])
    steps: tuple[Callable[[], object], ...] = (lambda: sandwich.step(x, labels, [*middle, 0]), plain_step)
    for index in tqdm(range(pairs + 2), unit="pair", desc="step cost"):
        for seconds, step in zip(times, steps, strict=True):
            began_s = time.perf_counter()
            step()
            if index >= 2:  # the first two pairs warm caches and primitives
                seconds.append(time.perf_counter() - began_s)
    return StepCost(median(times[0]), median(times[1]), stage.batch_size, torch.get_num_threads(), pairs)
