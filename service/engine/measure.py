"""Measure seconds per (trunk | width, batch) on this machine, within a bound."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from models.checkpoint import Checkpoint
from service.engine.base import Engine
from service.latency import PAYS_RATIO, per_image_s

LARGEST_BATCH = 64
PROBES = 3
"""Runs of a size before the next one is tried, while there is time."""

Queue = tuple[int | None, int]
"""A ladder index, or None for the trunk with its gate; and the images in the batch."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one batch over several runs. width: a ladder index, or None for the trunk with its gate."""

    width: int | None
    batch: int
    p50_s: float
    p99_s: float
    runs: int


class Work:
    """A trunk or body batch of any size, of one random image again and again."""

    def __init__(self, engine: Engine, checkpoint: Checkpoint) -> None:
        shape = checkpoint.net.input_shape
        pixels = np.random.default_rng(0).integers(0, 256, (shape.height, shape.width, shape.channels), dtype=np.uint8)
        self._engine, self._image = engine, pixels
        self._feature = engine.trunk([pixels]).features[0]

    def seconds(self, queue: Queue) -> float:
        width, batch = queue
        if width is None:
            images = [self._image] * batch
            began_s = time.perf_counter()
            self._engine.gate(self._engine.trunk(images).gate_inputs_NR)
        else:
            features = [self._feature] * batch
            began_s = time.perf_counter()
            self._engine.body(width, features)
        return time.perf_counter() - began_s


def _probe_sizes(probe: Callable[[int], float], is_time_left: Callable[[], bool]) -> None:
    """Probe 1, 2, 4, ... up to the first size that saves too little per image to go on; ``probe``: its seconds."""
    size, best_s = 1, per_image_s(probe(1), 1)
    while size < LARGEST_BATCH and is_time_left():
        size *= 2
        each_s = per_image_s(probe(size), size)
        if each_s > PAYS_RATIO * best_s:
            return
        best_s = each_s


def measure(
    work: Work, widths: int, limit_s: float, cancelled: threading.Event, runs: int = 15
) -> list[Timing]:  # fmt: skip
    """Warm up every session and time it, up to ``runs`` times within about ``limit_s`` for all.

    Sizes are timed in rounds, so that a disturbance hits all of them. When the time is up, what is left to
    do is one run of every part at a batch of 1.

    Raises InterruptedError between two batches once ``cancelled`` is set.
    """
    give_up_s = time.monotonic() + limit_s

    def is_time_left() -> bool:
        return time.monotonic() < give_up_s

    samples: dict[Queue, list[float]] = {}

    def sample(queue: Queue) -> float:
        if cancelled.is_set():
            raise InterruptedError("the measurement was cancelled")
        seconds = work.seconds(queue)
        samples.setdefault(queue, []).append(seconds)
        return seconds

    def probe(width: int | None, batch: int) -> float:
        work.seconds((width, batch))  # the first run of a size pays for its memory
        return min(sample((width, batch)) for _ in range(PROBES if is_time_left() else 1))

    for width in (None, *range(widths)):
        _probe_sizes(lambda batch, width=width: probe(width, batch), is_time_left)  # type: ignore[misc]
    for _ in range(runs - PROBES):
        for queue in list(samples):
            if not is_time_left():
                break
            sample(queue)
    return [_timing(queue, seconds) for queue, seconds in samples.items()]


def _timing(queue: Queue, seconds: list[float]) -> Timing:
    p50_s, p99_s = np.quantile(seconds, (0.5, 0.99))
    return Timing(*queue, float(p50_s), float(p99_s), len(seconds))
