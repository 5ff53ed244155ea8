"""A soak -> its picture. Needs matplotlib, so it is imported late."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loadtest.soak_record import PLOT, SoakRecord


def draw_soak(record: SoakRecord, folder: Path) -> Path:
    """Memory of every second above, p99 of every part below; returns its path."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    memory, latency = figure.subplots(2, 1, sharex=True)
    minutes = [sample.at_s / 60 for sample in record.samples]
    memory.plot(minutes, [sample.resident_bytes / 2**20 for sample in record.samples])
    memory.set_ylim(bottom=0)
    memory.set_ylabel("resident memory, MiB")
    middles = [(part.from_s + part.to_s) / 120 for part in record.parts]
    latency.plot(middles, [part.p99_ms for part in record.parts], ".-", label="p99")
    latency.plot(middles, [part.p50_ms for part in record.parts], ".-", label="p50")
    latency.set_ylim(bottom=0)
    latency.set_ylabel("latency, ms")
    latency.set_xlabel("time, minutes")
    latency.legend(fontsize=8)
    for axes in (memory, latency):
        axes.grid(alpha=0.3)
        for parts in (record.early(), record.late()):
            axes.axvspan(parts[0].from_s / 60, parts[-1].to_s / 60, alpha=0.1)
    path = folder / PLOT
    FigureCanvasAgg(figure).print_figure(path, dpi=110, metadata={"Software": None})
    return path
