"""DS-ResNet: basic residual blocks for small images, sliced behind the gate.

The papers name a DS-ResNet (DS-Net, CVPR 2021, arXiv 2103.13258; DS-Net++, arXiv 2109.10060) and
publish neither its widths nor its code, so this form is ours, with the DS-Net rules as far as they are
known: leading channels form every narrower sub-network; batch norm keeps statistics per width and one
affine; everything before the gate has one width.

A stage is a transition (3x3 convolution, batch norm, ReLU, max pool) and basic blocks (He et al. 2016).
The transition changes width and resolution, at the finer resolution, as fast CIFAR networks do (Page
2018, "How to train your ResNet"; Jordan 2024, arXiv 2404.00498): on this budget a convolution before the
pool is worth more than two strided ones after it (docs/adr/0009).

Shortcuts: a basic block keeps width and resolution, so every shortcut is the identity, and a slice of
the block adds the same leading channels that came in. No shortcut has weights.

Gate (ours): as in DS-Net one squeezed vector feeds two heads, an attention that scales the features
and a slimming head that picks the width. The squeeze is not a bare mean, which keeps too little to
tell hard images from easy ones: two strided 3x3 convolutions come before it. A linear classifier over
the vector learns the labels in the first training stage; the slimming head reads how sure that
classifier is (``ConfidenceHead``). Its classes are no answer.

Early exit (ours; the idea is Teerapittayanon et al. 2016, "BranchyNet"): with ``exit_stages`` the squeeze is a
narrow network of its own, and that classifier's answer is slice 0 of the ladder: the trunk alone. What the slimming
head reads is then how sure the narrowest slice is of its own answer, and every wider slice's attention reads the
vector that this answer came from (docs/adr/0015).

Shapes: B batch, C channels, H height, W width, R squeezed vector, G gate choices, K classes.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Self, TypeVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from models.basic_blocks import ConvNorm, Stage
from models.gate import ConfidenceHead
from models.ladder import Ladder, Slice, uniform_ladder
from models.layers import SlicedLinear
from models.stages import NOTHING_ELSE, StageConfig, check_gate_choices, parse_config
from models.supernet import InputShape, StaticSubnet, Supernet, TrunkOutput

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class DsResnetConfig:
    """Everything that fixes the shape of a DS-ResNet.

    trunk         stages of one width each, before the gate. layers: basic blocks; stride: of the pool.
    body          stages that move with the ladder index.
    gate_features length of the squeezed vector. gate_hidden: hidden layer of the slimming head.
    gate_choices  ladder indices the slimming head chooses among, ascending.
    exit_stages   stages of one width each whose pooled output is the squeezed vector, in place of two strided
                  convolutions; with them the ladder has one more slice in front of the body's.
    """

    __pydantic_config__ = NOTHING_ELSE

    input_size: int
    classes: int
    stem_width: int
    trunk: tuple[StageConfig, ...]
    body: tuple[StageConfig, ...]
    gate_features: int
    gate_hidden: int
    gate_choices: tuple[int, ...]
    exit_stages: tuple[StageConfig, ...] = ()

    def __post_init__(self) -> None:
        if not self.trunk or not self.body:
            raise ValueError("trunk and body need at least one stage each")
        wide = [stage.widths for stage in self.trunk + self.exit_stages if len(stage.widths) != 1]
        if wide:
            raise ValueError(f"a stage of trunk or exit has one width, given {wide[0]}")
        check_gate_choices(self.gate_choices, len(self.body[0].widths) + bool(self.exit_stages))
        sizes = (self.stem_width, self.gate_features, self.gate_hidden, *(stage.widths[0] for stage in self._stages))
        if min(sizes) < 1:
            raise ValueError(f"stem_width, gate_features, gate_hidden and stage widths {sizes} must be at least 1")
        if self.classes < 2:
            raise ValueError(f"classes is {self.classes}; it must be at least 2")
        strides = [stage.stride for stage in self._stages]
        if self.input_size < 1 or self.input_size % math.prod(strides):
            raise ValueError(f"input_size is {self.input_size}; it must be a multiple of {math.prod(strides)}")
        if self.exit_stages:
            self._check_exit()

    def _check_exit(self) -> None:
        last, size = self.exit_stages[-1].widths[0], self.input_size // math.prod(stage.stride for stage in self.trunk)
        if self.gate_features != last:
            raise ValueError(f"gate_features is {self.gate_features}; with an exit it is its last width, {last}")
        strides = math.prod(stage.stride for stage in self.exit_stages)
        if size % strides:
            raise ValueError(f"the trunk's features are {size}x{size}; the exit needs a multiple of {strides}")

    @property
    def _stages(self) -> tuple[StageConfig, ...]:
        return self.trunk + self.body


def cifar() -> DsResnetConfig:
    """For 32x32 images and 10 classes: 6 widths, the gate over all of them."""
    return DsResnetConfig(
        input_size=32, classes=10, stem_width=16,
        trunk=(StageConfig((48,), 1, 2),),
        body=(StageConfig((48, 64, 96, 128, 192, 256), 1, 2), StageConfig((80, 96, 128, 160, 192, 256), 1, 2)),
        gate_features=96, gate_hidden=16, gate_choices=(0, 1, 2, 3, 4, 5),
    )  # fmt: skip


def cifar_steep() -> DsResnetConfig:
    """For 32x32 images and 10 classes: 6 widths, the narrow ones cheaper and the widest narrower than in ``cifar``."""
    return replace(
        cifar(),
        body=(StageConfig((24, 40, 64, 96, 128, 192), 1, 2), StageConfig((64, 80, 112, 144, 160, 192), 1, 2)),
    )


def cifar_exit() -> DsResnetConfig:
    """For 32x32 images and 10 classes: 6 slices, the first of them the trunk's early exit."""
    return replace(
        cifar(),
        body=(StageConfig((40, 64, 96, 128, 192), 1, 2), StageConfig((80, 112, 144, 160, 192), 1, 2)),
        gate_features=64,
        exit_stages=(StageConfig((32,), 1, 2), StageConfig((64,), 1, 2)),
    )


def tiny() -> DsResnetConfig:
    """The same for tests and demonstrations: 3 widths, some tens of thousands of parameters."""
    return DsResnetConfig(
        input_size=32, classes=10, stem_width=8,
        trunk=(StageConfig((16,), 1, 4),),
        body=(StageConfig((12, 24, 40), 1, 2), StageConfig((16, 32, 56), 1, 2)),
        gate_features=24, gate_hidden=8, gate_choices=(0, 1, 2),
    )  # fmt: skip


class SqueezeGate(nn.Module):
    """Squeezed vector of the trunk's features, and what reads it: attention, classifier, slimming head."""

    def __init__(self, config: DsResnetConfig) -> None:
        super().__init__()
        channels, features = config.trunk[-1].widths[0], config.gate_features
        self.exit_widths = tuple(stage.widths[0] for stage in config.exit_stages)
        if config.exit_stages:
            in_widths = (channels, *self.exit_widths)
            self.exit = nn.ModuleList(Stage(w, stage) for w, stage in zip(in_widths, config.exit_stages, strict=False))
        else:
            self.squeeze1 = ConvNorm(channels, (features,), stride=2)
            self.squeeze2 = ConvNorm(features, (features,), stride=2)
        self.attention = nn.Linear(features, channels)
        self.classifier = SlicedLinear(features, config.classes)
        self.slimming = ConfidenceHead(config.classes, config.gate_hidden, len(config.gate_choices))

    def _squeezed(self, x_BCHW: Tensor) -> Tensor:
        if self.exit_widths:
            for stage, channels in zip(self.exit, self.exit_widths, strict=True):
                x_BCHW = stage(x_BCHW, channels)
        else:
            features = self.squeeze1.norm.widths[-1]
            x_BCHW = F.relu(self.squeeze2(F.relu(self.squeeze1(x_BCHW, features)), features))
        return x_BCHW.mean((2, 3))

    def forward(self, x_BCHW: Tensor) -> TrunkOutput:
        squeezed_BR = self._squeezed(x_BCHW)
        scale_BC = self.attention(squeezed_BR).sigmoid()
        return TrunkOutput(x_BCHW * scale_BC[:, :, None, None], self.classifier(squeezed_BR))

    def materialise_squeeze(self) -> nn.Sequential:
        channels, features = self.attention.out_features, self.attention.in_features
        layers: list[nn.Module] = []
        if self.exit_widths:
            for stage, width in zip(self.exit, self.exit_widths, strict=True):
                layers += cast(Stage, stage).materialise(channels, width)
                channels = width
        else:
            first, second = self.squeeze1.materialise(channels, features), self.squeeze2.materialise(features, features)
            layers += [*first, nn.ReLU(), *second, nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class StaticTrunk(nn.Module):
    """The trunk of every static sub-network, from standard modules."""

    def __init__(self, layers: nn.Sequential, gate: SqueezeGate) -> None:
        super().__init__()
        self.layers, self.squeeze, self.attention = layers, gate.materialise_squeeze(), _copy(gate.attention)
        self.classifier = gate.classifier.materialise(gate.attention.in_features)

    def forward(self, x_BCHW: Tensor) -> TrunkOutput:
        y_BCHW = self.layers(x_BCHW)
        squeezed_BR = self.squeeze(y_BCHW)
        scale_BC = self.attention(squeezed_BR).sigmoid()
        return TrunkOutput(y_BCHW * scale_BC[:, :, None, None], self.classifier(squeezed_BR))


class DsResnet(Supernet):
    """The DS-ResNet supernet. A slice's extents are the channels of (body stage 0, body stage 1, ...), 0 at an exit."""

    architecture = "ds_resnet"

    def __init__(self, config: DsResnetConfig) -> None:
        super().__init__()
        self.config = config
        self.ladder = _ladder(config)
        self.gate_choices = config.gate_choices
        self.input_shape = InputShape(3, config.input_size, config.input_size)
        self.classes = config.classes
        self.stem = ConvNorm(3, (config.stem_width,))
        in_widths = [config.stem_width, *(stage.widths[-1] for stage in config.trunk + config.body)]
        stages = [Stage(in_max, stage) for in_max, stage in zip(in_widths, config.trunk + config.body, strict=False)]
        self.trunk_stages = nn.ModuleList(stages[: len(config.trunk)])
        self.body_stages = nn.ModuleList(stages[len(config.trunk) :])
        self.gate = SqueezeGate(config)
        self.classifier = SlicedLinear(config.body[-1].widths[-1], config.classes)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(parse_config(DsResnetConfig, config, cls.architecture))

    def config_dict(self) -> dict[str, Any]:
        return asdict(self.config)

    def trunk(self, x: Tensor) -> TrunkOutput:
        y_BCHW = F.relu(self.stem(x, self.config.stem_width))
        for stage, config in zip(self.trunk_stages, self.config.trunk, strict=True):
            y_BCHW = stage(y_BCHW, config.widths[0])
        output: TrunkOutput = self.gate(y_BCHW)
        return output

    def gate_logits(self, gate_input: Tensor) -> Tensor:
        logits_BG: Tensor = self.gate.slimming(gate_input)
        return logits_BG

    def slimming_head(self) -> nn.Module:
        return self.gate.slimming

    def gate_class_logits(self, gate_input: Tensor) -> Tensor | None:
        return None if self.has_exit else gate_input

    def body(self, features: Tensor, width: int) -> Tensor:
        for stage, channels in zip(self.body_stages, self.ladder[width].extents, strict=True):
            features = stage(features, int(channels))
        logits_BK: Tensor = self.classifier(features.mean((2, 3)))
        return logits_BK

    @property
    def has_exit(self) -> bool:
        return bool(self.config.exit_stages)

    def subnet(self, width: int) -> StaticSubnet:
        body = None if self.has_exit and width == 0 else self._static_body(self.ladder[width])
        return StaticSubnet(self._static_trunk(), _copy(self.gate.slimming), body)

    def _static_trunk(self) -> StaticTrunk:
        channels = self.config.stem_width
        layers: list[nn.Module] = [*self.stem.materialise(3, channels), nn.ReLU()]
        for stage, config in zip(self.trunk_stages, self.config.trunk, strict=True):
            layers += cast(Stage, stage).materialise(channels, config.widths[0])
            channels = config.widths[0]
        return StaticTrunk(nn.Sequential(*layers), self.gate)

    def _static_body(self, sub: Slice) -> nn.Sequential:
        channels = self.config.trunk[-1].widths[0]
        layers: list[nn.Module] = []
        for stage, extent in zip(self.body_stages, sub.extents, strict=True):
            layers += cast(Stage, stage).materialise(channels, int(extent))
            channels = int(extent)
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.classifier.materialise(channels)]
        return nn.Sequential(*layers)


def _ladder(config: DsResnetConfig) -> Ladder:
    body = uniform_ladder([stage.widths for stage in config.body], [False] * len(config.body))
    if not config.exit_stages:
        return body
    return (Slice(0, (0,) * len(config.body)), *(replace(sub, index=sub.index + 1) for sub in body))


def _copy(module: M) -> M:
    """A copy that shares no memory, in the same mode, with plain parameters."""
    return copy.deepcopy(module)
