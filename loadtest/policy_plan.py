"""PURE: bursts that a machine can just bear, and what policies made of them, live and in the offline twin.

Rates follow SuperServe (NSDI 2025), section 6: a mean of 0.8 of what the narrowest width sustains (C0), with peaks
of 1.09. The paper does not state the window of its peaks; here it is a quarter of a second, the longest in which
bursts of CV2 2 alone reach that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import numpy as np

from loadtest.traces import Arrivals, bursty, peak_rate

MEAN_SHARE, PEAK_SHARE = 0.8, 1.09
PEAK_WINDOW_S = 0.25
TAUS = {2: 10, 4: 10, 8: 20}
"""CV2 of the bursts -> SLO in tau0, the seconds of work on an image at the narrowest width."""
RATE_STEP, RATE_STEPS = 1.03, 32
"""What is sustained is looked for among so many rates, each 3 % below the one before."""
SUSTAINED_SHARE, SUSTAINED_LIMIT_MS = 0.99, 100.0
SUSTAINED_RUNS, SUSTAINED_S = 3, 20.0
"""Of the images that come at a rate that is sustained, so many are answered within this time, in each of so many runs
of this length. In a short run, or with a long limit, a rate that is several hundredths too high would pass; with one
run, a moment in which the machine was fast."""
FRONT_SHARE = 0.6
"""Of the event loop's time for an image, until it is admitted; an assumption: nothing tells the two apart from
outside."""
CALM_SHARE = 0.5
"""Of C0: a rate at which fewer images share a batch."""
COSTS = ("overhead_ms", "ask_ms", "ask_loop_ms", "front_ms", "back_ms", "handover_ms", "client_ms")
"""Of an image beside what is in the latency table."""
_BASE_SHARES = np.linspace(0.0, 0.95, 20)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A network. name: with its version. madds_L, top1_L: of every slice."""

    name: str
    madds_L: tuple[int, ...]
    top1_L: tuple[float, ...]

    def sentence(self) -> str:
        """For a report."""
        return (
            f"Network: `{self.name}`, {len(self.madds_L)} slices of {self.madds_L[0] / 1e6:,.1f} to "
            f"{self.madds_L[-1] / 1e6:,.1f} M multiply-adds and {self.top1_L[0]:.2%} to {self.top1_L[-1]:.2%} top-1."
        )


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the machine bears.

    images_per_s  C0: arrivals of an open loop that the narrowest width sustains. overhead_ms: worker time per image
                  beyond the latency table, the event loop and the generator. ask_ms: and more than that where the gate
                  is asked; ask_loop_ms: of the event loop, likewise.
    front_ms      of the event loop for each image until it is admitted; back_ms: and for its answer. handover_ms: of
                  the event loop for each batch. client_ms: of the generator for each image.
    worker_priority  that servers were given.
    """

    images_per_s: float
    workers: int
    overhead_ms: float
    ask_ms: float = 0.0
    ask_loop_ms: float = 0.0
    front_ms: float = 0.0
    back_ms: float = 0.0
    handover_ms: float = 0.0
    client_ms: float = 0.0
    worker_priority: str = "low"

    @property
    def tau0_ms(self) -> float:
        return self.workers / self.images_per_s * 1e3

    def slo_ms(self, cv2: int) -> float:
        """To a tenth of a millisecond, as it is sent."""
        return round(TAUS[cv2] * self.tau0_ms, 1)

    def loop_ms(self, batches: float, answered: float) -> float:
        """Of the event loop for an image, where so many batches are run for one, and so large a share is answered."""
        return self.front_ms + self.back_ms * answered + self.handover_ms * batches

    def twin_flags(self, slower: float = 1.0) -> dict[str, str]:
        """Of ``slicewise simulate``: the machine in the offline twin. slower: all but its batches, by this factor."""
        flags = {f"--{name.replace('_', '-')}": f"{slower * getattr(self, name):.3f}" for name in COSTS}
        return {"--workers": str(self.workers), **flags, "--cores": str(self.workers)}


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU milliseconds per image of a run: of the event loop, of the service's process, of the generator.

    batches  of trunks, per image.
    """

    loop_ms: float
    process_ms: float
    client_ms: float
    batches: float


def quietest(repeats: Sequence[Spent]) -> Spent:
    """Of runs at the same load the one that took the process least: neighbours on the machine only ever add."""
    return min(repeats, key=lambda spent: spent.process_ms)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one trace under one policy. top1: of the answers in time, None where none is judged.

    slower  how many times what was measured with the capacity the event loop took when it ran, or in the twin.
    """

    cv2: int
    seed: int
    policy: str
    attainment: float
    top1: float | None
    late_sends: int = 0
    slower: float = 1.0


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


@dataclass(frozen=True, slots=True)
class Loads:
    """What was spent at C0, at less, and there where the gate is asked and an early exit answers."""

    busy: Spent
    calm: Spent
    asked: Spent

    @property
    def handover_ms(self) -> float:
        """Event loop time of a batch: what an image takes more where fewer share one, as a line through two loads."""
        more = self.calm.batches - self.busy.batches
        return max(0.0, (self.calm.loop_ms - self.busy.loop_ms) / more) if more > 0 else 0.0

    @property
    def ask_loop_ms(self) -> float:
        """Event loop time that an image costs more where the gate is asked."""
        more_batches = self.asked.batches - self.calm.batches
        return max(0.0, self.asked.loop_ms - self.calm.loop_ms - self.handover_ms * more_batches)

    @property
    def ask_ms(self) -> float:
        """The same of all other threads of the service."""
        others = [spent.process_ms - spent.loop_ms for spent in (self.asked, self.calm)]
        return max(0.0, others[0] - others[1])


def capacity(images_per_s: float, workers: int, timings: Iterable[dict[str, Any]], loads: Loads) -> Capacity:
    """What a machine of as many cores as workers bears.

    The loop is one thread: it takes no longer for an image than there is between two at C0. What is left of the time
    of all cores is worker time, so that in the twin they are all busy at C0, too.
    """
    busy = loads.busy
    loop_ms = min(busy.loop_ms, 1e3 / images_per_s)
    handover_ms = min(loads.handover_ms, loop_ms / busy.batches)
    front_ms = FRONT_SHARE * (loop_ms - handover_ms * busy.batches)
    return Capacity(
        images_per_s, workers, overhead_ms(images_per_s, workers, timings, loop_ms + busy.client_ms), loads.ask_ms,
        loads.ask_loop_ms, front_ms, front_ms / FRONT_SHARE - front_ms, handover_ms, busy.client_ms,
    )  # fmt: skip


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


def median_of(repeats: Sequence[Outcome]) -> Outcome:
    """Of runs of one trace under one policy: medians; late sends are added up."""
    known = [one.top1 for one in repeats if one.top1 is not None]
    return replace(
        repeats[0],
        attainment=median(one.attainment for one in repeats),
        top1=median(known) if known else None,
        late_sends=sum(one.late_sends for one in repeats),
        slower=median(one.slower for one in repeats),
    )


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
