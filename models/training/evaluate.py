"""Accuracy per width and of the gate, with every image's logits kept.

Shapes: N images, L ladder length, K classes, G gate choices, R gate input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from models.decision import GateDecision, shares
from models.supernet import Supernet
from models.training.data import Batches, LabelledImages
from models.transform import F32, InputSpec

BATCH_SIZE = 250


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What every slice and the gate say of every image.

    logits_NLK float32, gate_inputs_NR float32, gate_logits_NG float32, labels_N int64.
    decision  turns gate logits into widths; ``at`` gives the same evaluation under another.
    """

    logits_NLK: F32
    gate_inputs_NR: F32
    gate_logits_NG: F32
    labels_N: NDArray[np.int64]
    decision: GateDecision

    def __len__(self) -> int:
        return len(self.labels_N)

    def at(self, decision: GateDecision) -> Self:
        """The same answers, another rule of the gate."""
        return replace(self, decision=decision)

    @property
    def correct_NL(self) -> NDArray[np.bool_]:
        correct_NL: NDArray[np.bool_] = self.logits_NLK.argmax(2) == self.labels_N[:, None]
        return correct_NL

    @property
    def gate_widths_N(self) -> NDArray[np.int64]:
        """Ladder index that the gate wishes for each image."""
        return self.decision.widths(self.gate_logits_NG)

    @property
    def gate_correct_N(self) -> NDArray[np.bool_]:
        """Whether each image is right at the gate's width."""
        return self.correct_NL[np.arange(len(self)), self.gate_widths_N]

    def width_accuracy(self, width: int) -> float:
        """Top-1 of one slice over all images."""
        return float(self.correct_NL[:, width].mean())

    @property
    def gate_accuracy(self) -> float:
        """Top-1 when every image takes the width that the gate wishes."""
        return float(self.gate_correct_N.mean())

    @property
    def gate_mean_madds(self) -> float:
        """Mean served MAdds per image under the gate."""
        return float(np.asarray(self.decision.madds)[self.gate_widths_N].mean())

    @property
    def gate_shares(self) -> tuple[float, ...]:
        """Share of the images that the gate sends to each of its choices."""
        return shares(self.gate_widths_N, self.decision.choices)


@torch.no_grad()
def evaluate(
    net: Supernet,
    images: LabelledImages,
    spec: InputSpec,
    decision: GateDecision | None = None,
    progress: str | None = None,
) -> Evaluation:
    """Run every image through the trunk once and through every body, in float32.

    ``net`` must be in eval mode. Without a decision the greatest gate logit wins.
    """
    logits, gate_inputs, gate_logits = [], [], []
    device = next(net.parameters()).device
    batches = Batches(images, spec, BATCH_SIZE, seed=0, padding=0)
    total = -(-len(images) // BATCH_SIZE)
    for x, _ in tqdm(batches.in_order(), desc=progress, total=total, disable=progress is None):
        seen = net.trunk(x.to(device))
        gate_inputs.append(seen.gate_input.cpu())
        gate_logits.append(net.gate_logits(seen.gate_input).cpu())
        logits.append(torch.stack([net.answer(seen, width) for width in range(len(net.ladder))], dim=1).cpu())
    if decision is None:
        decision = GateDecision(net.gate_choices, tuple(cost.served_madds for cost in net.costs()))
    return Evaluation(
        torch.cat(logits).numpy(), torch.cat(gate_inputs).numpy(), torch.cat(gate_logits).numpy(), images.labels,
        decision,
    )  # fmt: skip
