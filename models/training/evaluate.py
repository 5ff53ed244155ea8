"""Accuracy per width and of the gate, with every image's logits kept.

Shapes: N images, L ladder length, K classes, G gate choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from models.gate import decide
from models.supernet import Supernet
from models.training.data import Batches, LabelledImages
from models.transform import F32, InputSpec

BATCH_SIZE = 250


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What every slice and the gate say of every image.

    logits_NLK float32, gate_logits_NG float32, labels_N int64, gate_widths_N the served ladder index.
    served_madds  per ladder index, the slimming head included.
    """

    logits_NLK: F32
    gate_logits_NG: F32
    labels_N: NDArray[np.int64]
    gate_widths_N: NDArray[np.int64]
    served_madds: tuple[int, ...]

    @property
    def correct_NL(self) -> NDArray[np.bool_]:
        correct_NL: NDArray[np.bool_] = self.logits_NLK.argmax(2) == self.labels_N[:, None]
        return correct_NL

    def width_accuracy(self, width: int) -> float:
        """Top-1 of one slice over all images."""
        return float(self.correct_NL[:, width].mean())

    @property
    def gate_accuracy(self) -> float:
        """Top-1 when every image takes the width that the gate wishes."""
        return float(self.correct_NL[np.arange(len(self.labels_N)), self.gate_widths_N].mean())

    @property
    def gate_mean_madds(self) -> float:
        """Mean served MAdds per image under the gate."""
        return float(np.asarray(self.served_madds)[self.gate_widths_N].mean())

    def gate_shares(self, choices: tuple[int, ...]) -> tuple[float, ...]:
        """Share of the images that the gate sends to each of its choices."""
        return tuple(float((self.gate_widths_N == width).mean()) for width in choices)


@torch.no_grad()
def evaluate(net: Supernet, images: LabelledImages, spec: InputSpec, progress: str | None = None) -> Evaluation:
    """Run every image through the trunk once and through every body; ``net`` must be in eval mode."""
    logits, gate_logits = [], []
    batches = Batches(images, spec, BATCH_SIZE, seed=0, padding=0)
    total = -(-len(images) // BATCH_SIZE)
    for x, _ in tqdm(batches.in_order(), desc=progress, total=total, disable=progress is None):
        features, gate_input = net.trunk(x)
        gate_logits.append(net.gate_logits(gate_input))
        logits.append(torch.stack([net.body(features, width) for width in range(len(net.ladder))], dim=1))
    gate_logits_NG = torch.cat(gate_logits)
    widths_N = torch.tensor(net.gate_choices)[decide(gate_logits_NG)]
    return Evaluation(
        torch.cat(logits).numpy(), gate_logits_NG.numpy(), images.labels, widths_N.numpy(),
        tuple(cost.served_madds for cost in net.costs()),
    )  # fmt: skip
