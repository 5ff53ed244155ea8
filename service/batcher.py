"""The asyncio shell of one model: feeds free workers from the scheduler and keeps every promise.

Two steps per image: the trunk and the gate on a mixed batch, then the body at the decided width on a
dense batch. An image whose width is known without the gate takes both in one. Everything here runs on the
event loop except ``_run_trunk``, ``_run_body`` and ``_run_whole``, which run on worker threads and touch the
engine only.

An image whose caller has gone, or whose deadline has passed, is dropped when a batch is formed and
never disturbs its batch-mates; a batch that fails fails alone; a closed batcher answers everything.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import structlog

from service.engine.base import F32, Engine, Feature, Image
from service.errors import BackendError, DeadlineExceededError, DrainingError, QueueFullError, SlicewiseError
from service.request import Batch, Entry, Look, Route, Step, Window
from service.scheduler import Scheduler, Selection
from service.telemetry import ModelTelemetry, width_label

log = structlog.get_logger()

DRAIN_RETRY_S = 1.0
"""Retry-After of refusals at shutdown: another replica can take the request at once."""
LAST_BATCH_S = 5.0
"""How long a batch that is on a worker may outlast the drain limit; a thread cannot be killed."""


@dataclass(frozen=True, slots=True)
class Order:
    """One image to classify, and what routing needs.

    deadline_s  monotonic, inf without one. due_s orders the queues.
    place       as the scheduler expects it; the batcher sees to it that it is given back.
    """

    image: Image
    window: Window
    arrived_s: float
    due_s: float
    deadline_s: float = math.inf
    urgency: int = 3
    place: int = -1


Looks = Callable[[F32], list[Look]]
"""Gate logits [N, G] -> what to remember of each image; called on worker threads, for a batch at once."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the batcher returns: class logits [K], gate logits [G] or None, and where the time went."""

    logits_K: F32
    gate_logits_G: F32 | None
    route: Route
    queue_s: float
    trunk_s: float
    body_s: float


@dataclass(frozen=True, slots=True)
class _AfterTrunk:
    """An entry's payload between trunk and body."""

    feature: Feature
    gate_logits_G: F32


class Ticket:
    """The promise of one entry: its future, and whether a worker holds it now."""

    __slots__ = ("future", "running")

    def __init__(self, future: asyncio.Future[Outcome]) -> None:
        self.future, self.running = future, False

    def done(self) -> bool:
        return self.future.done()


class Batcher:
    """Owns the queues and the worker slots of one model.

    capacity  images that are admitted at most; when more lie in the queues, some have lost their
              callers and are swept out.
    """

    def __init__(
        self, engine: Engine, scheduler: Scheduler, looks: Looks, telemetry: ModelTelemetry, capacity: int
    ) -> None:
        self._engine, self._scheduler, self._looks, self._telemetry = engine, scheduler, looks, telemetry
        self._capacity = capacity
        self._free = engine.workers
        self._pool = ThreadPoolExecutor(engine.workers, thread_name_prefix="engine")
        self._running: dict[asyncio.Task[None], Batch] = {}
        self._closed = self._stopped = False
        telemetry.watch_queues(scheduler.waiting)
        self._steps = {Step.TRUNK: self._step_trunk, Step.BODY: self._step_body, Step.WHOLE: self._step_whole}

    @property
    def waiting(self) -> int:
        """Images in all queues."""
        return len(self._scheduler)

    async def submit(self, order: Order) -> Outcome:
        """Classify one image; resolves at the latest at its deadline.

        Raises DrainingError, DeadlineExceededError, BackendError. Cancelling the caller drops the
        image if no worker has it yet.
        """
        now_s = time.monotonic()
        if self._closed:
            self._scheduler.forget(order.place)
            raise DrainingError("the model is shutting down", DRAIN_RETRY_S)
        if self.waiting >= self._capacity:
            self._drop(self._scheduler.prune(now_s))
        ticket = Ticket(asyncio.get_running_loop().create_future())
        entry = Entry(
            promise=ticket, payload=order.image, window=order.window, arrived_s=order.arrived_s, due_s=order.due_s,
            queued_s=now_s, deadline_s=order.deadline_s, urgency=order.urgency, place=order.place,
        )  # fmt: skip
        self._scheduler.push(entry)
        self._pump()
        limit_s = None if order.deadline_s == math.inf else order.deadline_s - now_s
        try:
            async with asyncio.timeout(limit_s):
                return await ticket.future
        except TimeoutError as error:
            raise _missed(order, "late" if ticket.running else "expired") from error

    async def close(self, drain_s: float) -> None:
        """Finish what waits within ``drain_s`` seconds, then refuse the rest; every promise resolves."""
        if self._stopped:
            return
        self._closed = True
        give_up_s = time.monotonic() + drain_s
        while self._running and time.monotonic() < give_up_s:
            await asyncio.wait(self._running, timeout=give_up_s - time.monotonic())
        self._stopped = True
        if self._running:
            await asyncio.wait(self._running, timeout=LAST_BATCH_S)
        for batch in self._running.values():
            for entry in batch.entries:
                _break(entry, BackendError(f"the model did not finish its batch within {LAST_BATCH_S:g} s of shutdown"))
        for entry in self._scheduler.clear():
            self._forget_trunk_row(entry)
            _break(entry, DrainingError("the service shut down before this image was computed", DRAIN_RETRY_S))
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _pump(self) -> None:
        """Give every free worker a batch, as long as something waits."""
        now_s = time.monotonic()
        while self._free and not self._stopped:
            selection = self._scheduler.next_batch(now_s)
            self._drop(selection)
            if selection.batch is None:
                break
            self._free -= 1
            # A context of its own: the batch is nobody's request, and must not log under somebody's id.
            task = asyncio.create_task(self._run(selection.batch, now_s), context=contextvars.Context())
            self._running[task] = selection.batch
            task.add_done_callback(self._running.pop)

    async def _run(self, batch: Batch, now_s: float) -> None:
        """One batch on one worker slot; whatever happens, its entries move on or are answered."""
        self._telemetry.batch_dispatched(batch.entries, now_s)
        for entry in batch.entries:
            _set_running(entry, True)
        try:
            await self._steps[batch.step](batch, now_s)
        except Exception as error:  # the engine is foreign code; its failure is this batch's answer
            self._scheduler.finished(batch, time.monotonic())
            width = width_label(batch.width, "trunk")
            log.error("batch_failed", width=width, images=len(batch.entries), exc_info=error)
            for entry in batch.entries:
                self._forget_trunk_row(entry)
                if batch.step is Step.TRUNK:
                    self._scheduler.forget(entry.place)
                _break(entry, BackendError(f"the model failed on a batch of {len(batch.entries)} images"))
        finally:
            self._free += 1
            self._pump()

    async def _step_trunk(self, batch: Batch, now_s: float) -> None:
        loop = asyncio.get_running_loop()
        spent_s: list[float] = []
        try:
            results = await loop.run_in_executor(self._pool, self._run_trunk, batch.entries, spent_s)
        except BaseException:
            self._trunk_failed(batch, spent_s)
            raise
        seconds = sum(spent_s)
        self._telemetry.batch_done(None, len(batch.entries), seconds)
        done_s = time.monotonic()
        self._scheduler.finished(batch, done_s, trunk_s=done_s - now_s)
        for entry, (after, look) in zip(batch.entries, results, strict=True):
            _set_running(entry, False)
            self._scheduler.push(
                replace(
                    entry,
                    payload=after,
                    look=look,
                    queued_s=done_s,
                    waited_s=entry.waited_s + now_s - entry.queued_s,
                    trunk_s=seconds,
                )
            )

    def _trunk_failed(self, batch: Batch, spent_s: list[float]) -> None:
        """Account the rows of a batch whose trunk had run when something behind it failed."""
        if spent_s:
            self._telemetry.batch_done(None, len(batch.entries), spent_s[0])
            for _ in batch.entries:
                self._telemetry.trunk_row(None, False)

    async def _step_body(self, batch: Batch, now_s: float) -> None:
        width = batch.width
        assert width is not None, "a body has a width: this is a bug"
        loop = asyncio.get_running_loop()
        logits_NK, seconds = await loop.run_in_executor(self._pool, partial(self._run_body, width, batch.entries))
        self._telemetry.batch_done(width, len(batch.entries), seconds)
        done_s = time.monotonic()
        self._scheduler.finished(batch, done_s, body_s=done_s - now_s)
        for entry, route, logits_K in zip(batch.entries, batch.routes, logits_NK, strict=True):
            self._answer(entry, route, logits_K, now_s, entry.trunk_s, seconds)

    async def _step_whole(self, batch: Batch, now_s: float) -> None:
        width, rows = batch.width, len(batch.entries)
        assert width is not None, "a whole network has a width: this is a bug"
        loop = asyncio.get_running_loop()
        spent_s: list[float] = []
        try:
            logits_NK = await loop.run_in_executor(self._pool, self._run_whole, width, batch.entries, spent_s)
        except BaseException:
            self._trunk_failed(batch, spent_s)
            raise
        trunk_s, body_s = spent_s
        self._telemetry.batch_done(None, rows, trunk_s)
        self._telemetry.batch_done(width, rows, body_s)
        done_s = time.monotonic()
        self._scheduler.finished(batch, done_s, trunk_s, done_s - now_s - trunk_s)
        for entry, route, logits_K in zip(batch.entries, batch.routes, logits_NK, strict=True):
            self._answer(entry, route, logits_K, now_s, trunk_s, body_s)

    def _answer(self, entry: Entry, route: Route, logits_K: F32, now_s: float, trunk_s: float, body_s: float) -> None:
        """Account one computed image and keep its promise; ``now_s``: when its last batch was dispatched."""
        self._telemetry.body_row(route)
        if not np.isfinite(logits_K).all():
            _break(entry, BackendError("the model answered this image with numbers that are not finite"))
            return
        queue_s = entry.waited_s + now_s - entry.queued_s
        gate_logits_G = None if entry.look is None else entry.payload.gate_logits_G
        _keep(entry, Outcome(logits_K, gate_logits_G, route, queue_s, trunk_s, body_s))

    def _run_trunk(self, entries: Sequence[Entry], spent_s: list[float]) -> list[tuple[_AfterTrunk, Look]]:
        """On a worker: trunk, then gate and looks. Appends the seconds of each as soon as it is done."""
        start_s = time.perf_counter()
        features, gate_inputs_NR = self._engine.trunk([entry.payload for entry in entries])
        spent_s.append(time.perf_counter() - start_s)
        logits_NG = self._engine.gate(gate_inputs_NR)
        rows = zip(features, logits_NG, self._looks(logits_NG), strict=True)
        results = [(_AfterTrunk(feature, logits_G), look) for feature, logits_G, look in rows]
        spent_s.append(time.perf_counter() - start_s - spent_s[0])
        return results

    def _run_body(self, width: int, entries: Sequence[Entry]) -> tuple[F32, float]:
        start_s = time.perf_counter()
        logits_NK = self._engine.body(width, [entry.payload.feature for entry in entries])
        return logits_NK, time.perf_counter() - start_s

    def _run_whole(self, width: int, entries: Sequence[Entry], spent_s: list[float]) -> F32:
        """On a worker: trunk and body. Appends the seconds of each as soon as it is done."""
        start_s = time.perf_counter()
        features = self._engine.trunk([entry.payload for entry in entries]).features
        spent_s.append(time.perf_counter() - start_s)
        logits_NK = self._engine.body(width, features)
        spent_s.append(time.perf_counter() - start_s - spent_s[0])
        return logits_NK

    def shed(self, urgency: int) -> bool:
        """Refuse one image that waits and is less urgent, for a more urgent one; False when there is none."""
        entry = self._scheduler.shed(urgency)
        if entry is not None:
            self._give_up([entry], urgency)
        return entry is not None

    def make_room(self, now_s: float, deadline_s: float, window: Window, urgency: int) -> bool:
        """Whether one more image would be in time; less urgent ones that wait are refused where that helps."""
        given_up = self._scheduler.make_room(now_s, deadline_s, window, urgency)
        self._give_up(given_up or [], urgency)
        return given_up is not None

    def _give_up(self, entries: Sequence[Entry], urgency: int) -> None:
        for entry in entries:
            self._forget_trunk_row(entry)
            _break(entry, QueueFullError(f"given up for an image of urgency {urgency}", DRAIN_RETRY_S))

    def _drop(self, selection: Selection) -> None:
        """Account entries that will never be computed and answer those that still have a caller."""
        dropped = self._telemetry.telemetry.dropped
        for reason, entries in (("cancelled", selection.cancelled), ("expired", selection.expired)):
            for entry in entries:
                dropped.labels(reason).inc()
                self._forget_trunk_row(entry)
                _break(
                    entry,
                    DeadlineExceededError("the deadline could not be met any more, the image has waited", "expired"),
                )

    def _forget_trunk_row(self, entry: Entry) -> None:
        """Account the trunk row of an entry whose body will never run."""
        if entry.look is not None:
            self._telemetry.trunk_row(None, True)


def _missed(order: Order, outcome: str) -> DeadlineExceededError:
    budget_ms = (order.deadline_s - order.arrived_s) * 1e3
    return DeadlineExceededError(f"no answer within the latency budget of {budget_ms:g} ms", outcome)


def _set_running(entry: Entry, running: bool) -> None:
    assert isinstance(entry.promise, Ticket), "submit makes the tickets: this is a bug"
    entry.promise.running = running


def _keep(entry: Entry, outcome: Outcome) -> None:
    assert isinstance(entry.promise, Ticket), "submit makes the tickets: this is a bug"
    if not entry.promise.done():
        entry.promise.future.set_result(outcome)


def _break(entry: Entry, error: SlicewiseError) -> None:
    assert isinstance(entry.promise, Ticket), "submit makes the tickets: this is a bug"
    if not entry.promise.done():
        entry.promise.future.set_exception(error)
