"""The double-headed gate: attention head and slimming head over one squeezed vector.

Source: DS-Net (CVPR 2021) section 3.3 and the released code (commit 15cd303): the trunk of both
heads is mean-pool -> 1x1 -> ReLU; the slimming head is one bias-free linear layer over it. In
evaluation the decision is the argmax of the logits. The released code adds Gumbel noise there too;
ours does not, so that a served image always takes the same width.

Shapes: B batch, C channels, R hidden, G gate choices, H height, W width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.layers import SlicedSqueezeExcite


class DoubleHeadedGate(nn.Module):
    """Scales the features (attention head) and says how wide the rest must be (slimming head)."""

    def __init__(self, channels_max: int, hidden: int, choices: int) -> None:
        super().__init__()
        self.attention = SlicedSqueezeExcite(channels_max, hidden)
        self.slimming = nn.Linear(hidden, choices, bias=False)
        nn.init.normal_(self.slimming.weight, 0.0, math.sqrt(2.0 / choices))

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Attended features [B, C, H, W] and the slimming head's input [B, R]."""
        attended: tuple[Tensor, Tensor] = self.attention(x_BCHW)
        return attended

    def logits(self, gate_input_BR: Tensor) -> Tensor:
        """Slimming logits [B, G], one per gate choice; argmax is the decision."""
        logits_BG: Tensor = self.slimming(gate_input_BR)
        return logits_BG


def decide(gate_logits_BG: Tensor) -> Tensor:
    """Index [B] into the gate's choices; deterministic, ties go to the narrower choice."""
    return torch.argmax(gate_logits_BG, dim=1)
