"""Stage I: the sandwich rule with in-place bootstrapping, resumable after every epoch.

Source (networks as released, commit 15cd303, and DS-Net++ abstract): per step the widest network
learns from the labels; the narrowest and two random widths learn from the softmax of an EMA of the
widest; gradients add up and one SGD (Nesterov) step follows. Ours: images pass a shared trunk once
per step, because the trunk is the same function for every width; gradients with respect to its
features add up before they enter it, which is the same sum.

Shapes: B batch, K classes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from models.supernet import Supernet
from models.training.data import Batches
from models.training.losses import distillation
from models.training.recipes import SupernetRecipe


def learning_rate(recipe: SupernetRecipe, step: int, steps_per_epoch: int) -> float:
    """The rate of one step: within its cycle, a cosine from ``recipe.lr`` to 0; the first cycle warms up."""
    first, length = 0, 0
    for epochs in recipe.cycles:
        first, length = first + length, epochs * steps_per_epoch
        if step < first + length:
            break
    warmup = recipe.warmup_epochs * steps_per_epoch if first == 0 else 0.0
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    return 0.5 * recipe.lr * (1 + math.cos(math.pi * (step - first - warmup) / max(1.0, length - warmup)))


def require_same_run(given: Mapping[str, str], stored: Mapping[str, str] | None, state_file: Path) -> None:
    """ValueError names every part in which a run differs from the one that wrote ``state_file``."""
    if stored is None:
        raise ValueError(f"{state_file} does not say of which run it is; train in a new run folder")
    faults = [
        f"{part} is {given.get(part)}, stored is {stored.get(part)}"
        for part in sorted({*given, *stored})
        if given.get(part) != stored.get(part)
    ]
    if faults:
        raise ValueError(f"{state_file} is of another run: {'; '.join(faults)}")


class SupernetTrainer:
    """Holds the network, its EMA teacher and the optimiser; ``fit`` runs to the recipe's end.

    identity names what must not change between a run and its resumption; it is kept with the state.
    """

    def __init__(self, net: Supernet, recipe: SupernetRecipe, seed: int, identity: Mapping[str, str]) -> None:
        self.net, self.recipe, self.seed, self.identity = net, recipe, seed, dict(identity)
        average = get_ema_multi_avg_fn(recipe.ema_decay)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.ema = AveragedModel(net, multi_avg_fn=average, use_buffers=True)
        decayed = [p for p in net.parameters() if p.ndim > 1]
        spared = [p for p in net.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": spared, "weight_decay": 0.0}],
            lr=recipe.lr, momentum=recipe.momentum, nesterov=True,
        )  # fmt: skip
        self.epochs_done = 0

    @property
    def teacher(self) -> Supernet:
        teacher = self.ema.module
        assert isinstance(teacher, Supernet)
        return teacher

    def step(self, x: Tensor, labels: Tensor, widths: list[int]) -> float:
        """One sandwich step; ``widths`` are the distilled ones. Returns the labelled loss."""
        recipe = self.recipe
        self.ema.eval()
        with torch.no_grad():
            target_BK = self.teacher.largest(x).softmax(dim=1)
        if self.net.has_wide_trunk:
            labelled = F.cross_entropy(self.net.largest(x), labels, label_smoothing=recipe.label_smoothing)
            labelled.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        features = self.net.trunk(x).features
        leaf = features.detach().requires_grad_()
        if not self.net.has_wide_trunk:
            widest = len(self.net.ladder) - 1
            labelled = F.cross_entropy(self.net.body(leaf, widest), labels, label_smoothing=recipe.label_smoothing)
            labelled.backward()  # type: ignore[no-untyped-call]
        for width in widths:
            distillation(self.net.body(leaf, width), target_BK).backward()  # type: ignore[no-untyped-call]
        features.backward(leaf.grad)  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update_parameters(self.net)
        return labelled.item()

    def run_epoch(self, batches: Batches, advance: Callable[[float], None]) -> float:
        """One epoch; returns its mean labelled loss."""
        draw = random.Random(self.seed * 7919 + self.epochs_done)
        first = self.epochs_done * len(batches)
        widest = len(self.net.ladder) - (1 if self.net.has_wide_trunk else 2)
        self.net.train()
        total = 0.0
        for index, (x, labels) in enumerate(batches.epoch(self.epochs_done)):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.recipe, first + index, len(batches))
            widths = [draw.randint(1, max(1, widest)) for _ in range(self.recipe.random_widths)]
            loss = self.step(x, labels, [*widths, 0])
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss is {loss} at epoch {self.epochs_done}, step {index}")
            total += loss
            advance(loss)
        self.epochs_done += 1
        return total / max(1, len(batches))

    def fit(self, batches: Batches, state_file: Path, log: Callable[[dict[str, float]], None]) -> None:
        """Train to the last epoch, resuming from ``state_file`` and rewriting it after each.

        Raises ValueError when the file is the state of another run.
        """
        if state_file.exists():
            state = torch.load(state_file, weights_only=True)
            require_same_run(self.identity, state.get("identity"), state_file)
            self.load_state(state)
        total = self.recipe.epochs * len(batches)
        with tqdm(total=total, initial=self.epochs_done * len(batches), unit="step", desc="supernet") as bar:

            def advance(loss: float) -> None:
                bar.update()
                bar.set_postfix(epoch=self.epochs_done, loss=f"{loss:.3f}", refresh=False)

            while self.epochs_done < self.recipe.epochs:
                loss = self.run_epoch(batches, advance)
                partial = state_file.with_suffix(".partial")
                torch.save(self.state(), partial)
                partial.replace(state_file)
                log({"epoch": self.epochs_done, "loss": loss})

    def state(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "epochs_done": self.epochs_done,
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epochs_done = state["epochs_done"]
