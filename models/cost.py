"""MAdds and parameters of a static module, by the published convention.

Convention (released DS-Net counter, commit 15cd303; it reproduces all 14 published figures):
  convolution   in * out * kernel_h * kernel_w * H_out * W_out / groups
  linear        in * out
  average pool  channels * H_in * W_in
  all else      0 (batch norm, activations, biases, the squeeze-excite multiply)

Counted analytically: modules on the ``meta`` device know shapes and hold no numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class SliceCost:
    """MAdds of one image through one slice, and the parameters which that slice uses.

    trunk_madds     everything before the decision, the slimming head excluded.
    slimming_madds  the slimming head alone; spent only when the gate runs.
    body_madds      everything after the decision; 0 for an early exit.
    parameters      active weights, biases and batch-norm affine, the slimming head excluded.
    """

    trunk_madds: int
    slimming_madds: int
    body_madds: int
    parameters: int

    @property
    def published_madds(self) -> int:
        return self.trunk_madds + self.body_madds

    @property
    def served_madds(self) -> int:
        return self.published_madds + self.slimming_madds


def count_madds(module: nn.Module, x: Tensor) -> int:
    """MAdds of ``module(x)`` for the first image of ``x`` (use the meta device: nothing is computed)."""
    total = 0

    def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            kernel = layer.kernel_size[0] * layer.kernel_size[1]
            out_size = output.shape[-2] * output.shape[-1]
            total += layer.in_channels * layer.out_channels * kernel * out_size // layer.groups
        elif isinstance(layer, nn.Linear):
            total += layer.in_features * layer.out_features
        else:
            total += args[0][0].numel()

    counted = [
        m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.AvgPool2d | nn.AdaptiveAvgPool2d)
    ]
    handles = [layer.register_forward_hook(add) for layer in counted]
    try:
        with torch.no_grad():
            module(x)
    finally:
        for handle in handles:
            handle.remove()
    return total


def count_parameters(module: nn.Module) -> int:
    """Elements of all parameters; running statistics are none."""
    return sum(p.numel() for p in module.parameters())
