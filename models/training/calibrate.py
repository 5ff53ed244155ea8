"""Batch-norm calibration: statistics of every width, measured anew with the final weights.

Source: released ``reset_bn`` pass (augmented training data, train mode, no gradient). Ours: a plain
average over the batches instead of momentum 0.1, and a trunk that is shared is run once per batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from models.layers import SlicedBatchNorm2d
from models.supernet import Supernet


@torch.no_grad()
def calibrate(net: Supernet, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Refresh the statistics of all ladder widths in place; leaves ``net`` in eval mode.

    A teacher wider than the ladder keeps stale trunk statistics, as in the published code; nothing
    serves it.
    """
    norms = [m for m in net.modules() if isinstance(m, SlicedBatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
    net.train()
    for seen, (x, _) in enumerate(batches):
        for norm in norms:
            norm.momentum = 1.0 / (seen + 1)
        output = net.trunk(x)
        for width in range(len(net.ladder)):
            net.answer(output, width)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.eval()
