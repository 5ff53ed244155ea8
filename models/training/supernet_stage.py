"""Stage I: the sandwich rule with in-place bootstrapping, resumable after every epoch.

Source (networks as released, commit 15cd303, and DS-Net++ abstract): per step the widest network
learns from the labels; the narrowest and two random widths learn from the softmax of an EMA of the
widest; gradients add up and one SGD (Nesterov) step follows. Ours: images pass a shared trunk once
per step, because the trunk is the same function for every width; gradients with respect to its
features add up before they enter it, which is the same sum. Also ours: where a network has a
classifier on the gate's input, that learns the labels too.

``SupernetRecipe.targets`` says what the narrower widths learn from:

bootstrapping            the EMA of the widest (DS-Net++; released default).
ensemble_bootstrapping   the same, but the narrowest learns from the mean of the EMA's widest and
                         its two random widths (DS-Net; released option ``ensemble_ib``).
in_place_distillation    the widest of the same step (universally slimmable networks, Yu and Huang
                         2019, section 3.3).
labels                   the labels, as the widest does (slimmable networks, Yu et al. 2019).

Ours: with ``SupernetRecipe.origin_weight`` every slice, the widest too, also learns from the widest slice of the
checkpoint that the run began with, which stays as it was.

A slice without a gradient gets neither decay nor momentum in the released code, by dropping zero
gradients. Here the widest takes part in every step, so no weight is ever without one, and what has
none (``grad is None``) is skipped by the optimiser.

Shapes: B batch, K classes.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from models.supernet import Supernet, TrunkOutput
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


def _precise(logits_BK: Tensor) -> Tensor:
    """Out of autocast's bf16, before anything is summed over classes."""
    return logits_BK.float() if logits_BK.dtype == torch.bfloat16 else logits_BK


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def require_learner(net: Supernet, recipe: SupernetRecipe) -> None:
    """ValueError where ``recipe.learns`` names no parameter of the network."""
    names = [name for name, _ in net.named_parameters()]
    if not any(name.startswith(recipe.learns) for name in names):
        parts = ", ".join(sorted({f"{name.partition('.')[0]}." for name in names}))
        raise ValueError(f"learns is {recipe.learns!r}, with which no parameter begins; allowed: {parts} and longer")


def _require_teacher(net: Supernet, weight: float, origin: Supernet | None) -> None:
    if origin is None:
        raise ValueError(f"origin_weight is {weight:g} and the run begins with no checkpoint; needed: --init-from")
    given, own = origin.config_dict().get("classes"), net.config_dict().get("classes")
    if given != own:
        raise ValueError(f"origin_weight is {weight:g} and the checkpoint has {given} classes; needed: {own}")


class SupernetTrainer:
    """Holds the network, its EMA teacher and the optimiser; ``fit`` runs to the recipe's end.

    identity names what must not change between a run and its resumption; it is kept with the state. origin is
    the network whose widest slice teaches, too, in eval mode; ValueError where the recipe wants one and there is none.
    """

    def __init__(
        self,
        net: Supernet,
        recipe: SupernetRecipe,
        seed: int,
        identity: Mapping[str, str],
        origin: Supernet | None = None,
    ) -> None:
        require_learner(net, recipe)
        if recipe.origin_weight:
            _require_teacher(net, recipe.origin_weight, origin)
        self.net, self.recipe, self.seed, self.identity = net, recipe, seed, dict(identity)
        self._origin = origin if recipe.origin_weight else None
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name.startswith(recipe.learns))
        self.device = next(net.parameters()).device
        average = get_ema_multi_avg_fn(recipe.ema_decay)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.ema = AveragedModel(net, multi_avg_fn=average, use_buffers=True)
        decayed = [p for p in net.parameters() if p.ndim > 1]
        spared = [p for p in net.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": spared, "weight_decay": 0.0}],
            lr=recipe.lr, momentum=recipe.momentum, nesterov=True,
        )  # fmt: skip
        self.epochs_done = 0
        self.train_s = 0.0

    @property
    def teacher(self) -> Supernet:
        teacher = self.ema.module
        assert isinstance(teacher, Supernet)
        return teacher

    def step(self, x: Tensor, labels: Tensor, widths: list[int]) -> float:
        """One sandwich step; ``widths`` are the distilled ones, the narrowest last. Returns the labelled loss."""
        recipe, widest = self.recipe, len(self.net.ladder) - 1
        targets, origin_BK = self._teacher_targets(x, widths), self._origin_targets(x)
        if self.net.has_wide_trunk:
            labelled, wide_BK = self._labelled(lambda: self.net.largest(x), labels, origin_BK)
        with self._autocast():
            seen = self.net.trunk(x)
        leaves = TrunkOutput(*(tensor.detach().requires_grad_() for tensor in seen))
        if not self.net.has_wide_trunk:
            labelled, wide_BK = self._labelled(lambda: self.net.answer(leaves, widest), labels, origin_BK)
        if recipe.targets == "in_place_distillation":
            targets = [wide_BK.softmax(dim=1)] * len(widths)
        for index, width in enumerate(widths):
            if recipe.targets == "labels":
                self._labelled(lambda width=width: self.net.answer(leaves, width), labels, origin_BK)  # type: ignore[misc]
            else:
                with self._autocast():
                    logits_BK = self.net.answer(leaves, width)
                target_BK = targets[index] if origin_BK is None else self._mixed(targets[index], origin_BK)
                _backward(distillation(_precise(logits_BK), target_BK))
        with self._autocast():
            class_logits_BK = self.net.gate_class_logits(leaves.gate_input)
        if class_logits_BK is not None:
            _backward(recipe.gate_class_weight * self._task_loss(class_logits_BK, labels))
        reached = [(root, leaf.grad) for root, leaf in zip(seen, leaves, strict=True) if leaf.grad is not None]
        torch.autograd.backward([root for root, _ in reached], [gradient for _, gradient in reached])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update_parameters(self.net)
        return labelled.item()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16)

    def _task_loss(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(_precise(logits_BK), labels, label_smoothing=self.recipe.label_smoothing)

    def _mixed(self, own: Tensor, origin: Tensor) -> Tensor:
        """What a slice learns from its own target, and from the origin: losses, or targets."""
        share = self.recipe.origin_weight
        return (1 - share) * own + share * origin

    def _labelled(
        self, forward: Callable[[], Tensor], labels: Tensor, origin_BK: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Forward, loss, backward; (loss, logits in float32), both without a graph."""
        with self._autocast():
            logits_BK = forward()
        loss = self._task_loss(logits_BK, labels)
        if origin_BK is not None:
            loss = self._mixed(loss, distillation(_precise(logits_BK), origin_BK))
        _backward(loss)
        return loss.detach(), _precise(logits_BK.detach())

    @torch.no_grad()
    def _teacher_targets(self, x: Tensor, widths: list[int]) -> list[Tensor]:
        """Target probabilities [B, K] of every distilled width from the EMA; empty where it teaches none."""
        if self.recipe.targets not in ("bootstrapping", "ensemble_bootstrapping"):
            return []
        self.ema.eval()
        with self._autocast():
            largest_BK = _precise(self.teacher.largest(x)).softmax(dim=1)
            if self.recipe.targets == "bootstrapping":
                return [largest_BK] * len(widths)
            seen = self.teacher.trunk(x)
            votes = [_precise(self.teacher.answer(seen, width)).softmax(dim=1) for width in widths[:-1]]
        return [largest_BK] * len(votes) + [torch.stack([largest_BK, *votes]).mean(dim=0)]

    @torch.no_grad()
    def _origin_targets(self, x: Tensor) -> Tensor | None:
        """What the widest slice of the origin says [B, K]; None where it teaches nothing."""
        if self._origin is None:
            return None
        with self._autocast():
            return _precise(self._origin(x, len(self._origin.ladder) - 1)).softmax(dim=1)

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
            state = torch.load(state_file, weights_only=True, map_location=self.device)
            require_same_run(self.identity, state.get("identity"), state_file)
            self.load_state(state)
        total = self.recipe.epochs * len(batches)
        with tqdm(total=total, initial=self.epochs_done * len(batches), unit="step", desc="supernet") as bar:

            def advance(loss: float) -> None:
                bar.update()
                bar.set_postfix(epoch=self.epochs_done, loss=f"{loss:.3f}", refresh=False)

            while self.epochs_done < self.recipe.epochs:
                began_s = time.monotonic()
                loss = self.run_epoch(batches, advance)
                epoch_s = time.monotonic() - began_s
                self.train_s += epoch_s
                partial = state_file.with_suffix(".partial")
                torch.save(self.state(), partial)
                partial.replace(state_file)
                rate = self.optimizer.param_groups[0]["lr"]
                images_per_s = len(batches) * batches.batch_size / epoch_s
                log(
                    {
                        "epoch": self.epochs_done,
                        "loss": loss,
                        "lr": rate,
                        "epoch_s": epoch_s,
                        "images_per_s": images_per_s,
                    }
                )

    def state(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "epochs_done": self.epochs_done,
            "train_s": self.train_s,
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epochs_done, self.train_s = state["epochs_done"], state["train_s"]
