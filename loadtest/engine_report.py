"""PURE: what ``slicewise engine`` measured, as Markdown. Every number comes from there; none is written here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loadtest.bars import TOLERANCE
from loadtest.figures import Estimate, median_interval, pair_ratios
from loadtest.results import Machine
from loadtest.tables import machine_lines, table

Seconds = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class _Bar:
    """A figure of every round, and what its median is held against. most: at most ``target``, else at least."""

    title: str
    target: float
    most: bool
    unit: str
    values: list[float]

    def row(self) -> list[str]:
        found = median_interval(self.values)
        met = (
            found.median <= self.target and found.high <= self.target + TOLERANCE
            if self.most
            else found.median >= self.target and found.low >= self.target - TOLERANCE
        )
        side = "at most" if self.most else "at least"
        return [
            self.title,
            f"{side} {self.target:.2f}{self.unit}",
            *_shown(found, self.unit),
            "met" if met else "**missed**",
        ]


def markdown(record: dict[str, Any], machine: Machine, command: str) -> str:
    """The report of one record."""
    seconds: Seconds = record["seconds"]
    rounds = len(next(iter(seconds.values())))
    lines = ["# The engine by itself", "", *machine_lines(machine), ""]
    lines += [
        f"{record['model']} ({record['digest']}), {record['engine']}, one thread, batch 1 unless said otherwise, "
        f"the image decoded and normalised beforehand. {rounds} rounds; in each, every arm runs for "
        f"{record['block_s']:g} s, one after the other. A figure is the median over the rounds with a 95 % bootstrap "
        f"interval; a bar is met as in the [benchmark report](report.md). Made with `{command}`.",
        "", "## Bars", "",
        *table(["figure", "bar", "median", "95 % interval", "verdict"], [bar.row() for bar in _bars(record)]),
        "", "## Milliseconds", "",
        *table(["arm", "median", "95 % interval", "MAdds, M"], _rows(record)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _bars(record: dict[str, Any]) -> list[_Bar]:
    s, widest = record["seconds"], record["widest"]
    narrow_ms = _excess_ms(s, record["mixed"])
    widest_s = s[f"whole {widest}"]
    bars = [
        _Bar("widest over narrowest, whole networks", 3.0, False, "", pair_ratios(widest_s, s["whole 0"])),
        _Bar(
            "widest, whole, over the plainly exported graph", 1.0, True, "", pair_ratios(widest_s, s[f"plain {widest}"])
        ),
        _Bar("trunk + gate + body beyond whole networks, mean of the widths below", 0.4, True, " ms", narrow_ms),
        _Bar(
            "mixed batch of 4 over four whole networks at batch 1", 1.10, True, "", pair_ratios(s["mixed"], s["wholes"])
        ),
    ]
    if "gate batch" in s:
        title = f"gate against widest, images/s, batches of {record['gate_batch']}"
        bars.append(_Bar(title, 1.5, False, "", pair_ratios(s["widest batch"], s["gate batch"])))
    return bars


def _excess_ms(s: Seconds, widths: Iterable[int]) -> list[float]:
    chosen = sorted(set(widths))
    both = [list(zip(s[f"split {width}"], s[f"whole {width}"], strict=True)) for width in chosen]
    return [sum((split - whole) * 1e3 for split, whole in row) / len(chosen) for row in zip(*both, strict=True)]


def _rows(record: dict[str, Any]) -> list[list[str]]:
    def madds(arm: str) -> str:
        kind, _, width = arm.partition(" ")
        return f"{record['madds'][int(width)] / 1e6:.1f}" if kind in ("plain", "whole", "split") else ""

    return [
        [arm, *_shown(median_interval([value * 1e3 for value in values]), ""), madds(arm)]
        for arm, values in record["seconds"].items()
    ]


def _shown(found: Estimate, unit: str) -> list[str]:
    return [f"{found.median:.3f}{unit}", f"{found.low:.3f} to {found.high:.3f}"]
