"""PURE: bursts that a machine can just bear, and what policies made of them, live and in the offline twin.

Rates follow SuperServe (NSDI 2025), section 6: a mean of 0.8 of what the narrowest width sustains (C0), with peaks
of 1.09. The paper does not state the window of its peaks; here it is a quarter of a second, the longest in which
bursts of CV2 2 alone reach that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from loadtest.traces import Arrivals, bursty, peak_rate

MEAN_SHARE, PEAK_SHARE = 0.8, 1.09
PEAK_WINDOW_S = 0.25
TAUS = {2: 10, 4: 10, 8: 20}
"""CV2 of the bursts -> SLO in tau0, the seconds of work on an image at the narrowest width."""
RATE_STEP, RATE_STEPS = 1.03, 32
"""What is sustained is looked for among so many rates, each 3 % below the one before."""
SUSTAINED_SHARE, SUSTAINED_LIMIT_MS = 0.99, 500.0
"""Of the images that come at a rate that is sustained, so many are answered within this time."""
FRONT_SHARE = 0.6
"""Of the event loop's time for an image, until it is admitted; an assumption: nothing tells the two apart from
outside."""
_BASE_SHARES = np.linspace(0.0, 0.95, 20)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the machine bears.

    images_per_s  C0: arrivals of an open loop that the narrowest width sustains. overhead_ms: worker time per image
                  beyond the latency table, the event loop and the generator. look_ms: and more than that where the
                  gate is asked and a body follows.
    front_ms      of the event loop for each image until it is admitted; back_ms: and for its answer. client_ms: of the
                  generator for each image. All 0 in files from before they were measured: overhead_ms holds them.
    worker_priority  that servers were given.
    loop_per_s    images per second of a loop without HTTP on all cores, when this was measured: how fast the machine
                  was. 0 where nobody looked.
    """

    images_per_s: float
    workers: int
    overhead_ms: float
    look_ms: float
    front_ms: float = 0.0
    back_ms: float = 0.0
    client_ms: float = 0.0
    worker_priority: str = "low"
    loop_per_s: float = 0.0

    @property
    def tau0_ms(self) -> float:
        return self.workers / self.images_per_s * 1e3

    def slo_ms(self, cv2: int, speed: float = 1.0) -> float:
        """To a tenth of a millisecond, as it is sent. speed: of the machine, as a multiple of what it was."""
        return round(TAUS[cv2] * self.tau0_ms / speed, 1)

    @property
    def loop_ms(self) -> float:
        return self.front_ms + self.back_ms

    def twin_flags(self) -> dict[str, str]:
        """Of ``slicewise simulate``: the machine in the offline twin."""
        costs = ("overhead_ms", "look_ms", "front_ms", "back_ms", "client_ms")
        flags = {f"--{name.replace('_', '-')}": f"{getattr(self, name):.3f}" for name in costs}
        return {"--workers": str(self.workers), **flags, "--cores": str(self.workers)}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one trace under one policy. top1: of the answers in time, None where none is judged.

    speed  of the machine when it ran, as a multiple of what it was when its capacity was measured.
    """

    cv2: int
    seed: int
    policy: str
    attainment: float
    top1: float | None
    late_sends: int = 0
    speed: float = 1.0


def sustained(holds: Callable[[float], bool], most_per_s: float) -> float:
    """The highest rate that holds of those from ``most_per_s`` down, found by halving; 0 when none does."""
    rates = [most_per_s / RATE_STEP**step for step in range(RATE_STEPS)]
    return [*rates, 0.0][bisect_left(rates, True, key=holds)]


def base_share(cv2: int, capacity_per_s: float, duration_s: float, seeds: Sequence[int]) -> float:
    """Share of the rate that comes at equal gaps, such that the peaks of these seeds are nearest to their target."""

    def miss(share: float) -> float:
        peaks = [peak_rate(draw(cv2, share, capacity_per_s, duration_s, seed), PEAK_WINDOW_S) for seed in seeds]
        return abs(fmean(peaks) - PEAK_SHARE * capacity_per_s)

    return float(min(_BASE_SHARES, key=miss))


def draw(cv2: int, base: float, capacity_per_s: float, duration_s: float, seed: int) -> Arrivals:
    """Arrivals of one trace. base: share of the rate at equal gaps."""
    rate = MEAN_SHARE * capacity_per_s
    return bursty(rate, base * rate, cv2, duration_s, np.random.default_rng(seed))


def capacity(
    images_per_s: float, workers: int, timings: Iterable[dict[str, Any]], look_ms: float, loop_ms: float,
    client_ms: float,
) -> Capacity:  # fmt: skip
    """What a machine of as many cores as workers bears, with what was measured at C0 per image.

    The loop is one thread: it takes no longer for an image than there is between two at C0. What is left of the time
    of all cores is worker time, so that in the twin they are all busy at C0, too.
    """
    loop_ms = min(loop_ms, 1e3 / images_per_s)
    rest_ms = overhead_ms(images_per_s, workers, timings, loop_ms + client_ms)
    front_ms = FRONT_SHARE * loop_ms
    return Capacity(images_per_s, workers, rest_ms, look_ms, front_ms, loop_ms - front_ms, client_ms)


def overhead_ms(
    capacity_per_s: float, workers: int, timings: Iterable[dict[str, Any]], other_ms: float = 0.0
) -> float:  # fmt: skip
    """Worker milliseconds per image at saturation beyond the table's fastest batches of trunk and narrowest body.

    other_ms  that other threads on the same cores take for an image.
    """
    best_s: dict[object, float] = {}
    for timing in timings:
        width, per_image_s = timing["width"], timing["p50_s"] / timing["batch"]
        best_s[width] = min(per_image_s, best_s.get(width, per_image_s))
    return max(0.0, (workers / capacity_per_s - best_s[None] - best_s[0]) * 1e3 - other_ms)


def look_ms(capacity_per_s: float, looked_per_s: float, workers: int) -> float:
    """Worker milliseconds that an image costs more when the gate is asked, from what is sustained with and without."""
    return max(0.0, workers / looked_per_s - workers / capacity_per_s) * 1e3


def slice_1_alone(slices: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Headers that leave only slice 1 to an image, of slices as ``/v1/models`` lists them.

    Raises ValueError where no floor tells it from slice 0.
    """
    narrowest, *wider = (each["accuracy"] for each in slices)
    if not wider or None in (narrowest, *wider) or narrowest >= min(wider):
        accuracies = ", ".join(map(str, [narrowest, *wider]))
        raise ValueError(f"slices have accuracies of {accuracies}; needed: two and more, the narrowest the lowest")
    return f"Compute-Budget={slices[1]['madds_served']}", f"Accuracy-Floor={min(wider)}"


def means(outcomes: Iterable[Outcome]) -> dict[tuple[int, str], tuple[float, float | None]]:
    """(CV2, policy) -> attainment and top-1, averaged over the seeds."""
    grouped: dict[tuple[int, str], list[Outcome]] = {}
    for one in outcomes:
        grouped.setdefault((one.cv2, one.policy), []).append(one)
    return {key: (fmean(o.attainment for o in found), _mean_top1(found)) for key, found in grouped.items()}


def _mean_top1(outcomes: Sequence[Outcome]) -> float | None:
    known = [one.top1 for one in outcomes if one.top1 is not None]
    return fmean(known) if known else None


def trace_name(cv2: int, seed: int) -> str:
    """Of the trace, without its suffix."""
    return f"cv2-{cv2}-seed-{seed}"


def parse_trace_name(name: str) -> tuple[int, int]:
    """(CV2, seed) of such a name."""
    _, cv2, _, seed = name.split("-")
    return int(cv2), int(seed)
