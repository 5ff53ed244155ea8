"""What a benchmark leaves behind: records that are written as JSON and are all that a report is made of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from loadtest.figures import percentile


class Metric(StrEnum):
    """What is compared, pair by pair."""

    THROUGHPUT = "throughput"
    P99 = "p99"
    CPU = "cpu"
    P50_EXCESS = "p50_excess"


class Side(StrEnum):
    """Which side of the target is good."""

    AT_LEAST = "at least"
    AT_MOST = "at most"


@dataclass(frozen=True, slots=True)
class Bar:
    """A target for one figure. requests: as many answers are needed of each arm."""

    metric: Metric
    side: Side
    target: float
    requests: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """One arm over one window.

    images           answered well.
    seconds          length of the window.
    cpu_s            spent by the server and its child processes, or by the command, within the window.
    p50_ms, p99_ms   of the requests, None where there was none to measure.
    latencies_ms     of every request; empty where a command made the run.
    failed           requests by status or exception, and failed items of batch answers.
    served           answers by the slice that they name.
    generator_cpu_s  spent by the load generator within the window.
    other_cpu_s      spent by the rest of the machine within it; None where it was not measured.
    resident_bytes   memory of the server after the window; 0 where it was not measured.
    """

    images: int
    seconds: float
    cpu_s: float
    p50_ms: float | None
    p99_ms: float | None
    latencies_ms: tuple[float, ...] = ()
    failed: dict[str, int] = field(default_factory=dict)
    served: dict[str, int] = field(default_factory=dict)
    generator_cpu_s: float = 0.0
    other_cpu_s: float | None = None
    resident_bytes: int = 0

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    @property
    def cpu_s_per_image(self) -> float:
        """NaN for a run without an image."""
        return self.cpu_s / self.images if self.images else float("nan")


@dataclass(frozen=True, slots=True)
class ArmRecord:
    """One side of a comparison: what ran, how it was asked, and its runs in the order of the pairs."""

    name: str
    command: str
    request: str
    clients: int
    runs: tuple[Run, ...] = ()

    @property
    def requests(self) -> int:
        return sum(len(run.latencies_ms) for run in self.runs)

    @property
    def failures(self) -> int:
        return sum(sum(run.failed.values()) for run in self.runs)

    def latency_ms(self, percent: float) -> float | None:
        """A percentile over the requests of all runs; where there are none, the median of the runs' own."""
        every = [latency for run in self.runs for latency in run.latencies_ms]
        if every:
            return percentile(every, percent)
        own = [run.p50_ms if percent == 50 else run.p99_ms for run in self.runs]
        known = [value for value in own if value is not None]
        return percentile(known, 50) if known else None


@dataclass(frozen=True, slots=True)
class ComparisonRecord:
    """Two arms that took turns, and the bars that the first is held to against the second."""

    name: str
    title: str
    measured_at: str
    warm_up_s: float
    seconds: float
    a: ArmRecord
    b: ArmRecord
    bars: tuple[Bar, ...] = ()

    @property
    def pairs(self) -> int:
        return len(self.a.runs)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it was measured. Memory in bytes."""

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    python: str
    packages: dict[str, str]


@dataclass(frozen=True, slots=True)
class Results:
    """A whole benchmark."""

    machine: Machine
    comparisons: tuple[ComparisonRecord, ...] = ()

    def with_comparison(self, record: ComparisonRecord) -> Self:
        """These and one more, which takes the place of an earlier one of its name."""
        names = [known.name for known in self.comparisons]
        kept = list(self.comparisons)
        if record.name in names:
            kept[names.index(record.name)] = record
        else:
            kept.append(record)
        return dataclasses.replace(self, comparisons=tuple(kept))

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        draft = path.with_suffix(".partial")
        draft.write_bytes(_ADAPTER.dump_json(self, indent=None) + b"\n")
        draft.replace(path)

    @staticmethod
    def load(path: Path) -> Results:
        """Read what ``save`` wrote; ValueError names the file and what is wrong with it."""
        try:
            return _ADAPTER.validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{path}: not a result of slicewise-load bench: {error}") from error


_ADAPTER = TypeAdapter(Results)
