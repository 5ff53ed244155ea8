"""What the batcher asks of a device.

Shapes: N images, R gate hidden, G gate choices, K classes. A feature is whatever the engine's own
trunk made of one image and stays where the engine keeps it; nobody else looks inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Image = NDArray[np.uint8] | F32
"""uint8 pixels [H, W, 3] as they were decoded and resized, or normalised float32 [3, H, W]."""
Feature = Any


class TrunkResult(NamedTuple):
    """features: one per image. gate_inputs [N, R]: what the slimming head reads."""

    features: Sequence[Feature]
    gate_inputs_NR: F32


class Exited(NamedTuple):
    """What an image's feature is where the network has an early exit. logits_K: what it answers there."""

    feature: Feature
    logits_K: F32


class Engine(Protocol):
    """One model on one device. The methods block, are thread-safe, and any batch size is allowed.

    part_bytes  size of each part's graph with its weights, as the engine keeps it.
    has_exit    slice 0 is an early exit: the trunk has computed its answer, and ``body`` only looks it up.
    """

    name: str
    version: str
    device: str
    workers: int
    part_bytes: Mapping[str, int]
    has_exit: bool

    def trunk(self, images: Sequence[Image]) -> TrunkResult:
        """Images of one or both kinds -> features and the slimming head's inputs."""
        ...

    def gate(self, gate_inputs_NR: F32) -> F32:
        """Slimming logits [N, G]."""
        ...

    def body(self, width: int, features: Sequence[Feature]) -> F32:
        """Class logits [N, K] at one ladder index."""
        ...
