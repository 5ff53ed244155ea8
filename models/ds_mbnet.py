"""DS-MBNet: a MobileNetV1-like supernet sliced in its last two stages.

Source: DS-Net (CVPR 2021, arXiv 2103.13258); topology, widths and initialisation as measured on
the released ``slimmable_mbnet_v1_bn_uniform`` (changlin31/DS-Net, commit 15cd303). Block =
depthwise 3x3, BN, Swish, squeeze-excite, pointwise 1x1, BN, Swish; no residuals, no head
convolution. The gate is the squeeze-excite of the gated stage's first block: it reads the depthwise
output at fixed width, and the width takes effect at that block's pointwise convolution. The cut
between trunk and body lies exactly there.

``cifar()`` is our own form for 32x32 images: stride-1 stem, a trunk of one width (so the teacher is
the widest slice), 8 widths.

Shapes: B batch, C channels, H height, W width, R gate hidden, G gate choices, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Self, cast

import torch.nn.functional as F
from torch import Tensor, nn

from models.gate import DoubleHeadedGate
from models.ladder import Slice, make_divisible, uniform_ladder
from models.layers import SlicedBatchNorm2d, SlicedConv2d, SlicedLinear, SlicedSqueezeExcite, SqueezeExcite
from models.stages import NOTHING_ELSE, StageConfig, check_gate_choices, parse_config
from models.supernet import InputShape, StaticSubnet, Supernet, TrunkOutput

BN_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class DsMbnetConfig:
    """Everything that fixes the shape of a DS-MBNet.

    gated_stage   index into ``stages``; it and every later stage move with the ladder index, the
                  stem and earlier stages always run at their first width.
    gate_choices  ladder indices the slimming head chooses among, ascending.
    """

    __pydantic_config__ = NOTHING_ELSE

    input_size: int
    classes: int
    stem_widths: tuple[int, ...]
    stem_stride: int
    stages: tuple[StageConfig, ...]
    gated_stage: int
    gate_choices: tuple[int, ...]
    se_ratio: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.gated_stage < len(self.stages):
            raise ValueError(f"gated_stage is {self.gated_stage}; allowed: 0..{len(self.stages) - 1}")
        check_gate_choices(self.gate_choices, len(self.stages[self.gated_stage].widths))
        if min(self.input_size, self.classes, self.stem_stride) < 1 or self.se_ratio <= 0:
            raise ValueError(
                f"input_size {self.input_size}, classes {self.classes} and stem_stride {self.stem_stride} must be at "
                f"least 1, se_ratio {self.se_ratio} above 0"
            )


def imagenet14() -> DsMbnetConfig:
    """The published 14-width form: 224x224, 1000 classes, gate over the 4 slimmest (DS-MBNet-S)."""
    return DsMbnetConfig(
        input_size=224, classes=1000, stem_widths=(16, 24), stem_stride=2,
        stages=(
            StageConfig((32, 88), 1, 1),
            StageConfig((48, 168), 2, 2),
            StageConfig((96, 264), 2, 2),
            StageConfig(tuple(range(224, 641, 32)), 6, 2),
            StageConfig(tuple(range(736, 1153, 32)), 2, 2),
        ),
        gated_stage=3, gate_choices=(0, 1, 2, 3),
    )  # fmt: skip


def cifar() -> DsMbnetConfig:
    """Ours, for CIFAR-10: 32x32, 8 widths, gate over 4 of them."""
    return DsMbnetConfig(
        input_size=32, classes=10, stem_widths=(16,), stem_stride=1,
        stages=(
            StageConfig((32,), 1, 1),
            StageConfig((48,), 2, 2),
            StageConfig(tuple(range(64, 289, 32)), 4, 2),
            StageConfig(tuple(range(96, 433, 48)), 2, 2),
        ),
        gated_stage=2, gate_choices=(0, 2, 4, 7),
    )  # fmt: skip


class Spatial(nn.Module):
    """First half of a block: depthwise, BN, Swish, then an attention that keeps the channels."""

    def __init__(self, widths: tuple[int, ...], stride: int, attention: nn.Module) -> None:
        super().__init__()
        self.conv = SlicedConv2d(widths[-1], widths[-1], 3, stride, depthwise=True)
        self.norm = SlicedBatchNorm2d(widths, BN_EPS)
        self.attention = attention

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        attended: tuple[Tensor, Tensor] = self.attention(F.silu(self.norm(self.conv(x_BCHW, x_BCHW.shape[1]))))
        return attended

    def materialise(self, channels: int) -> tuple[nn.Sequential, SqueezeExcite]:
        conv = nn.Sequential(self.conv.materialise(channels, channels), self.norm.materialise(channels), nn.SiLU())
        squeeze_excite = self.attention.attention if isinstance(self.attention, DoubleHeadedGate) else self.attention
        assert isinstance(squeeze_excite, SlicedSqueezeExcite), "built with one: this is a bug"
        return conv, squeeze_excite.materialise(channels)


class Pointwise(nn.Module):
    """Second half of a block: 1x1 convolution, BN, Swish; this is where the width changes."""

    def __init__(self, in_max: int, widths: tuple[int, ...], kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = SlicedConv2d(in_max, widths[-1], kernel, stride)
        self.norm = SlicedBatchNorm2d(widths, BN_EPS)

    def forward(self, x_BCHW: Tensor, out_channels: int) -> Tensor:
        return F.silu(self.norm(self.conv(x_BCHW, out_channels)))

    def materialise(self, in_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(
            self.conv.materialise(in_channels, out_channels), self.norm.materialise(out_channels), nn.SiLU()
        )


class Block(nn.Module):
    """Depthwise-separable block; ``stage`` says which extent of the slice sets its output width."""

    def __init__(
        self, stage: int, in_widths: tuple[int, ...], widths: tuple[int, ...], stride: int, attention: nn.Module
    ) -> None:
        super().__init__()
        self.stage = stage
        self.spatial = Spatial(in_widths, stride, attention)
        self.pointwise = Pointwise(in_widths[-1], widths)

    def forward(self, x_BCHW: Tensor, out_channels: int) -> Tensor:
        y_BCHW: Tensor = self.pointwise(self.spatial(x_BCHW)[0], out_channels)
        return y_BCHW

    def materialise(self, in_channels: int, out_channels: int) -> nn.Sequential:
        conv, squeeze_excite = self.spatial.materialise(in_channels)
        return nn.Sequential(*conv, squeeze_excite, *self.pointwise.materialise(in_channels, out_channels))


class StaticTrunk(nn.Module):
    """The trunk of a static sub-network: layers, then the gate's squeeze-excite, both outputs kept."""

    def __init__(self, layers: nn.Sequential, attention: SqueezeExcite) -> None:
        super().__init__()
        self.layers, self.attention = layers, attention

    def forward(self, x_BCHW: Tensor) -> TrunkOutput:
        y_BCHW = self.layers(x_BCHW)
        reduced_BR11 = self.attention.reduced(y_BCHW)
        return TrunkOutput(self.attention.excite(y_BCHW, reduced_BR11), reduced_BR11.flatten(1))


class DsMbnet(Supernet):
    """The DS-MBNet supernet. A slice's extents are the channels of (stem, stage 0, stage 1, ...)."""

    architecture = "ds_mbnet"

    def __init__(self, config: DsMbnetConfig) -> None:
        super().__init__()
        self.config = config
        stage_widths = [config.stem_widths, *(s.widths for s in config.stages)]
        self.ladder = uniform_ladder(stage_widths, [i <= config.gated_stage for i in range(len(stage_widths))])
        self.gate_choices = config.gate_choices
        self.input_shape = InputShape(3, config.input_size, config.input_size)
        self.classes = config.classes
        self.teacher = Slice(len(self.ladder), tuple(w[-1] for w in stage_widths))
        self.stem = Pointwise(3, config.stem_widths, kernel=3, stride=config.stem_stride)
        self.blocks = nn.ModuleList(self._build_blocks())
        self.cut = sum(s.layers for s in config.stages[: config.gated_stage])
        self.classifier = SlicedLinear(config.stages[-1].widths[-1], config.classes)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(parse_config(DsMbnetConfig, config, cls.architecture))

    def config_dict(self) -> dict[str, Any]:
        return asdict(self.config)

    def _build_blocks(self) -> Iterable[Block]:
        config, in_widths = self.config, self.config.stem_widths
        for index, stage in enumerate(config.stages):
            for layer in range(stage.layers):
                hidden = make_divisible(in_widths[-1] * config.se_ratio)
                gated = index == config.gated_stage and layer == 0
                attention: nn.Module = (
                    DoubleHeadedGate(in_widths[-1], hidden, len(config.gate_choices))
                    if gated
                    else SlicedSqueezeExcite(in_widths[-1], hidden)
                )
                yield Block(index + 1, in_widths, stage.widths, stage.stride if layer == 0 else 1, attention)
                in_widths = stage.widths

    def _blocks(self, start: int, stop: int) -> Iterable[Block]:
        return (cast(Block, self.blocks[index]) for index in range(start, stop))

    @property
    def gated_block(self) -> Block:
        return cast(Block, self.blocks[self.cut])

    @property
    def gate(self) -> DoubleHeadedGate:
        return cast(DoubleHeadedGate, self.gated_block.spatial.attention)

    @property
    def has_wide_trunk(self) -> bool:
        return self.teacher.extents != self.ladder[-1].extents

    def trunk(self, x: Tensor) -> TrunkOutput:
        return self._trunk(x, self.ladder[0])

    def gate_logits(self, gate_input: Tensor) -> Tensor:
        return self.gate.logits(gate_input)

    def slimming_head(self) -> nn.Linear:
        return self.gate.slimming

    def body(self, features: Tensor, width: int) -> Tensor:
        return self._body(features, self.ladder[width])

    def largest(self, x: Tensor) -> Tensor:
        return self._body(self._trunk(x, self.teacher).features, self.teacher)

    def _trunk(self, x_BCHW: Tensor, sub: Slice) -> TrunkOutput:
        y_BCHW = self.stem(x_BCHW, sub.extents[0])
        for block in self._blocks(0, self.cut):
            y_BCHW = block(y_BCHW, sub.extents[block.stage])
        return TrunkOutput(*self.gated_block.spatial(y_BCHW))

    def _body(self, features_BCHW: Tensor, sub: Slice) -> Tensor:
        y_BCHW = self.gated_block.pointwise(features_BCHW, sub.extents[self.gated_block.stage])
        for block in self._blocks(self.cut + 1, len(self.blocks)):
            y_BCHW = block(y_BCHW, sub.extents[block.stage])
        logits_BK: Tensor = self.classifier(y_BCHW.mean((2, 3)))
        return logits_BK

    def subnet(self, width: int) -> StaticSubnet:
        extents = [int(e) for e in self.ladder[width].extents]
        channels = extents[0]
        trunk: list[nn.Module] = [*self.stem.materialise(3, channels)]
        body: list[nn.Module] = []
        for index, block in enumerate(self._blocks(0, len(self.blocks))):
            out_channels = extents[block.stage]
            if index == self.cut:
                conv, attention = block.spatial.materialise(channels)
                trunk += [*conv]
                body += [*block.pointwise.materialise(channels, out_channels)]
            else:
                (trunk if index < self.cut else body).extend(block.materialise(channels, out_channels))
            channels = out_channels
        body += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.classifier.materialise(channels)]
        choices, hidden = self.gate.slimming.weight.shape
        slimming = nn.Linear(hidden, choices, bias=False, device=self.gate.slimming.weight.device)
        slimming.weight = nn.Parameter(self.gate.slimming.weight.detach().clone())
        return StaticSubnet(StaticTrunk(nn.Sequential(*trunk), attention), slimming, nn.Sequential(*body))
