"""Runs of the open loop -> pictures. Needs matplotlib, so it is imported late, by those who can do without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loadtest.figures import percentile
from loadtest.outcomes import Figures
from loadtest.run_report import (
    ACCURACY_PLOT,
    ARRIVALS_PLOT,
    ATTAINMENT_PLOT,
    LATENCY_PLOT,
    WIDTHS_PLOT,
    RunRecord,
    mean_rate,
    repetitions,
)

_Data = TypeVar("_Data")


def draw_run(record: RunRecord, folder: Path) -> list[Path]:
    """Arrivals, slices served and latency, second by second; returns the paths of those that there is data for."""
    answered = any(second.widths for second in record.seconds)
    measured = any(second.p50_ms is not None for second in record.seconds)
    pictures = [(ARRIVALS_PLOT, _arrivals, True), (WIDTHS_PLOT, _widths, answered), (LATENCY_PLOT, _latency, measured)]
    return [_picture(plot, record.seconds, folder / name) for name, plot, known in pictures if known]


def draw_comparison(records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Attainment against load, and accuracy against attainment; returns the paths of those that there is data for."""
    judged = [record for record in records if record.figures.attainment is not None]
    labelled = [record for record in judged if record.figures.top1 is not None]
    pictures = [(ATTAINMENT_PLOT, _attainment, judged), (ACCURACY_PLOT, _accuracy, labelled)]
    return [_picture(plot, known, folder / name) for name, plot, known in pictures if known]


def _picture(plot: Callable[[Axes, Sequence[_Data]], None], data: Sequence[_Data], path: Path) -> Path:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.add_subplot()
    plot(axes, data)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_figure(path, dpi=110, metadata={"Software": None})
    return path


def _arrivals(axes: Axes, seconds: Sequence[Figures]) -> None:
    axes.stairs([second.arrivals_per_s for second in seconds], _edges_s(seconds), label="due")
    axes.stairs([second.goodput_per_s for second in seconds], _edges_s(seconds), label="met")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("time, s")
    axes.set_ylabel("requests/s")


def _widths(axes: Axes, seconds: Sequence[Figures]) -> None:
    """Shares on top of each other; a second without an answer is a gap."""
    totals = [sum(second.widths.values()) or 1 for second in seconds]
    base = [0.0] * len(seconds)
    for name in sorted({name for second in seconds for name in second.widths}, key=_numerically):
        shares = [second.widths.get(name, 0) / total for second, total in zip(seconds, totals, strict=True)]
        top = [low + share for low, share in zip(base, shares, strict=True)]
        axes.stairs(top, _edges_s(seconds), baseline=base, fill=True, label=f"width {name}")
        base = top
    axes.set_ylim(0, 1)
    axes.set_xlabel("time, s")
    axes.set_ylabel("share of answers")


def _edges_s(seconds: Sequence[Figures]) -> list[float]:
    return [*(second.start_s for second in seconds), seconds[-1].end_s]


def _latency(axes: Axes, seconds: Sequence[Figures]) -> None:
    known = [s for s in seconds if s.p50_ms is not None and s.p99_ms is not None]
    at_s = [second.start_s for second in known]
    axes.plot(at_s, [second.p50_ms or 0.0 for second in known], ".-", label="p50")
    axes.plot(at_s, [second.p99_ms or 0.0 for second in known], ".-", label="p99")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("time, s")
    axes.set_ylabel("latency of answers, ms")


def _attainment(axes: Axes, records: Sequence[RunRecord]) -> None:
    """A line through the medians of runs that repeat each other, and each run a dot."""
    for label, groups, colour in _by_label(records):
        rates = [mean_rate(group) for group in groups]
        axes.plot(rates, [_median(_attainments(group)) for group in groups], color=colour, label=label)
        for record in (record for group in groups for record in group):
            axes.plot([record.trace.mean_rate_per_s], _attainments([record]), ".", color=colour)
    axes.set_xlabel("mean load, requests/s")
    axes.set_ylabel("SLO attainment")


def _accuracy(axes: Axes, records: Sequence[RunRecord]) -> None:
    for label, groups, colour in _by_label(records):
        runs = [record for group in groups for record in group]
        axes.plot(
            _attainments(runs), [r.figures.top1 or 0.0 for r in runs], ".", markersize=8, color=colour, label=label
        )
    axes.set_xlabel("SLO attainment")
    axes.set_ylabel("top-1 of the met")


def _by_label(records: Sequence[RunRecord]) -> list[tuple[str, list[list[RunRecord]], str]]:
    """Each label with its groups of runs, in order of load, and its colour."""
    groups = repetitions(records)
    labels = sorted({record.label for record in records})
    return [
        (label, [group for group in groups if group[0].label == label], f"C{place % 10}")
        for place, label in enumerate(labels)
    ]


def _attainments(records: Sequence[RunRecord]) -> list[float]:
    return [record.figures.attainment or 0.0 for record in records]


def _median(values: Sequence[float]) -> float:
    return percentile(values, 50)


def _numerically(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isascii() and name.isdigit() else (-1, name)
