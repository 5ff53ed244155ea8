"""What an account is measured on, and its rounds: servers and loops that take turns."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from loadtest.account import Account, Column, Costs, Observation, Section, loop_costs, loop_signs
from loadtest.account_readings import (
    Counters,
    WatchedFleet,
    account_counters,
    decoding_threads,
    idle_ms_per_s,
    metrics_counters,
    run_loop,
    spinning,
)
from loadtest.arms import BenchError, HttpArm, Window
from loadtest.comparisons import FASTAPI, WIDTH_HEADER, Network, peer_flags, script, slicewise_server
from loadtest.corpus import EncodedImage, read_images
from loadtest.machine import describe, usable_cores
from loadtest.results import Run
from loadtest.servers import ServerSpec

SLICEWISE = "slicewise"
ECHO = ServerSpec("echo", (sys.executable, "-m", "loadtest.peers.echo", "--port", "{port}"), "/health")
WITHIN_LOOP = {"resize": "decode", "normalise": "engine"}
WITHIN_SERVER = {
    **WITHIN_LOOP, "decode": "engine", "answer": "event loop: the rest", "workers": "decode, engine",
    "trunk": "engine", "gate": "engine", "body": "engine",
}  # fmt: skip

Report = Callable[[str], None]
Round = tuple[Costs, dict[str, float]]
"""Costs and signs."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. idle_s: how long each server is watched without a request. work: folder for graphs, logs."""

    network: Network
    widths: tuple[int, ...]
    clients: int
    rounds: int
    window: Window
    idle_s: float
    work: Path
    serve_flags: tuple[str, ...] = ()

    def setup(self) -> dict[str, str]:
        """For the report."""
        return {
            "model": self.network.model,
            "images": self.network.images.name,
            "clients": str(self.clients),
            "threads": str(usable_cores()),
            "rounds": str(self.rounds),
            "window": f"{self.window.seconds:g} s",
            "warm-up": f"{self.window.warm_up_s:g} s",
            "watched without a request": f"{self.idle_s:g} s",
            "flags of slicewise serve": " ".join(self.serve_flags) or "none",
        }


class Source(Protocol):
    """What fills a column."""

    @property
    def name(self) -> str: ...

    @property
    def within(self) -> Mapping[str, str]: ...

    def measure(self, fleet: WatchedFleet, window: Window) -> Round:
        """One round. Raises BenchError and ServerError."""


@dataclass(frozen=True, slots=True)
class Served:
    """A server under load, then without, then an echo at the rate that was found.

    is_clocked  whether it clocks its stages itself; if not, its threads tell them.
    """

    name: str
    arm: HttpArm
    image: EncodedImage
    idle_s: float
    is_clocked: bool
    within: Mapping[str, str] = field(default_factory=dict)

    def measure(self, fleet: WatchedFleet, window: Window) -> Round:
        run = self.arm.measure(fleet, window)
        spent = fleet.spent()
        with fleet.running(self.arm.server) as server:
            headers = {"Content-Type": self.image.media_type}
            answer = server.ask("POST", self.arm.path, self.image.data, headers)[1]
            idle = idle_ms_per_s(server.pid, self.idle_s)
            decoders = frozenset() if self.is_clocked else decoding_threads(server, self.arm.path)
            pid = server.pid
        seen = Observation(run, spent, pid, self._http_ms(fleet, window, run, len(answer)), decoders)
        return seen.costs_by_clock() if self.is_clocked else seen.costs_by_thread(), seen.signs(idle)

    def _http_ms(self, fleet: WatchedFleet, window: Window, run: Run, answer_bytes: int) -> float:
        """CPU milliseconds per request of the echo."""
        path = f"/?delay_ms={run.p50_ms or 0:.1f}&answer_bytes={answer_bytes}"
        echoed = replace(self.arm, name="echo", server=ECHO, path=path).measure(fleet, window)
        return sum(thread.cpu_s for thread in fleet.spent().threads.values()) / echoed.images * 1e3


@dataclass(frozen=True, slots=True)
class Alone:
    """A command that does the same work without HTTP, see ``run_loop``, beside so many spinning processes."""

    name: str
    command: tuple[str, ...]
    within: Mapping[str, str] = field(default_factory=dict)
    spinning: int = 0

    def measure(self, fleet: WatchedFleet, window: Window) -> Round:
        with spinning(self.spinning):
            said = run_loop(self.command, window)
        return loop_costs(said), loop_signs(said)


def measure(plan: Plan, report: Report) -> Account:
    """All rounds of all widths. Raises BenchError, ServerError, and ValueError for a width that does not export."""
    measured_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    flags = {width: peer_flags(plan.network, plan.work, width) for width in plan.widths}
    tuned = {width: _tuned(given) for width, given in flags.items()}
    ours = slicewise_server(plan.network, plan.serve_flags)
    counters: dict[ServerSpec, tuple[str, Counters]] = {spec: ("/account", account_counters) for spec in tuned.values()}
    counters[ours] = ("/metrics", metrics_counters)
    with WatchedFleet(plan.work, counters) as fleet:
        sections = []
        for width in plan.widths:
            report(f"width {width}")
            found = sources(plan, width, ours, tuned[width], flags[width])
            sections.append(Section(width, rounds(found, fleet, plan, report)))
    return Account(describe(), measured_at, plan.setup(), tuple(sections))


def rounds(found: list[Source], fleet: WatchedFleet, plan: Plan, report: Report) -> tuple[Column, ...]:
    """The sources take turns, forwards and backwards, so that what drifts on the machine drifts for all."""
    done: dict[str, list[Round]] = {source.name: [] for source in found}
    for index in range(plan.rounds):
        window = replace(plan.window, seed=plan.window.seed + index)
        for source in found if index % 2 == 0 else reversed(found):
            done[source.name].append(source.measure(fleet, window))
        totals = ", ".join(f"{name} {each[-1][0]['total']:.2f}" for name, each in done.items())
        report(f"round {index + 1}/{plan.rounds}, CPU ms per image: {totals}")
    return tuple(
        Column(source.name, tuple(costs for costs, _ in each), tuple(signs for _, signs in each), source.within)
        for source, each in zip(found, done.values(), strict=True)
    )


def sources(
    plan: Plan, width: int, ours: ServerSpec, tuned: ServerSpec, graph_flags: list[str]
) -> list[Source]:  # fmt: skip
    """The columns, in the order of the table: each server, and its work alone on all threads and on one."""
    image = read_images(plan.network.images, 1, plan.window.seed)[0]
    forced = f"{WIDTH_HEADER}={width}"
    ours_arm = HttpArm(SLICEWISE, ours, "/v1/classify", plan.network.images, plan.clients, mix=forced)
    tuned_arm = HttpArm(FASTAPI, tuned, "/classify", plan.network.images, plan.clients)
    return [
        Served(SLICEWISE, ours_arm, image, plan.idle_s, is_clocked=False, within=WITHIN_SERVER),
        *_alone(SLICEWISE, lambda threads: _our_loop(plan, width, threads), WITHIN_LOOP),
        Served(FASTAPI, tuned_arm, image, plan.idle_s, is_clocked=True),
        *_alone(FASTAPI, lambda threads: _tuned_loop(plan, graph_flags, threads), {}),
    ]


def _alone(
    name: str, command: Callable[[int], tuple[str, ...]], within: Mapping[str, str]
) -> list[Alone]:  # fmt: skip
    """The same work on all threads, on one beside spinning cores, and on one."""
    one, cores = Alone(f"{name} alone, 1 thread", command(1), within), usable_cores()
    if cores == 1:
        return [one]
    every = Alone(f"{name} alone, {cores} threads", command(cores), within)
    return [every, replace(one, name=f"{one.name}, other cores spinning", spinning=cores - 1), one]


def _tuned(graph_flags: list[str]) -> ServerSpec:
    command = (sys.executable, "-m", "loadtest.peers.fastapi_onnx", "--port", "{port}", "--account", *graph_flags)
    return ServerSpec("fastapi_onnx", command, "/health")


def _our_loop(plan: Plan, width: int, threads: int) -> tuple[str, ...]:
    if plan.network.repository is None:
        raise BenchError("the loop needs a repository")
    return (
        script("slicewise"), "profile", "--repository", str(plan.network.repository.absolute()),
        "--model", plan.network.model, "--workers", str(threads), "--loop-only", "true", "--loop-mix", f"{width}:1",
        "--loop-images", str(plan.network.images.absolute()), "--loop-s", f"{plan.window.seconds:g}",
        "--loop-warm-up-s", f"{plan.window.warm_up_s:g}",
    )  # fmt: skip


def _tuned_loop(plan: Plan, graph_flags: list[str], threads: int) -> tuple[str, ...]:
    return (
        sys.executable, "-m", "loadtest.account_loop", *graph_flags, "--images", str(plan.network.images.absolute()),
        "--threads", str(threads), "--seconds", f"{plan.window.seconds:g}", "--warm-up-s",
        f"{plan.window.warm_up_s:g}",
    )  # fmt: skip
