"""PURE: readings of a server's threads -> milliseconds of CPU time per image and stage, and a table of them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtest.results import Machine, Run

Costs = dict[str, float]
"""Milliseconds of CPU time per image, by a key of ``STAGES`` or ``PARTS_OF_ENGINE``, and ``total``."""

STAGES = {
    "decode": "decode",
    "resize": "crop and resize",
    "normalise": "normalise",
    "engine": "engine",
    "answer": "probabilities and JSON",
    "workers": "other threads beyond these stages",
    "http": "event loop: sockets, HTTP, ASGI server",
    "framework": "event loop: the rest",
}
"""What the total is made of; each a row of the table."""
PARTS_OF_ENGINE = {"trunk": "trunk", "gate": "gate", "body": "body"}
SIGNS = {
    "images_per_s": "images/s",
    "p50_ms": "p50 ms",
    "engine_wall_ms": "engine, wall ms per image",
    "images_per_batch": "images per batch of the engine",
    "system_ms": "CPU ms per image spent in the kernel",
    "page_faults": "minor page faults per image",
    "turns": "times per image that a thread got a core",
    "waiting_ms": "ms per image that threads with work waited for a core",
    "stolen_ms": "ms per image that the hypervisor took from all cores",
    "busy_threads": "threads, of the server, that used a core",
    "idle_ms_per_s": "CPU ms per second without a request",
    "generator_ms": "load generator, CPU ms per image",
    "other_cores": "cores taken by other processes",
    "failed": "failed requests",
}
BUSY_SHARE = 0.01
"""Of the threads' CPU time: a thread with less has slept."""
ENGINE_SHARE = 0.02
"""Of the workers' CPU time: threads that do not decode and have less run no engine, so one pool does both."""


@dataclass(frozen=True, slots=True)
class ThreadReading:
    """What the kernel knows of a thread. waiting_s: runnable without a core. turns: times it was given one."""

    cpu_s: float
    waiting_s: float
    turns: int

    def since(self, earlier: ThreadReading) -> ThreadReading:
        return ThreadReading(
            self.cpu_s - earlier.cpu_s, self.waiting_s - earlier.waiting_s, self.turns - earlier.turns
        )  # fmt: skip


NEVER_RAN = ThreadReading(0.0, 0.0, 0)


@dataclass(frozen=True, slots=True)
class Reading:
    """A process at one moment, or between two.

    threads      by thread id.
    system_s     CPU seconds in the kernel, all threads.
    page_faults  minor ones.
    stolen_s     that the hypervisor kept all cores from the whole machine.
    counters     what the server says of itself; empty when it is not asked.
    """

    threads: Mapping[int, ThreadReading]
    system_s: float
    page_faults: int
    stolen_s: float = 0.0
    counters: Mapping[str, float] = field(default_factory=dict)

    def since(self, earlier: Reading) -> Reading:
        """Threads that are new count in full; those that have ended are missing, and their time with them."""
        return Reading(
            {tid: now.since(earlier.threads.get(tid, NEVER_RAN)) for tid, now in self.threads.items()},
            self.system_s - earlier.system_s,
            self.page_faults - earlier.page_faults,
            self.stolen_s - earlier.stolen_s,
            {name: value - earlier.counters.get(name, 0.0) for name, value in self.counters.items()},
        )


@dataclass(frozen=True, slots=True)
class Observation:
    """A server over one window.

    spent      between the window's ends.
    loop       id of the event loop's thread.
    decoders   ids of threads that decode and do nothing else; empty where that is not known.
    http_ms    what a server that only echoes spent per request at the same rate.
    """

    run: Run
    spent: Reading
    loop: int
    http_ms: float
    decoders: frozenset[int] = frozenset()

    @property
    def loop_ms(self) -> float:
        return self._ms(self.spent.threads[self.loop].cpu_s)

    @property
    def _workers(self) -> dict[int, float]:
        """CPU milliseconds per image of all threads but the event loop's."""
        return {tid: self._ms(thread.cpu_s) for tid, thread in self.spent.threads.items() if tid != self.loop}

    def _ms(self, seconds: float) -> float:
        return seconds / self.run.images * 1e3

    def _on_loop(self) -> Costs:
        return {"http": self.http_ms, "framework": self.loop_ms - self.http_ms, "total": self._ms(self.run.cpu_s)}

    def costs_by_thread(self) -> Costs:
        """Of a server that decodes on some threads and runs its engine on others."""
        workers = self._workers
        engine_ms = sum(ms for tid, ms in workers.items() if tid not in self.decoders)
        if engine_ms <= ENGINE_SHARE * sum(workers.values()):
            return {"engine": sum(workers.values()), **self._on_loop()}
        return {"decode": sum(workers.values()) - engine_ms, "engine": engine_ms, **self._on_loop()}

    def costs_by_clock(self) -> Costs:
        """Of a server that clocks its stages itself and says so: counters ``images`` and ``cpu_s STAGE``."""
        stages = stage_costs(self.spent.counters)
        return {**stages, "workers": sum(self._workers.values()) - sum(stages.values()), **self._on_loop()}

    def signs(self, idle_ms_per_s: float) -> dict[str, float]:
        """What hints at why an image costs more here than elsewhere, by a key of ``SIGNS``."""
        run, threads, counters = self.run, self.spent.threads.values(), self.spent.counters
        threads_s = sum(thread.cpu_s for thread in threads)
        found = {
            "images_per_s": run.images_per_s,
            "system_ms": self._ms(self.spent.system_s),
            "page_faults": self.spent.page_faults / run.images,
            "turns": sum(thread.turns for thread in threads) / run.images,
            "waiting_ms": self._ms(sum(thread.waiting_s for thread in threads)),
            "stolen_ms": self._ms(self.spent.stolen_s),
            "busy_threads": float(sum(thread.cpu_s > BUSY_SHARE * threads_s for thread in threads)),
            "idle_ms_per_s": idle_ms_per_s,
            "generator_ms": self._ms(run.generator_cpu_s),
            "failed": float(sum(run.failed.values())),
        }
        if run.p50_ms is not None:
            found["p50_ms"] = run.p50_ms
        if run.other_cpu_s is not None:
            found["other_cores"] = run.other_cpu_s / run.seconds
        if counters.get("images") and "engine_wall_s" in counters:
            found["engine_wall_ms"] = counters["engine_wall_s"] / counters["images"] * 1e3
        if counters.get("batches"):
            found["images_per_batch"] = counters["batched_images"] / counters["batches"]
        return found


def stage_costs(counters: Mapping[str, float]) -> Costs:
    """``images`` and ``cpu_s STAGE`` -> milliseconds per image of each stage; none where no image was counted."""
    if not counters.get("images"):
        return {}
    stages = {name.removeprefix("cpu_s "): value for name, value in counters.items() if name.startswith("cpu_s ")}
    return {stage: seconds / counters["images"] * 1e3 for stage, seconds in stages.items()}


def loop_costs(said: Mapping[str, Any]) -> Costs:
    """Of a loop without HTTP: of ours, by its ``STAGE_cpu_s``, or of the peer's, by its ``stages_cpu_s``."""
    per_image_ms = 1e3 / said["images"]
    stages = said.get("stages_cpu_s") or {
        stage: said[f"{stage}_cpu_s"] for stage in ("decode", *PARTS_OF_ENGINE) if f"{stage}_cpu_s" in said
    }
    costs = {stage: seconds * per_image_ms for stage, seconds in stages.items()}
    if parts := [costs[part] for part in PARTS_OF_ENGINE if part in costs]:
        costs["engine"] = sum(parts)
    return {**costs, "total": said["cpu_s"] * per_image_ms}


def loop_signs(said: Mapping[str, Any]) -> dict[str, float]:
    """Those of ``SIGNS`` that a loop without HTTP tells."""
    images = said["images"]
    found = {
        "images_per_s": images / said["seconds"],
        "system_ms": said["system_s"] / images * 1e3,
        "page_faults": said["page_faults"] / images,
    }
    if "stages_wall_s" in said:
        found["engine_wall_ms"] = said["stages_wall_s"]["engine"] / images * 1e3
    return found


def unexplained(costs: Costs) -> float:
    """Milliseconds of the total that are in no stage."""
    return costs["total"] - sum(costs.get(stage, 0.0) for stage in STAGES)


@dataclass(frozen=True, slots=True)
class Column:
    """One server, or one loop, round by round.

    within  what is not clocked by itself: stage -> the stage that holds it.
    """

    name: str
    costs: tuple[Costs, ...]
    signs: tuple[dict[str, float], ...]
    within: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Section:
    """One width."""

    width: int
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Account:
    """What was measured, how, and on what. setup: one fact per name."""

    machine: Machine
    measured_at: str
    setup: Mapping[str, str]
    sections: tuple[Section, ...]

    def to_json(self) -> dict[str, Any]:
        """All rounds, and the medians and ranges that the table shows."""
        data = dataclasses.asdict(self)
        for section, shown in zip(self.sections, data["sections"], strict=True):
            for column, facts in zip(section.columns, shown["columns"], strict=True):
                facts["medians"] = {key: _summary(values) for key, values in _rows(column).items()}
        return data


def _rows(column: Column) -> dict[str, list[float]]:
    """Values of every row that the column has any of, round by round."""
    keys = [*STAGES, *PARTS_OF_ENGINE, "total"]
    rows = {key: [costs[key] for costs in column.costs if key in costs] for key in keys}
    rows["unexplained"] = [unexplained(costs) for costs in column.costs]
    rows |= {key: [signs[key] for signs in column.signs if key in signs] for key in SIGNS}
    return {key: values for key, values in rows.items() if values}


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def markdown(account: Account) -> str:
    """The report: one table per width, and one of signs."""
    machine, setup = account.machine, ", ".join(f"{name} {value}" for name, value in account.setup.items())
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    lines = [
        "# Where the CPU time of a request goes", "",
        f"{machine.cpu}, {machine.cores} usable cores, {machine.memory_bytes / 2**30:.1f} GiB, {machine.system}, "
        f"Python {machine.python}. {packages}.", "",
        f"Measured at {account.measured_at}: {setup}.", "", *_METHOD,
    ]  # fmt: skip
    for section in account.sections:
        lines += ["", f"## Width {section.width}", "", *_stage_table(section.columns)]
        lines += ["", "Signs of what makes an image dearer in one place than in another:", ""]
        lines += _table(section.columns, SIGNS)
    return "\n".join(lines) + "\n"


_METHOD = (
    "CPU milliseconds per image, load generator excluded: the median of the rounds, and their range. Rows are medians "
    "by themselves, so they add up only nearly. *Alone* is the same work in a loop without HTTP.",
    "",
    "* Servers' totals and threads are the kernel's figures over the window. The tuned server and the loops clock "
    "their stages by each thread's CPU clock. Slicewise's decoding threads are told from its engine's by a burst of "
    "damaged pictures, which only they work on; *decode* and *engine* are all that those threads do, hand-offs "
    "included. Where one pool does both, all of it is *engine*.",
    "* *Sockets, HTTP, ASGI server* is a bare ASGI server that reads the same requests at the same rate and answers "
    "as many bytes, after as long as the server took. *The rest* of the event loop is framework, validation, "
    "batching, hand-offs and rendering; other threads of the machine that empty the caches make it dearer, too.",
    "* CPU time is time on a core, at work or not: waiting for memory, and a core that is shared or slowed, are in "
    "it. So compare a stage in a server with the same *alone*: on one thread; on one while the other cores spin in a "
    "few instructions, which costs nothing unless cores share more than memory (execution units, clock, host); and on "
    "all threads, which then adds what caches, memory and the interpreter lock cost.",
)


def _stage_table(columns: Sequence[Column]) -> list[str]:
    rows = {**STAGES, "total": "**process, total**", "unexplained": "not accounted for"}
    lines = _table(columns, rows)
    parts = _table(columns, {key: f"of it, {title}" for key, title in PARTS_OF_ENGINE.items()})[2:]
    after = 2 + list(STAGES).index("engine") + 1
    return [*lines[:after], *parts, *lines[after:]]


def _table(columns: Sequence[Column], titles: Mapping[str, str]) -> list[str]:
    found = [_rows(column) for column in columns]
    lines = [_line(["", *(column.name for column in columns)]), _line(["---"] + ["---:"] * len(columns))]
    for key, title in titles.items():
        cells = [_cell(rows.get(key), column.within.get(key)) for rows, column in zip(found, columns, strict=True)]
        lines.append(_line([title, *cells]))
    return lines


def _cell(values: Sequence[float] | None, within: str | None) -> str:
    if values:
        return f"{_number(statistics.median(values))} ({_number(min(values))} to {_number(max(values))})"
    return "" if within is None else f"in *{within}*"


def _number(value: float) -> str:
    """More digits for what is small."""
    digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:.{digits}f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
