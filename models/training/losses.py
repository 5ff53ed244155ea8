"""Losses of both stages, each with its source. Shapes: B batch, K classes, G gate choices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation(logits_BK: Tensor, teacher_probabilities_BK: Tensor) -> Tensor:
    """Cross-entropy to soft targets: in-place bootstrapping (DS-Net++ abstract; released train loop)."""
    return F.cross_entropy(logits_BK, teacher_probabilities_BK)


def straight_through_gumbel(gate_logits_BG: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """(one-hot choice with the gradient of the softmax, the softmax), both [B, G], temperature 1.

    Source: released ``gumbel_softmax`` (dyn_slim_blocks.py). Training only: a served gate takes the
    argmax without noise.
    """
    uniform = torch.rand(gate_logits_BG.shape, generator=generator).clamp_(1e-9, 1 - 1e-7)
    soft_BG = (gate_logits_BG - (-uniform.log()).log()).softmax(dim=1)
    hard_BG = F.one_hot(soft_BG.argmax(dim=1), soft_BG.shape[1]).to(soft_BG.dtype)
    return hard_BG - soft_BG.detach() + soft_BG, soft_BG


def sandwich_gate_sparsification(
    gate_logits_BG: Tensor, easy_B: Tensor, label_smoothing: float, hard_weight: float = 1.0
) -> Tensor:
    """Easy images (the narrowest choice is right) to the first gate, the others to the last.

    Source: SGS as released (train_epoch_slim_gate). Ours: on logits; the released code passes
    probabilities to a cross-entropy that applies softmax once more. Ours too: ``hard_weight`` is the
    weight of an image that the narrowest choice gets wrong (1 = as released).
    """
    target_B = torch.where(easy_B, 0, gate_logits_BG.shape[1] - 1)
    loss_B = F.cross_entropy(gate_logits_BG, target_B, label_smoothing=label_smoothing, reduction="none")
    return (loss_B * torch.where(easy_B, 1.0, hard_weight)).mean()


def madds_penalty(choice_BG: Tensor, relative_madds_G: Tensor, target: float = 0.0) -> Tensor:
    """Square of the batch-mean MAdds, as a share of the widest choice's, less ``target``.

    Source: released train loop, where the share is MAdds / 1e9 and there is no target.
    """
    return ((choice_BG @ relative_madds_G).mean() - target) ** 2
