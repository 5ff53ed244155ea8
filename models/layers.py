"""Sliced layers: shared weights whose leading channels form every narrower sub-network.

The width is an argument of ``forward``, never module state, so that one instance serves every width
at once. Each layer can be materialised into the plain ``torch.nn`` module of one width.

Source: DS-Net (CVPR 2021) sections 3.1-3.2, "dynamic slicing"; facts of the released code
(changlin31/DS-Net, commit 15cd303): bias-free convolutions, statistics per width and one shared
affine in batch norm, squeeze-excite whose hidden size does not change with the width.

Shapes: B batch, C channels, R squeeze-excite hidden channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SlicedConv2d(nn.Module):
    """Bias-free 2-d convolution of which the leading input and output channels are used.

    A depthwise layer (``depthwise=True``) has as many output as input channels and one group each.
    """

    def __init__(self, in_max: int, out_max: int, kernel: int, stride: int = 1, *, depthwise: bool = False) -> None:
        super().__init__()
        if depthwise and in_max != out_max:
            raise ValueError(f"a depthwise layer keeps its channels, got {in_max} -> {out_max}")
        self.kernel, self.stride, self.depthwise = kernel, stride, depthwise
        # "((s - 1) + (k - 1)) // 2", as timm pads symmetric convolutions of stride s and kernel k.
        self.padding = ((stride - 1) + (kernel - 1)) // 2
        self.weight = nn.Parameter(torch.empty(out_max, 1 if depthwise else in_max, kernel, kernel))
        groups = out_max if depthwise else 1
        nn.init.normal_(self.weight, 0.0, math.sqrt(2.0 / (kernel * kernel * out_max / groups)))

    def sliced_weight(self, in_channels: int, out_channels: int) -> Tensor:
        """The leading [out_channels, in_channels / groups, kernel, kernel] of the shared weight."""
        return self.weight[:out_channels, : 1 if self.depthwise else in_channels]

    def forward(self, x_BCHW: Tensor, out_channels: int) -> Tensor:
        in_channels = x_BCHW.shape[1]
        weight = self.sliced_weight(in_channels, out_channels)
        groups = in_channels if self.depthwise else 1
        return F.conv2d(x_BCHW, weight, stride=self.stride, padding=self.padding, groups=groups)

    def materialise(self, in_channels: int, out_channels: int) -> nn.Conv2d:
        """A plain convolution that owns a copy of the slice."""
        conv = nn.Conv2d(
            in_channels, out_channels, self.kernel, self.stride, self.padding,
            groups=in_channels if self.depthwise else 1, bias=False, device=self.weight.device,
        )  # fmt: skip
        conv.weight = nn.Parameter(self.sliced_weight(in_channels, out_channels).detach().clone())
        return conv


class SlicedBatchNorm2d(nn.Module):
    """Batch norm with statistics per width and one affine shared by all (``weight[:C]``).

    The statistics are chosen by the number of channels that arrive, so every allowed width must be
    listed. ``momentum`` is 0.1 in training; calibration sets it per batch.
    """

    def __init__(self, widths: Sequence[int], eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.widths, self.eps, self.momentum = tuple(widths), eps, momentum
        self.weight = nn.Parameter(torch.ones(self.widths[-1]))
        self.bias = nn.Parameter(torch.zeros(self.widths[-1]))
        # Row i holds the statistics of widths[i]; what lies beyond that width stays at (0, 1).
        self.register_buffer("running_mean", torch.zeros(len(self.widths), self.widths[-1]))
        self.register_buffer("running_var", torch.ones(len(self.widths), self.widths[-1]))
        self.running_mean: Tensor
        self.running_var: Tensor

    def reset_running_stats(self) -> None:
        self.running_mean.zero_()
        self.running_var.fill_(1.0)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        channels = x_BCHW.shape[1]
        row = self.widths.index(channels)
        return F.batch_norm(
            x_BCHW, self.running_mean[row, :channels], self.running_var[row, :channels],
            self.weight[:channels], self.bias[:channels], self.training, self.momentum, self.eps,
        )  # fmt: skip

    def materialise(self, channels: int) -> nn.BatchNorm2d:
        """A plain batch norm in eval mode that owns a copy of this width's statistics."""
        row = self.widths.index(channels)
        norm = nn.BatchNorm2d(channels, eps=self.eps, device=self.weight.device).eval()
        norm.weight = nn.Parameter(self.weight[:channels].detach().clone())
        norm.bias = nn.Parameter(self.bias[:channels].detach().clone())
        norm.running_mean = self.running_mean[row, :channels].clone()
        norm.running_var = self.running_var[row, :channels].clone()
        return norm


class SlicedLinear(nn.Module):
    """Fully connected layer with bias of which the leading input features are used."""

    def __init__(self, in_max: int, out_features: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(out_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_max).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x_BC: Tensor) -> Tensor:
        return F.linear(x_BC, self.weight[:, : x_BC.shape[1]], self.bias)

    def materialise(self, in_features: int) -> nn.Linear:
        linear = nn.Linear(in_features, self.weight.shape[0], device=self.weight.device)
        linear.weight = nn.Parameter(self.weight[:, :in_features].detach().clone())
        linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear


class SlicedSqueezeExcite(nn.Module):
    """Squeeze-excite attention: mean over space, 1x1 to R (ReLU), 1x1 back to C (sigmoid), scale.

    R is static; only the sides that touch the C channels are sliced. Weights are kept as matrices
    [out, in] because the convolutions act on 1x1 maps.
    """

    def __init__(self, channels_max: int, hidden: int) -> None:
        super().__init__()
        self.reduce_weight = nn.Parameter(torch.empty(hidden, channels_max).normal_(0.0, math.sqrt(2.0 / hidden)))
        self.reduce_bias = nn.Parameter(torch.zeros(hidden))
        self.expand_weight = nn.Parameter(torch.empty(channels_max, hidden).normal_(0.0, math.sqrt(2.0 / channels_max)))
        self.expand_bias = nn.Parameter(torch.zeros(channels_max))

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled features [B, C, H, W] and the reduced vector [B, R] that a gate can read."""
        channels = x_BCHW.shape[1]
        pooled_BC = x_BCHW.mean((2, 3))
        reduced_BR = F.relu(F.linear(pooled_BC, self.reduce_weight[:, :channels], self.reduce_bias))
        scale_BC = F.linear(reduced_BR, self.expand_weight[:channels], self.expand_bias[:channels]).sigmoid()
        return x_BCHW * scale_BC[:, :, None, None], reduced_BR

    def materialise(self, channels: int) -> SqueezeExcite:
        hidden = self.reduce_bias.shape[0]
        static = SqueezeExcite(channels, hidden, self.reduce_bias.device)
        with torch.no_grad():
            static.reduce.weight.copy_(self.reduce_weight[:, :channels, None, None])
            static.reduce.bias.copy_(self.reduce_bias)  # type: ignore[union-attr]  # built with bias
            static.expand.weight.copy_(self.expand_weight[:channels, :, None, None])
            static.expand.bias.copy_(self.expand_bias[:channels])  # type: ignore[union-attr]  # built with bias
        return static


class SqueezeExcite(nn.Module):
    """The static form of ``SlicedSqueezeExcite``, from modules that cost counting and export know."""

    def __init__(self, channels: int, hidden: int, device: torch.device) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1, device=device)
        self.expand = nn.Conv2d(hidden, channels, 1, device=device)

    def reduced(self, x_BCHW: Tensor) -> Tensor:
        """The hidden vector [B, R, 1, 1] after its ReLU."""
        return F.relu(self.reduce(self.pool(x_BCHW)))

    def excite(self, x_BCHW: Tensor, reduced_BR11: Tensor) -> Tensor:
        scaled_BCHW: Tensor = x_BCHW * self.expand(reduced_BR11).sigmoid()
        return scaled_BCHW

    def forward(self, x_BCHW: Tensor) -> Tensor:
        scaled_BCHW: Tensor = self.excite(x_BCHW, self.reduced(x_BCHW))
        return scaled_BCHW
