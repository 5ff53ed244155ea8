"""The stage of a fault scenario: a server, a load on it, and what is done to it meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.arms import BenchError
from loadtest.checks import Check
from loadtest.comparisons import Network, slicewise_server
from loadtest.fault_record import (
    Allowance,
    Counts,
    Done,
    Evidence,
    Request,
    ScenarioRecord,
    common_checks,
    count,
)
from loadtest.open_loop import Limits, Playback, Post, play
from loadtest.outcomes import Exchange
from loadtest.rehearsal import Corpus
from loadtest.server_state import Metrics
from loadtest.servers import ServerSpec
from loadtest.victim import Victim, sampled

PLACES = 256
"""Capacity of the queue, and most images in one request: so one request can ask whether all places are free."""
WARM_S = 5.0
"""Load before anything is read, so that memory is at its level."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What all scenarios share. work: folder for logs and what scenarios need."""

    network: Network
    corpus: Corpus
    rate_per_s: float
    seconds: float
    limit_s: float
    work: Path
    seed: int = 0

    def spec(self, *flags: str) -> ServerSpec:
        """The service as every scenario starts it, with more flags."""
        sizes = ("--queue-capacity-images", str(PLACES), "--batch-limit-images", str(PLACES))
        return slicewise_server(self.network, (*sizes, *flags))

    def requests(self) -> list[Request]:
        return self.corpus.requests(self.rate_per_s, self.seconds, self.seed)

    def at(self, share: float) -> float:
        """An instant of the load, in s."""
        return self.seconds * share


@dataclass(frozen=True, slots=True)
class Act:
    """Something to do to the server at an instant of the load; it may take its time."""

    at_s: float
    title: str
    do: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Aftermath:
    """What a scenario judges by, beside the bars of every one."""

    exchanges: Sequence[Exchange]
    counts: Counts
    done: Sequence[Done]
    before: Metrics
    after: Metrics | None


@dataclass(frozen=True, slots=True)
class Scene:
    """A scenario that has been set up.

    requests    the load. acts: what is done meanwhile, in order.
    allowances  what may happen to good requests, given when things were done.
    judge       bars of its own, and facts for the report.
    injected    images that were made to fail, asked after the load.
    ends        whether the server is meant to have ended.
    """

    server: Victim
    requests: list[Request]
    acts: list[Act] = field(default_factory=list)
    allowances: Callable[[Sequence[Done]], list[Allowance]] = lambda done: []
    judge: Callable[[Aftermath], tuple[list[Check], dict[str, str]]] = lambda aftermath: ([], {})
    injected: Callable[[], int] = lambda: 0
    ends: bool = False


SetUp = Callable[[Plan, contextlib.ExitStack], Scene]


@dataclass(frozen=True, slots=True)
class Scenario:
    """Its name, what happens in words, and what sets it up: the server, started, and all that goes with it."""

    name: str
    title: str
    set_up: SetUp


def perform(scenario: Scenario, plan: Plan) -> ScenarioRecord:
    """Set up, load, hurt, and judge. Raises BenchError and ServerError."""
    with contextlib.ExitStack() as stack:
        scene = scenario.set_up(plan, stack)
        server = scene.server
        _warm(server, plan)
        before, metrics_before = server.state(), server.metrics()
        with sampled(server, every_s=0.5) as samples:
            playback, done = _play(server, scene, plan)
        exchanges = playback.exchanges
        after, metrics_after, places = None, None, 0
        if not scene.ends:
            places = plan.corpus.fill_queue(server, PLACES)
            after, metrics_after = server.settled(before.descriptors), server.metrics()
        counts = count(scene.requests, exchanges, scene.allowances(done), _span(done, plan.seconds))
        evidence = Evidence(
            counts, before, after, max((sample.resident_bytes for sample in samples), default=0), places, PLACES,
            scene.injected(),
        )  # fmt: skip
        checks, facts = scene.judge(Aftermath(exchanges, counts, done, metrics_before, metrics_after))
        every = (*common_checks(evidence, plan.limit_s), *checks)
    return ScenarioRecord(scenario.name, scenario.title, evidence, tuple(done), facts, every)


def _warm(server: Victim, plan: Plan) -> None:
    """Bring memory to its level: the load for a while, and the queue full once."""
    requests = plan.corpus.requests(plan.rate_per_s, WARM_S, plan.seed + 1)
    _send(server, requests, plan)
    if plan.corpus.fill_queue(server, PLACES) != PLACES:
        raise BenchError(f"{server.spec.name}: a full queue was not answered right before any fault; {server.log_path}")
    server.settled(0, limit_s=2.0)


def _send(server: Victim, requests: Sequence[Request], plan: Plan) -> Playback:
    posts = [
        Post(each.at_s, each.image.data, {"Content-Type": each.image.media_type, **each.headers}) for each in requests
    ]
    return play(server.url + plan.corpus.path, posts, Limits(request_s=plan.limit_s))


def _span(done: Sequence[Done], seconds: float) -> tuple[float, float]:
    """From the first deed to the end of the last; the whole load where nothing was done."""
    return (done[0].began_s, done[-1].ended_s) if done else (0.0, seconds)


def _play(server: Victim, scene: Scene, plan: Plan) -> tuple[Playback, list[Done]]:
    with _acting(scene.acts) as noted:
        playback = _send(server, scene.requests, plan)
    began_s = playback.began_s
    return playback, [Done(each.title, each.began_s - began_s, each.ended_s - began_s) for each in noted]


@contextlib.contextmanager
def _acting(acts: Sequence[Act]) -> Iterator[list[Done]]:
    """A thread does the acts, each at its instant or when the one before has ended; what it raises is raised at last.

    Instants by ``time.perf_counter``.
    """
    noted: list[Done] = []
    failed: list[BaseException] = []
    began_s = time.perf_counter()

    def run() -> None:
        try:
            for act in acts:
                time.sleep(max(0.0, began_s + act.at_s - time.perf_counter()))
                act_began_s = time.perf_counter()
                act.do()
                noted.append(Done(act.title, act_began_s, time.perf_counter()))
        except BaseException as error:  # noqa: BLE001  # the thread that waits raises it
            failed.append(error)

    thread = threading.Thread(target=run, name="acts", daemon=True)
    thread.start()
    yield noted
    thread.join()
    if failed:
        raise failed[0]
