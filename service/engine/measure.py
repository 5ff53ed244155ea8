"""Measure seconds per (trunk | width, batch) on this machine, within a bound, at start."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import numpy as np

from service.engine.base import Engine
from service.latency import LatencyTable

BATCH_SIZES = (1, 2, 4)
REPEATS = 15


def _median_s(run: Callable[[], object], limit_s: float) -> float:
    """Median seconds of up to REPEATS runs after one warm-up; at least one, within about ``limit_s``."""
    began = time.perf_counter()
    run()
    samples: list[float] = []
    while len(samples) < REPEATS and (not samples or time.perf_counter() - began < limit_s):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def measure(
    engine: Engine, widths: int, image_shape: tuple[int, int, int], limit_s: float, cancelled: threading.Event
) -> LatencyTable:
    """Warm up every session and fill the table; ``limit_s`` is shared by all entries.

    image_shape  (channels, height, width) of the network input.

    Raises InterruptedError between two entries once ``cancelled`` is set.
    """
    image = np.zeros(image_shape, np.float32)
    feature = engine.trunk([image]).features[0]
    share_s = limit_s / ((widths + 1) * len(BATCH_SIZES))
    seconds: dict[tuple[int | None, int], float] = {}
    for batch in BATCH_SIZES:
        images, features = [image] * batch, [feature] * batch

        def trunk(images: list[np.ndarray] = images) -> object:
            return engine.gate(engine.trunk(images).gate_inputs_NR)

        seconds[None, batch] = _median_s(trunk, share_s)
        for width in range(widths):
            if cancelled.is_set():
                raise InterruptedError("the warm-up was cancelled")

            def body(width: int = width, features: list[object] = features) -> object:
                return engine.body(width, features)

            seconds[width, batch] = _median_s(body, share_s)
    return LatencyTable(seconds)
