"""Stage II: the slimming head alone, on a frozen supernet.

Source (released train_epoch_slim_gate): loss = SGS + task loss through a straight-through Gumbel
choice + weighted MAdds loss, over the slimming head's parameters only. Ours: since everything but
the head is frozen, its inputs and the logits of every choice are computed once for a few augmented
views and the head trains on those; the task loss mixes the choices' logits instead of masking every
layer; hard images may weigh more in SGS, because they are few; the hold-out chooses that weight.

Shapes: N views, R gate hidden, G gate choices, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models.supernet import Supernet
from models.training.data import Batches, LabelledImages
from models.training.evaluate import Evaluation, evaluate
from models.training.losses import madds_penalty, sandwich_gate_sparsification, straight_through_gumbel
from models.training.recipes import GateRecipe
from models.transform import InputSpec

LEAST_SHARE = 0.05
"""A gate must send at least two widths this share of the hold-out: one that never chooses is none."""


@dataclass(frozen=True, slots=True)
class GateData:
    """inputs_NR, logits_NGK (one row per gate choice), labels_N."""

    inputs_NR: Tensor
    logits_NGK: Tensor
    labels_N: Tensor


@torch.no_grad()
def collect(net: Supernet, batches: Batches, views: int, first_epoch: int) -> GateData:
    """Run ``views`` augmented epochs through the frozen supernet."""
    inputs, logits, labels = [], [], []
    net.eval()
    with tqdm(total=views * len(batches), unit="step", desc="gate inputs") as bar:
        for view in range(views):
            for x, y in batches.epoch(first_epoch + view):
                features, gate_input = net.trunk(x)
                inputs.append(gate_input)
                logits.append(torch.stack([net.body(features, width) for width in net.gate_choices], dim=1))
                labels.append(y)
                bar.update()
    return GateData(torch.cat(inputs), torch.cat(logits), torch.cat(labels))


def train_head(
    data: GateData, relative_madds_G: Tensor, recipe: GateRecipe, hard_weight: float, seed: int
) -> nn.Linear:
    """A slimming head trained on collected data. relative_madds_G: served MAdds over the widest choice's."""
    generator = torch.Generator().manual_seed(seed)
    choices = data.logits_NGK.shape[1]
    head = nn.Linear(data.inputs_NR.shape[1], choices, bias=False)
    nn.init.normal_(head.weight, 0.0, math.sqrt(2.0 / choices), generator=generator)
    optimizer = torch.optim.SGD(head.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    count = len(data.labels_N)
    steps = recipe.epochs * (count // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    easy_N = data.logits_NGK[:, 0].argmax(1) == data.labels_N
    for _ in range(recipe.epochs):
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - recipe.batch_size + 1, recipe.batch_size):
            chosen = order[start : start + recipe.batch_size]
            gate_logits_BG = head(data.inputs_NR[chosen])
            choice_BG, _ = straight_through_gumbel(gate_logits_BG, generator)
            mixed_BK = torch.einsum("bg,bgk->bk", choice_BG, data.logits_NGK[chosen])
            loss = (
                sandwich_gate_sparsification(gate_logits_BG, easy_N[chosen], recipe.label_smoothing, hard_weight)
                + F.cross_entropy(mixed_BK, data.labels_N[chosen], label_smoothing=recipe.label_smoothing)
                + recipe.madds_weight * madds_penalty(choice_BG, relative_madds_G)
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            schedule.step()
    return head


def is_alive(evaluation: Evaluation, choices: tuple[int, ...]) -> bool:
    """True when at least two widths get at least LEAST_SHARE of the images."""
    return sum(share >= LEAST_SHARE for share in evaluation.gate_shares(choices)) >= 2


def fit_gate(
    net: Supernet, batches: Batches, hold_out: LabelledImages, spec: InputSpec, recipe: GateRecipe, seed: int
) -> Evaluation:
    """Train the slimming head in place; returns its evaluation on the hold-out.

    Of the candidates whose hold-out accuracy is at most ``tolerated_drop`` below the widest slice's,
    the one with the least mean MAdds wins; when none is, the most accurate. Raises RuntimeError when
    no candidate uses two widths.
    """
    data = collect(net, batches, recipe.views, first_epoch=1_000_000)
    costs = net.costs()
    served = torch.tensor([float(costs[width].served_madds) for width in net.gate_choices])
    gate = net.slimming_head()
    candidates = []
    for hard_weight in tqdm(recipe.hard_weights, unit="gate", desc="gate"):
        head = train_head(data, served / served[-1], recipe, hard_weight, seed)
        with torch.no_grad():
            gate.weight.copy_(head.weight)
        evaluation = evaluate(net, hold_out, spec)
        tqdm.write(
            f"hard_weight {hard_weight:g}: hold-out top-1 {evaluation.gate_accuracy:.4f}, mean "
            f"{evaluation.gate_mean_madds / 1e6:.2f} M MAdds, shares "
            + " ".join(f"{share:.3f}" for share in evaluation.gate_shares(net.gate_choices))
        )
        if is_alive(evaluation, net.gate_choices):
            candidates.append((evaluation, head.weight.detach().clone()))
    if not candidates:
        raise RuntimeError("every trained gate sends nearly all images to one width; change the gate recipe")
    bar = candidates[0][0].width_accuracy(len(net.ladder) - 1) - recipe.tolerated_drop
    good = [c for c in candidates if c[0].gate_accuracy >= bar]
    chosen = (
        min(good, key=lambda c: c[0].gate_mean_madds) if good else max(candidates, key=lambda c: c[0].gate_accuracy)
    )
    with torch.no_grad():
        gate.weight.copy_(chosen[1])
    return chosen[0]
