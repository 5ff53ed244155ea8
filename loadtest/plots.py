"""Results -> pictures: throughput of every arm, and latencies of every comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loadtest.figures import median_interval, percentile
from loadtest.results import ArmRecord, ComparisonRecord, Results

THROUGHPUT = "throughput.png"
CDF = "latency_{name}.png"
_COLOURS = ("tab:blue", "tab:orange")
_TAIL_PERCENT = 99.5
"""The slowest answers are left of the picture, or they would be all of it."""


def draw(results: Results, folder: Path) -> list[Path]:
    """Write every picture that the report shows; returns their paths."""
    drawn = []
    if results.comparisons:
        drawn.append(_save(_throughput(results), folder / THROUGHPUT))
    for comparison in results.comparisons:
        if comparison.a.requests or comparison.b.requests:
            drawn.append(_save(_latencies(comparison), folder / CDF.format(name=comparison.name)))
    return drawn


def _throughput(results: Results) -> Figure:
    """One bar per arm, each run a dot."""
    rows = [
        (f"{comparison.name}\n{arm.name}", arm, colour)
        for comparison in results.comparisons
        for arm, colour in zip((comparison.a, comparison.b), _COLOURS, strict=True)
    ]
    figure = Figure(figsize=(8, 0.6 + 0.5 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, arm, colour) in enumerate(rows):
        rates = [run.images_per_s for run in arm.runs]
        axes.barh(place, median_interval(rates).median, color=colour, alpha=0.6)
        axes.plot(rates, [place] * len(rates), ".", color="black", markersize=3)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("images/s: median, and each run")
    return figure


def _latencies(comparison: ComparisonRecord) -> Figure:
    """Cumulative distribution of the latencies of both arms, all runs together."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    furthest_ms = 0.0
    for arm, colour in zip((comparison.a, comparison.b), _COLOURS, strict=True):
        latencies_ms = _latencies_ms(arm)
        if latencies_ms:
            furthest_ms = max(furthest_ms, percentile(latencies_ms, _TAIL_PERCENT))
            shares = np.arange(1, len(latencies_ms) + 1) / len(latencies_ms)
            axes.plot(latencies_ms, shares, color=colour, label=arm.name)
    axes.set_xlim(0, furthest_ms)
    axes.set_ylim(0, 1)
    axes.set_xlabel("latency, ms")
    axes.set_ylabel("share of requests")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    return figure


def _latencies_ms(arm: ArmRecord) -> list[float]:
    return sorted(latency for run in arm.runs for latency in run.latencies_ms)


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure).print_figure(path, dpi=110, metadata={"Software": None})
    return path
