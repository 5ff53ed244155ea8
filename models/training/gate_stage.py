"""Stage II: the slimming head alone, on a frozen supernet.

Source (released train_epoch_slim_gate): loss = SGS + task loss through a straight-through Gumbel
choice + weighted MAdds loss, over the slimming head's parameters only. Ours: since everything but
the head is frozen, its inputs and the logits of every choice are computed once for a few augmented
views and the head trains on those; the task loss mixes the choices' logits instead of masking every
layer; hard images may weigh more in SGS, because they are few.

Ours too: the objective ``correctness``, where the head learns by binary cross-entropy, choice by
choice, whether that slice will be right. Whatever the objective, the hold-out then calibrates the
logits and gives the operating points (operating.py).

Shapes: N views, R gate input, G gate choices, K classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models.checkpoint import OperatingPoint
from models.decision import GateCalibration, GateDecision
from models.supernet import Supernet
from models.training.data import Batches, LabelledImages
from models.training.evaluate import Evaluation, evaluate
from models.training.losses import madds_penalty, sandwich_gate_sparsification, straight_through_gumbel
from models.training.operating import at_cost, default_point, fit_calibration, sweep
from models.training.recipes import GateRecipe, Recipe
from models.transform import InputSpec

LEAST_SHARE = 0.05
"""A gate chooses when at least two widths get this share of the hold-out."""


@dataclass(frozen=True, slots=True)
class GateData:
    """inputs_NR, logits_NGK (one row per gate choice), labels_N."""

    inputs_NR: Tensor
    logits_NGK: Tensor
    labels_N: Tensor

    @property
    def correct_NG(self) -> Tensor:
        return self.logits_NGK.argmax(2) == self.labels_N[:, None]


@dataclass(frozen=True, slots=True)
class GateFit:
    """A trained gate: what it does on the hold-out at its default point, and its other points."""

    evaluation: Evaluation
    calibration: GateCalibration
    points: tuple[OperatingPoint, ...]
    default_point: int


@torch.no_grad()
def collect(net: Supernet, batches: Batches, views: int, first_epoch: int, *, bf16: bool = False) -> GateData:
    """Run ``views`` augmented epochs through the frozen supernet; results in float32 on the CPU."""
    inputs, logits, labels = [], [], []
    device = next(net.parameters()).device
    net.eval()
    with (
        tqdm(total=views * len(batches), unit="step", desc="gate inputs") as bar,
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        for view in range(views):
            for x, y in batches.epoch(first_epoch + view):
                seen = net.trunk(x.to(device))
                inputs.append(seen.gate_input.float().cpu())
                per_choice = [net.answer(seen, width).float() for width in net.gate_choices]
                logits.append(torch.stack(per_choice, dim=1).cpu())
                labels.append(y.cpu())
                bar.update()
    return GateData(torch.cat(inputs), torch.cat(logits), torch.cat(labels))


def gate_loss(
    gate_logits_BG: Tensor, batch: GateData, relative_madds_G: Tensor, recipe: GateRecipe, generator: torch.Generator
) -> Tensor:
    """The recipe's objective for one batch. relative_madds_G: served MAdds over the widest choice's."""
    if recipe.objective == "correctness":
        return F.binary_cross_entropy_with_logits(gate_logits_BG, batch.correct_NG.float())
    choice_BG, _ = straight_through_gumbel(gate_logits_BG, generator)
    mixed_BK = torch.einsum("bg,bgk->bk", choice_BG, batch.logits_NGK)
    task = F.cross_entropy(mixed_BK, batch.labels_N, label_smoothing=recipe.label_smoothing)
    cost = recipe.madds_weight * madds_penalty(choice_BG, relative_madds_G, recipe.target_madds)
    easy_B = batch.correct_NG[:, 0]
    sgs = sandwich_gate_sparsification(gate_logits_BG, easy_B, recipe.label_smoothing, recipe.hard_weight)
    return recipe.sgs_weight * sgs + task + cost


def train_head(
    fresh: nn.Module, data: GateData, relative_madds_G: Tensor, recipe: GateRecipe, seed: int
) -> nn.Module:  # fmt: skip
    """A copy of ``fresh`` trained on collected data."""
    generator = torch.Generator().manual_seed(seed)
    head = copy.deepcopy(fresh).cpu().train()
    optimizer = torch.optim.SGD(
        head.parameters(), lr=recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    count = len(data.labels_N)
    size = min(recipe.batch_size, count)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, recipe.epochs * (count // size)))
    for _ in range(recipe.epochs):
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            chosen = order[start : start + size]
            batch = GateData(data.inputs_NR[chosen], data.logits_NGK[chosen], data.labels_N[chosen])
            loss = gate_loss(head(batch.inputs_NR), batch, relative_madds_G, recipe, generator)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            schedule.step()
    return head.eval()


def fresh_head(head: nn.Module, seed: int) -> nn.Module:
    """A copy with newly drawn weights: stage II never goes on from an earlier gate."""
    copied = copy.deepcopy(head).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in copied.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return copied


def is_alive(evaluation: Evaluation) -> bool:
    """True when at least two widths get at least LEAST_SHARE of the images."""
    return sum(share >= LEAST_SHARE for share in evaluation.gate_shares) >= 2


def calibrated(base: Evaluation, head: nn.Module) -> Evaluation:
    """``base`` with the logits of ``head`` and a calibration fitted on those same images; lambda 0."""
    with torch.no_grad():
        gate_logits_NG = head(torch.from_numpy(base.gate_inputs_NR)).numpy()
    calibration = fit_calibration(gate_logits_NG, base.correct_NL)
    decision = GateDecision(base.decision.choices, base.decision.madds, calibration)
    return Evaluation(base.logits_NLK, base.gate_inputs_NR, gate_logits_NG, base.labels_N, decision)


def fit_gate(
    net: Supernet, batches: Batches, hold_out: LabelledImages, spec: InputSpec, recipe: Recipe
) -> GateFit:  # fmt: skip
    """Train every gate of ``recipe.gates``, keep in ``net`` the one that the hold-out prefers.

    Preferred is the best top-1 at ``recipe.operating.compare_at`` of the widest slice's MAdds, among gates
    that choose there; where none does (all slices may be equally right), the best of all, and it is said.
    """
    data = collect(net, batches, recipe.gate_views, first_epoch=1_000_000, bf16=recipe.last_round.bf16)
    base = evaluate(net, hold_out, spec)
    served_G = torch.tensor([float(base.decision.madds[choice]) for choice in net.gate_choices])
    candidates: list[tuple[Evaluation, nn.Module]] = []
    for gate in tqdm(recipe.gates, unit="gate", desc="gate"):
        fresh = fresh_head(net.slimming_head(), recipe.seed)
        head = train_head(fresh, data, served_G / served_G[-1], gate, recipe.seed)
        evaluation = calibrated(base, head)
        evaluation = evaluation.at(at_cost(evaluation, recipe.operating.compare_at))
        tqdm.write(f"{gate}: {summary(evaluation)}")
        candidates.append((evaluation, head))
    if not any(is_alive(evaluation) for evaluation, _ in candidates):
        tqdm.write("warning: every trained gate sends nearly all images to one width")
    evaluation, head = max(candidates, key=lambda c: (is_alive(c[0]), c[0].gate_accuracy))
    net.slimming_head().load_state_dict(head.state_dict())
    points = sweep(evaluation, recipe.operating.cost_shares)
    widest = evaluation.width_accuracy(len(net.ladder) - 1), evaluation.decision.madds[-1]
    default = default_point(points, widest, recipe.operating)
    calibration = evaluation.decision.calibration
    assert calibration is not None, "calibrated above: this is a bug"
    decision = GateDecision(net.gate_choices, evaluation.decision.madds, calibration, points[default].lambda_)
    return GateFit(evaluation.at(decision), calibration, points, default)


def summary(evaluation: Evaluation) -> str:
    """Accuracy, mean cost and shares of the gate in one line."""
    shares = " ".join(f"{share:.3f}" for share in evaluation.gate_shares)
    madds = f"{evaluation.gate_mean_madds / 1e6:.2f} M MAdds"
    return f"top-1 {evaluation.gate_accuracy:.4f}, mean {madds}, shares {shares}"
