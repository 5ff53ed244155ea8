"""``slicewise scheduler``: microseconds of the scheduler per image while many wait. Prints one JSON document.

Nothing is computed: batches take the time of the latency table, on a clock of the study's own. For every image
that is done another one comes, so that always as many wait; each is admitted, pushed, taken for its trunk, pushed
again where the gate is asked, and taken for its body. Only the scheduler's own methods are timed.
"""

from __future__ import annotations

import heapq
import json
import math
import time
from collections.abc import Callable
from itertools import count
from statistics import median
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from models.checkpoint import Manifest
from service.app import load_checkpoints
from service.hosting import curve_of, gate_decision
from service.latency import LatencyTable, LiveTimes
from service.policies import ON_CPU, Policy, policy_named
from service.request import Batch, Entry, Look, Step, Window
from service.scheduler import Scheduler
from service.settings import SettingError, Settings, usable_cores
from service.simulator import profiled_times

KNOWN_LOOKS = 512
SPAN = (0.5, 2.0)
"""Deadlines lie evenly between these multiples of the time that all that waits takes at the narrowest width."""


class SchedulerSettings(Settings):
    """Measure the scheduler by itself, with many images waiting, under several policies."""

    waiting: int = Field(10_000, ge=1, description="images that wait all the time")
    images: int = Field(2_000, ge=1, description="images of each round")
    rounds: int = Field(5, ge=1, description="rounds of each policy")
    policies: Annotated[list[str], NoDecode] = Field(
        ["gate_slack", "gate", "slackfit", "fixed:0"], min_length=1, description="separated by commas"
    )

    @field_validator("policies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value


class _Nobody:
    """A promise that is never kept."""

    def done(self) -> bool:
        return False


class _Bench:
    """A scheduler whose queues are kept at one length. spent_s: inside its methods, so far."""

    def __init__(self, scheduler: Scheduler, times: LiveTimes, workers: int, looks: list[Look], waiting: int) -> None:
        self._scheduler, self._times, self._workers = scheduler, times, workers
        self._looks, self._waiting = looks, waiting
        self._rng, self._order, self._caller = np.random.default_rng(0), count(), _Nobody()
        self._running: list[tuple[float, int, Batch]] = []
        self._now_s, self.spent_s = 0.0, 0.0
        costs = times.costs()
        self._all_s = waiting * (costs.trunk_s + costs.body_s[0]) / workers
        self._window = Window(0, len(costs.body_s) - 1)
        self.run(waiting)

    def run(self, images: int) -> None:
        """Let so many images in, and workers take what is over."""
        for _ in range(images):
            self._arrive()
            while len(self._scheduler) > self._waiting:
                self._work()

    def _timed(self, call: Callable[[], Any]) -> Any:
        began_s = time.perf_counter()
        result = call()
        self.spent_s += time.perf_counter() - began_s
        return result

    def _arrive(self) -> None:
        now_s, scheduler, window = self._now_s, self._scheduler, self._window
        due_s = now_s + self._all_s * self._rng.uniform(*SPAN)
        self._timed(lambda: scheduler.make_room(now_s, due_s, window, 3))
        place = self._timed(lambda: scheduler.expect(now_s, due_s, True, window))
        # Late ones are kept: what is dropped would empty the queue.
        entry = Entry(self._caller, None, window, now_s, due_s, now_s, math.inf, place=place)
        self._timed(lambda: scheduler.push(entry))

    def _work(self) -> None:
        scheduler = self._scheduler
        if len(self._running) == self._workers:
            self._finish()
        now_s = self._now_s
        batch = self._timed(lambda: scheduler.next_batch(now_s)).batch
        heapq.heappush(self._running, (now_s + sum(self._seconds(batch)), next(self._order), batch))

    def _finish(self) -> None:
        self._now_s, _, batch = heapq.heappop(self._running)
        now_s, scheduler, seconds = self._now_s, self._scheduler, self._seconds(batch)
        self._timed(lambda: scheduler.finished(batch, now_s, *seconds))
        if batch.step is Step.TRUNK:
            picks = self._rng.integers(KNOWN_LOOKS, size=len(batch.entries))
            pairs = zip(batch.entries, picks, strict=True)
            seen = [e.after_trunk(e.payload, self._looks[pick], now_s, 0.0, 0.0) for e, pick in pairs]
            self._timed(lambda: scheduler.push_seen(seen, now_s))  # an exit's images are done

    def _seconds(self, batch: Batch) -> tuple[float, float]:
        images, table = len(batch.entries), self._times.table
        trunk_s = 0.0 if batch.step is Step.BODY else table.seconds(None, images)
        return trunk_s, 0.0 if batch.width is None else table.seconds(batch.width, images)


def _looks(policy: Policy, choices: int) -> list[Look]:
    """Of images of every kind: probabilities of being right that grow with the width."""
    if not policy.asks_gate:
        return []
    p_NG = np.sort(np.random.default_rng(0).uniform(0.5, 1.0, (KNOWN_LOOKS, choices)), axis=1).astype(np.float32)
    wish_N = (p_NG - np.linspace(0, 0.1, choices, dtype=np.float32)).argmax(1)
    return policy.looks(p_NG, wish_N, wish_N)


def _measure(name: str, manifest: Manifest, table: LatencyTable, settings: SchedulerSettings) -> float:
    """Microseconds per image under one policy, the median of the rounds. Raises ValueError for a name that is none."""
    times, choices = LiveTimes(table), manifest.gate.choices
    policy = policy_named(name, choices, times, curve_of(manifest, gate_decision(manifest, settings)), ON_CPU)
    workers, looks = settings.workers or usable_cores(), _looks(policy, len(choices))
    scheduler = Scheduler(policy, times, workers, has_exit=manifest.has_exit)
    bench, spent_us = _Bench(scheduler, times, workers, looks, settings.waiting), []
    bench.run(settings.images)
    for _ in range(settings.rounds):
        before_s = bench.spent_s
        bench.run(settings.images)
        spent_us.append((bench.spent_s - before_s) / settings.images * 1e6)
    return median(spent_us)


def study(settings: SchedulerSettings, say: Callable[[str], object]) -> None:
    """Measure the first model's table under every policy. Raises SettingError."""
    checkpoint = next(iter(load_checkpoints(settings).values()))
    _, table = profiled_times(checkpoint, settings)
    try:
        found = {name: _measure(name, checkpoint.manifest, table, settings) for name in settings.policies}
    except ValueError as error:
        raise SettingError(f"setting policies: {error}") from error
    workers = settings.workers or usable_cores()
    say(json.dumps({"waiting": settings.waiting, "workers": workers, "us_per_image": found}))
