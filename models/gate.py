"""The double-headed gate: attention head and slimming head over one squeezed vector.

Source: DS-Net (CVPR 2021) section 3.3 and the released code (commit 15cd303): the trunk of both
heads is mean-pool -> 1x1 -> ReLU; the slimming head is one bias-free linear layer over it. The
released code adds Gumbel noise in evaluation too; ours does not, so that a served image always takes
the same width (models/decision.py turns logits into one).

Shapes: B batch, C channels, R hidden, G gate choices, H height, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
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


class ConfidenceHead(nn.Module):
    """A slimming head that reads how sure a classifier is, and nothing else (ours).

    Where a classifier on the trunk's features is unsure, the image is hard. Its three greatest log
    probabilities and its entropy say that in a form that means the same on images never trained on; a
    head over the features themselves learns the training images instead (docs/adr/0008).

    Input [B, K] class logits of that classifier, at least 2 classes; output slimming logits [B, G].
    """

    LIKELIEST = 3

    def __init__(self, classes: int, hidden: int, choices: int) -> None:
        super().__init__()
        self.likeliest = min(self.LIKELIEST, classes)
        self.hidden = nn.Linear(self.likeliest + 1, hidden)
        self.choices = nn.Linear(hidden, choices)

    def forward(self, class_logits_BK: Tensor) -> Tensor:
        log_p_BK = class_logits_BK.log_softmax(dim=1)
        entropy_B1 = -(log_p_BK.exp() * log_p_BK).sum(dim=1, keepdim=True)
        likeliest_BT = log_p_BK.topk(self.likeliest, dim=1).values
        logits_BG: Tensor = self.choices(F.relu(self.hidden(torch.cat([likeliest_BT, entropy_B1], dim=1))))
        return logits_BG
