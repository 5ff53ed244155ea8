"""Basic residual blocks whose leading channels form narrower ones, and stages of them (DS-ResNet, docs/adr/0009).

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import SlicedBatchNorm2d, SlicedConv2d
from models.stages import StageConfig

BN_EPS = 1e-5


def _conv(in_max: int, out_max: int, stride: int = 1) -> SlicedConv2d:
    """A 3x3 convolution that begins small, as torch.nn's does (uniform, 1 / sqrt(fan_in)).

    Behind batch norm a weight's size only divides its learning rate, and He's larger one makes short
    schedules crawl: weight decay needs more epochs than there are to shrink it (docs/adr/0009).
    """
    conv = SlicedConv2d(in_max, out_max, 3, stride)
    nn.init.kaiming_uniform_(conv.weight, a=math.sqrt(5))
    return conv


class StaticBlock(nn.Module):
    """One width of a basic block, from standard modules."""

    def __init__(self, residual: nn.Sequential) -> None:
        super().__init__()
        self.residual = residual

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(x_BCHW + self.residual(x_BCHW))


class ConvNorm(nn.Module):
    """3x3 convolution and batch norm; this is where a width may change."""

    def __init__(self, in_max: int, widths: tuple[int, ...], stride: int = 1) -> None:
        super().__init__()
        self.conv = _conv(in_max, widths[-1], stride)
        self.norm = SlicedBatchNorm2d(widths, BN_EPS)

    def forward(self, x_BCHW: Tensor, out_channels: int) -> Tensor:
        y_BCHW: Tensor = self.norm(self.conv(x_BCHW, out_channels))
        return y_BCHW

    def materialise(self, in_channels: int, out_channels: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        return self.conv.materialise(in_channels, out_channels), self.norm.materialise(out_channels)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an identity shortcut, at the width that arrives."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.first = ConvNorm(widths[-1], widths)
        self.second = ConvNorm(widths[-1], widths)
        nn.init.zeros_(self.second.norm.weight)  # a block begins as its shortcut (Goyal et al. 2017, section 5.1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        channels = x_BCHW.shape[1]
        return F.relu(x_BCHW + self.second(F.relu(self.first(x_BCHW, channels)), channels))

    def materialise(self, channels: int) -> StaticBlock:
        first, second = (layer.materialise(channels, channels) for layer in (self.first, self.second))
        return StaticBlock(nn.Sequential(*first, nn.ReLU(), *second))


class Stage(nn.Module):
    """Transition to the stage's width and resolution, then basic blocks."""

    def __init__(self, in_max: int, config: StageConfig) -> None:
        super().__init__()
        self.pool = config.stride
        self.transition = ConvNorm(in_max, config.widths)
        self.blocks = nn.ModuleList(BasicBlock(config.widths) for _ in range(config.layers))

    def forward(self, x_BCHW: Tensor, out_channels: int) -> Tensor:
        x_BCHW = F.max_pool2d(F.relu(self.transition(x_BCHW, out_channels)), self.pool)
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        return x_BCHW

    def materialise(self, in_channels: int, out_channels: int) -> list[nn.Module]:
        blocks = [cast(BasicBlock, block).materialise(out_channels) for block in self.blocks]
        return [*self.transition.materialise(in_channels, out_channels), nn.ReLU(), nn.MaxPool2d(self.pool), *blocks]
