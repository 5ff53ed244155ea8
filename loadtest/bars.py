"""PURE: what is held against what, and when a bar counts as met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from loadtest.figures import Estimate, median_interval, pair_differences, pair_ratios
from loadtest.results import Bar, ComparisonRecord, Metric, Run, Side

TOLERANCE = 0.08
"""How far the unfavourable end of the interval may lie beyond the target, in the figure's unit."""
PAIRS_NEEDED = 20
SECONDS_NEEDED = 10.0


class Verdict(StrEnum):
    """What the figures say about a bar. ``UNPROVEN``: too few of them, or failures among them."""

    MET = "met"
    MISSED = "missed"
    UNPROVEN = "unproven"


@dataclass(frozen=True, slots=True)
class Figure:
    """How a metric is computed and called. unit: of the figure, empty for a ratio."""

    title: str
    unit: str
    value: Callable[[Run], float]
    combine: Callable[[Sequence[float], Sequence[float]], list[float]]


def _known(value: float | None) -> float:
    return float("nan") if value is None else value


FIGURES = {
    Metric.THROUGHPUT: Figure("throughput, ratio", "", lambda run: run.images_per_s, pair_ratios),
    Metric.P99: Figure("p99 latency, ratio", "", lambda run: _known(run.p99_ms), pair_ratios),
    Metric.CPU: Figure("server CPU per image, ratio", "", lambda run: run.cpu_s_per_image, pair_ratios),
    Metric.P50_EXCESS: Figure("p50 latency, difference", "ms", lambda run: _known(run.p50_ms), pair_differences),
}


def estimate(metric: Metric, comparison: ComparisonRecord) -> Estimate:
    """Median and interval of the figure over the pairs. Raises ValueError without pairs."""
    figure = FIGURES[metric]
    a, b = ([figure.value(run) for run in arm.runs] for arm in (comparison.a, comparison.b))
    return median_interval(figure.combine(a, b))


def reaches(bar: Bar, found: Estimate) -> bool:
    """The median reaches the target, and the unfavourable end of the interval is within the tolerance of it."""
    if bar.side is Side.AT_LEAST:
        return found.median >= bar.target and found.low >= bar.target - TOLERANCE
    return found.median <= bar.target and found.high <= bar.target + TOLERANCE


def doubts(bar: Bar, comparison: ComparisonRecord) -> list[str]:
    """Why the figures would not carry a verdict, if they do not."""
    found = []
    if comparison.pairs < PAIRS_NEEDED:
        found.append(f"{comparison.pairs} pairs of {PAIRS_NEEDED}")
    if comparison.seconds < SECONDS_NEEDED:
        found.append(f"windows of {comparison.seconds:g} s instead of {SECONDS_NEEDED:g} s")
    for arm in (comparison.a, comparison.b):
        if arm.requests < bar.requests:
            found.append(f"{arm.name}: {arm.requests:,} requests of {bar.requests:,}")
        if arm.failures:
            found.append(f"{arm.name}: {arm.failures:,} failures")
    return found


def verdict(bar: Bar, comparison: ComparisonRecord) -> Verdict:
    """Met, missed, or unproven where the figures would say met and do not carry it."""
    if not reaches(bar, estimate(bar.metric, comparison)):
        return Verdict.MISSED
    return Verdict.UNPROVEN if doubts(bar, comparison) else Verdict.MET
