"""What every architecture keeps, so that engine, scheduler and API never name one.

A supernet is cut once, at the gate's decision: ``trunk`` runs for every image, ``body`` at the
chosen width. The width is an index into the ladder. What a slice cuts (channels, heads, tokens) is
the architecture's own business: its features may have any shape, as long as images are rows.

Shapes: B batch, K classes, G gate choices, R gate hidden.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from models.cost import SliceCost, count_madds, count_parameters
from models.ladder import Ladder


class TrunkOutput(NamedTuple):
    """features: [B, ...] for the body, the same for every width. gate_input: [B, R]."""

    features: Tensor
    gate_input: Tensor


@dataclass(frozen=True, slots=True)
class InputShape:
    """Channels and pixels of the network input."""

    channels: int
    height: int
    width: int


class StaticSubnet(nn.Module):
    """One slice as a plain network of standard modules, cut at the gate. Always in eval mode.

    trunk     x [B, 3, H, W] -> TrunkOutput
    slimming  gate_input [B, R] -> gate logits [B, G]
    body      features -> logits [B, K]; None for an early exit, whose logits are the gate's input
    """

    def __init__(self, trunk: nn.Module, slimming: nn.Module, body: nn.Module | None) -> None:
        super().__init__()
        self.trunk, self.slimming, self.body = trunk, slimming, body
        self.eval()

    def answer(self, seen: TrunkOutput) -> Tensor:
        """Logits [B, K] of what the trunk made of the images."""
        logits_BK: Tensor = seen.gate_input if self.body is None else self.body(seen.features)
        return logits_BK

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.trunk(x))


class Supernet(nn.Module, ABC):
    """One set of weights, nested sub-networks. Subclasses set the four attributes and the methods."""

    architecture: str
    ladder: Ladder
    gate_choices: tuple[int, ...]
    input_shape: InputShape
    classes: int

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build with fresh weights from JSON-ready data; ValueError names what is wrong with it."""

    @abstractmethod
    def config_dict(self) -> dict[str, Any]:
        """JSON-ready data from which ``from_config`` builds this network again."""

    @abstractmethod
    def trunk(self, x: Tensor) -> TrunkOutput:
        """Everything before the decision; x is [B, 3, H, W], normalised float32."""

    @abstractmethod
    def gate_logits(self, gate_input: Tensor) -> Tensor:
        """Slimming logits [B, G], in the order of ``gate_choices``; no noise."""

    @abstractmethod
    def slimming_head(self) -> nn.Module:
        """The module behind ``gate_logits``: all that the second training stage changes."""

    @abstractmethod
    def body(self, features: Tensor, width: int) -> Tensor:
        """Everything after the decision, at ladder index ``width``, which is no early exit; logits [B, K]."""

    @abstractmethod
    def subnet(self, width: int) -> StaticSubnet:
        """A plain copy of one slice. ``subnet(w)(x)`` equals ``supernet(x, w)`` in eval mode."""

    def forward(self, x: Tensor, width: int) -> Tensor:
        return self.answer(self.trunk(x), width)

    def answer(self, seen: TrunkOutput, width: int) -> Tensor:
        """Logits [B, K] at ladder index ``width`` of what the trunk made of the images."""
        return seen.gate_input if self.has_exit and width == 0 else self.body(seen.features, width)

    @property
    def has_exit(self) -> bool:
        """True where slice 0 is an early exit: it has no body, its logits are the gate's input."""
        return False

    def gate_class_logits(self, gate_input: Tensor) -> Tensor | None:
        """Class logits [B, K] of a classifier on the gate's input, where the network has one.

        The first training stage teaches it the labels, so that the gate's input tells classes apart. It
        may inform the slimming head; its classes are never an answer. An early exit learns as slices do instead.
        """
        return None

    @property
    def has_wide_trunk(self) -> bool:
        """True where a teacher wider than any slice exists (the published form's wide stem)."""
        return False

    def largest(self, x: Tensor) -> Tensor:
        """Logits of the teacher: the widest slice, or the wide-trunk network where there is one."""
        logits_BK: Tensor = self(x, len(self.ladder) - 1)
        return logits_BK

    def costs(self) -> tuple[SliceCost, ...]:
        """Cost of every slice, in ladder order."""
        return _costs(type(self), json.dumps(self.config_dict(), sort_keys=True))


@cache
def _costs(architecture: type[Supernet], frozen_config: str) -> tuple[SliceCost, ...]:
    with torch.device("meta"):
        net = architecture.from_config(json.loads(frozen_config))
        x = torch.empty(1, net.input_shape.channels, net.input_shape.height, net.input_shape.width)
        costs = []
        for width in range(len(net.ladder)):
            subnet = net.subnet(width)
            trunk_out = subnet.trunk(x)
            costs.append(
                SliceCost(
                    trunk_madds=count_madds(subnet.trunk, x),
                    slimming_madds=count_madds(subnet.slimming, trunk_out.gate_input),
                    body_madds=0 if subnet.body is None else count_madds(subnet.body, trunk_out.features),
                    parameters=count_parameters(subnet) - count_parameters(subnet.slimming),
                )
            )
    madds = [cost.published_madds for cost in costs]
    if any(wider <= narrower for narrower, wider in pairwise(madds)):
        raise ValueError(f"a wider slice must cost more than a narrower one, got {madds} MAdds")
    return tuple(costs)
