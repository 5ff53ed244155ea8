"""PURE: what a long load left in memory, descriptors and latency, the bars it is held to, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from loadtest.checks import Check, Setting, at_most, check_table, equal, within
from loadtest.fault_record import Counts
from loadtest.figures import percentile
from loadtest.known_answers import Ending
from loadtest.server_state import Sample, State
from loadtest.tables import table

PARTS = 5
"""How many parts are compared: the second to the sixth, with as many at the end."""
LEAST_PARTS = 2 * PARTS + 1
FULL_S = 900.0
"""Shorter than this it says little about leaks, and the report says so."""
MEMORY_SHARE, P99_SHARE = 0.02, 0.25
PLOT = "soak.png"
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the load. from_s: its start and to_s its end, in s from the start of the samples."""

    from_s: float
    to_s: float
    counts: Counts
    p50_ms: float
    p99_ms: float
    late_sends: int


@dataclass(frozen=True, slots=True)
class SoakRecord:
    """A whole run. Rates in requests/s; part_s: seconds of load in each part. samples: about one a second."""

    setting: Setting
    model: str
    flags: tuple[str, ...]
    capacity_per_s: float
    is_measured: bool
    rate_per_s: float
    part_s: float
    images: int
    parts: tuple[Part, ...]
    samples: tuple[Sample, ...]
    before: State
    after: State

    def early(self) -> tuple[Part, ...]:
        return self.parts[1 : 1 + PARTS]

    def late(self) -> tuple[Part, ...]:
        return self.parts[-PARTS:]

    def memory_bytes(self, parts: Sequence[Part]) -> float:
        """Median over the samples within the parts."""
        from_s, to_s = parts[0].from_s, parts[-1].to_s
        return percentile([each.resident_bytes for each in self.samples if from_s <= each.at_s <= to_s], 50)

    def checks(self) -> list[Check]:
        early, late = self.early(), self.late()
        total = {each: sum(part.counts.of(each) for part in self.parts) for each in Ending}
        requests = sum(part.counts.requests for part in self.parts)
        return [
            within(
                "memory at the end, MiB, of that at the beginning", self.memory_bytes(late) / _MIB,
                self.memory_bytes(early) / _MIB, MEMORY_SHARE,
            ),
            within("p99 at the end, ms, of that at the beginning", _p99_ms(late), _p99_ms(early), P99_SHARE),
            at_most("open descriptors, idle, after the load", self.after.descriptors, self.before.descriptors),
            equal("images in the queues after the load", self.after.queued, 0),
            equal("requests in flight after the load", self.after.in_flight, 0),
            equal("right answers", total[Ending.RIGHT], requests),
            equal("wrong answers", total[Ending.WRONG], 0),
        ]  # fmt: skip

    @property
    def held(self) -> bool:
        return all(check.held for check in self.checks())

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        draft = path.with_suffix(".partial")
        draft.write_bytes(_ADAPTER.dump_json(self, indent=None) + b"\n")
        draft.replace(path)

    @staticmethod
    def load(path: Path) -> SoakRecord:
        """Read what ``save`` wrote; ValueError names the file and what is wrong with it."""
        try:
            return _ADAPTER.validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{path}: not a result of slicewise-load soak: {error}") from error


_ADAPTER = TypeAdapter(SoakRecord)


def _p99_ms(parts: Sequence[Part]) -> float:
    return percentile([part.p99_ms for part in parts], 50)


def markdown(record: SoakRecord, is_drawn: bool) -> str:
    """The report; every number comes from the record."""
    source = "measured in this run with a closed loop" if record.is_measured else "given"
    flags = f" with `{' '.join(record.flags)}`" if record.flags else ""
    load_s = record.part_s * len(record.parts)
    lines = ["# Soak", "", *record.setting.lines(), ""]
    lines += [
        f"{record.model}{flags}, an open load of {record.rate_per_s:.0f} requests/s on the same machine for "
        f"{load_s:g} s, in {len(record.parts)} parts of {record.part_s:g} s; capacity {record.capacity_per_s:.0f} "
        f"images/s, {source}. Between parts the answers are judged, which takes {_longest_pause_s(record):.1f} s at "
        f"most. {record.images} different images with known answers. The beginning is parts 2 to {1 + PARTS}, the end "
        f"the last {PARTS}; memory is the median of the samples in them, p99 the median of the parts' own.", "",
    ]  # fmt: skip
    if load_s < FULL_S:
        lines += [f"**Shorter than {FULL_S:g} s: it says little about leaks.**", ""]
    lines += ["## Bars", "", *check_table(record.checks()), ""]
    if is_drawn:
        lines += [f"![Memory and p99 over time]({PLOT})", ""]
    heads = ["part", "requests", "right", "p50 ms", "p99 ms", "slowest ms", "late sends", "memory MiB", "descriptors"]
    lines += ["## Parts", "", *table(heads, [_row(record, place) for place in range(len(record.parts))]), ""]
    return "\n".join(lines)


def _longest_pause_s(record: SoakRecord) -> float:
    return max((after.from_s - before.to_s for before, after in pairwise(record.parts)), default=0.0)


def _row(record: SoakRecord, place: int) -> list[str]:
    part = record.parts[place]
    open_ones = [each.descriptors for each in record.samples if part.from_s <= each.at_s <= part.to_s]
    return [
        str(place + 1), f"{part.counts.requests:,}", f"{part.counts.of(Ending.RIGHT):,}", f"{part.p50_ms:.2f}",
        f"{part.p99_ms:.2f}", f"{part.counts.slowest_ms or 0.0:.1f}", f"{part.late_sends:,}",
        f"{record.memory_bytes([part]) / _MIB:.1f}", f"{min(open_ones)} to {max(open_ones)}",
    ]  # fmt: skip
