"""Two arms that take turns, pair by pair, so that what drifts on the machine drifts for both."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace

from loadtest.arms import Arm, Window
from loadtest.results import Bar, ComparisonRecord, Run
from loadtest.servers import Fleet

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Arm ``a`` against arm ``b``, and the bars that ``a`` is held to."""

    name: str
    title: str
    a: Arm
    b: Arm
    bars: tuple[Bar, ...] = ()


def compare(comparison: Comparison, fleet: Fleet, pairs: int, window: Window, report: Report) -> ComparisonRecord:
    """Measure ``pairs`` pairs; the arm that goes first alternates, so that neither always follows the other.

    Both arms of a pair see the same seed, hence the same images and headers in the same order; the next
    pair sees others. ``report`` hears one line per pair. Raises BenchError and ServerError.
    """
    arms = (comparison.a, comparison.b)
    runs: tuple[list[Run], list[Run]] = ([], [])
    measured_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for index in range(pairs):
        for side in (0, 1) if index % 2 == 0 else (1, 0):
            runs[side].append(arms[side].measure(fleet, replace(window, seed=window.seed + index)))
        rates = ", ".join(f"{arms[side].name} {runs[side][-1].images_per_s:.1f} images/s" for side in (0, 1))
        report(f"{comparison.name} {index + 1}/{pairs}: {rates}")
    a, b = (replace(arm.record(), runs=tuple(done)) for arm, done in zip(arms, runs, strict=True))
    return ComparisonRecord(
        comparison.name, comparison.title, measured_at, window.warm_up_s, window.seconds, a, b, comparison.bars
    )
