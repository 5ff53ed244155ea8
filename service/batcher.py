"""The asyncio shell of one model: feeds free workers from the scheduler and keeps every promise.

Two steps per image: the trunk and the gate on a mixed batch, then the body at the decided width on a
dense batch. An image whose width is known without the gate takes both in one. Everything here runs on the
event loop except ``_work``; what it runs is in ``service.execution`` and touches the engine only.

An image whose caller has gone, or whose deadline has passed, is dropped when a batch is formed and
never disturbs its batch-mates; a batch that fails fails alone; a closed batcher answers everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import structlog

from service.engine.base import F32, Engine, Image
from service.errors import BackendError, DeadlineExceededError, DrainingError, QueueFullError, SlicewiseError
from service.execution import Execution, Looks
from service.latency import Overhead
from service.request import Entry, Route, Step, Window
from service.scheduler import Scheduler, Selection
from service.telemetry import ModelTelemetry, width_label

log = structlog.get_logger()

DRAIN_RETRY_S = 1.0
"""Retry-After of refusals at shutdown: another replica can take the request at once."""
WORKER_NICENESS = 5
"""Of the threads that compute: the event loop is a few microseconds of work that everybody waits for."""
LAST_BATCH_S = 5.0
"""How long a batch that is on a worker may outlast the drain limit; a thread cannot be killed."""


@dataclass(frozen=True, slots=True)
class Order:
    """One image to classify, and what routing needs.

    deadline_s  monotonic: when the caller is told that it is too late; inf without one.
    done_by_s   when its batch has to be done for the answer to be in time. due_s orders the queues.
    place       as the scheduler expects it; the batcher sees to it that it is given back.
    spend       is told what was computed for the image, in MAdds, also when that is after its answer.
    """

    image: Image
    window: Window
    arrived_s: float
    due_s: float
    done_by_s: float = math.inf
    deadline_s: float = math.inf
    urgency: int = 3
    place: int = -1
    spend: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the batcher returns: class logits [K], gate logits [G] or None, and where the time went.

    done_s  monotonic, when its last batch was done.
    """

    logits_K: F32
    gate_logits_G: F32 | None
    route: Route
    queue_s: float
    trunk_s: float
    body_s: float
    done_s: float


class Ticket:
    """The promise of one entry: its future, whether a worker holds it now, and who pays for it."""

    __slots__ = ("future", "running", "spend")

    def __init__(self, future: asyncio.Future[Outcome], spend: Callable[[int], None] | None) -> None:
        self.future, self.running, self.spend = future, False, spend

    def done(self) -> bool:
        return self.future.done()


class Batcher:
    """Owns the queues and the worker slots of one model.

    overhead  is told what batches take of the cores.
    capacity  images that are admitted at most; when more lie in the queues, some have lost their
              callers and are swept out.
    ahead     batches that wait ready-made for the next free worker, who then need not wait for the event loop.
    """

    def __init__(  # noqa: PLR0913, PLR0917  # the parts that it joins
        self,
        engine: Engine,
        scheduler: Scheduler,
        looks: Looks,
        telemetry: ModelTelemetry,
        overhead: Overhead,
        capacity: int,
        ahead: int = 0,
    ) -> None:
        self._engine, self._scheduler, self._looks, self._telemetry = engine, scheduler, looks, telemetry
        self._overhead = overhead
        self._capacity = capacity
        self._free = engine.workers + ahead
        self._pool = ThreadPoolExecutor(engine.workers, thread_name_prefix="engine", initializer=_yield_to_others)
        self._running: set[Execution] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = self._stopped = False
        telemetry.watch_queues(scheduler.waiting)
        self._finish = {Step.TRUNK: self._finish_trunk, Step.BODY: self._finish_body, Step.WHOLE: self._finish_whole}

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
        loop = asyncio.get_running_loop()
        ticket = Ticket(loop.create_future(), order.spend)
        entry = Entry(
            promise=ticket, payload=order.image, window=order.window, arrived_s=order.arrived_s, due_s=order.due_s,
            queued_s=now_s, deadline_s=order.done_by_s, urgency=order.urgency, place=order.place,
        )  # fmt: skip
        self._scheduler.push(entry)
        self._pump()
        if order.deadline_s == math.inf:
            return await ticket.future
        at_deadline = loop.call_later(order.deadline_s - now_s, _miss, order, ticket)
        try:
            return await ticket.future
        finally:
            at_deadline.cancel()

    async def close(self, drain_s: float) -> None:
        """Finish what waits within ``drain_s`` seconds, then refuse the rest; every promise resolves."""
        if self._stopped:
            return
        self._closed = True
        await self._wait_until_idle(drain_s)
        self._stopped = True
        await self._wait_until_idle(LAST_BATCH_S)
        for execution in self._running:
            for entry in execution.batch.entries:
                _break(entry, BackendError(f"the model did not finish its batch within {LAST_BATCH_S:g} s of shutdown"))
        for entry in self._scheduler.clear():
            self._forget_trunk_row(entry)
            _break(entry, DrainingError("the service shut down before this image was computed", DRAIN_RETRY_S))
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _wait_until_idle(self, limit_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._idle.wait()

    def _pump(self) -> None:
        """Give every free worker a batch, as long as something waits."""
        now_s = time.monotonic()
        while self._free and not self._stopped:
            selection = self._scheduler.next_batch(now_s)
            self._drop(selection)
            if selection.batch is None:
                break
            self._dispatch(Execution(selection.batch), now_s)

    def _dispatch(self, execution: Execution, now_s: float) -> None:
        self._free -= 1
        self._running.add(execution)
        self._idle.clear()
        self._telemetry.batch_dispatched(execution.batch.entries, now_s)
        for entry in execution.batch.entries:
            _set_running(entry, True)
        self._pool.submit(self._work, execution, asyncio.get_running_loop())

    def _work(self, execution: Execution, loop: asyncio.AbstractEventLoop) -> None:
        """On a worker thread. No future in between: what waits for the batch waits for its own promises."""
        execution.run(self._engine, self._looks)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for this batch any more
            loop.call_soon_threadsafe(self._over, execution)

    def _over(self, execution: Execution) -> None:
        """One batch is off its worker; whatever happened, its entries move on or are answered."""
        try:
            self._settle(execution)
        finally:
            self._free += 1
            self._running.discard(execution)
            self._pump()
            if not self._running:
                self._idle.set()

    def _settle(self, execution: Execution) -> None:
        batch = execution.batch
        self._overhead.worked(execution.cpu_s, 0 if batch.step is Step.TRUNK else len(batch.entries))
        self._overhead.learn(time.monotonic(), time.process_time())
        try:
            if execution.error is not None:
                raise execution.error
            self._finish[batch.step](execution)
        except Exception as error:  # the engine is foreign code; its failure is this batch's answer
            log.error(
                "batch_failed", width=width_label(batch.width, "trunk"), images=len(batch.entries), exc_info=error
            )
            self._fail(execution)

    def _fail(self, execution: Execution) -> None:
        batch = execution.batch
        self._scheduler.finished(batch, time.monotonic())
        if execution.trunk_s:  # the rows of a trunk that had run when something behind it failed
            self._telemetry.batch_done(None, len(batch.entries), execution.trunk_s)
            for _ in batch.entries:
                self._telemetry.trunk_row(None, False)
        for entry in batch.entries:
            self._forget_trunk_row(entry)
            if batch.step is Step.TRUNK:
                self._scheduler.forget(entry.place)
            _break(entry, BackendError(f"the model failed on a batch of {len(batch.entries)} images"))

    def _finish_trunk(self, execution: Execution) -> None:
        batch, seconds = execution.batch, execution.trunk_s
        self._telemetry.batch_done(None, len(batch.entries), seconds)
        done_s = time.monotonic()
        self._scheduler.finished(batch, done_s, trunk_s=execution.ended_s - execution.began_s)
        seen = []
        for entry, (after, look) in zip(batch.entries, execution.seen, strict=True):
            _set_running(entry, False)
            waited_s = entry.waited_s + execution.began_s - entry.queued_s
            seen.append(replace(entry, payload=after, look=look, queued_s=done_s, waited_s=waited_s, trunk_s=seconds))
        at_exit = self._scheduler.push_seen(seen, done_s)
        if at_exit is not None:
            self._answer_at_exit(Execution(at_exit), done_s)

    def _answer_at_exit(self, execution: Execution, now_s: float) -> None:
        """What the trunk has answered: looked up right here, in less time than it takes to wake a worker."""
        self._telemetry.batch_dispatched(execution.batch.entries, now_s)
        execution.run(self._engine, self._looks)
        self._settle(execution)

    def _finish_body(self, execution: Execution) -> None:
        batch = execution.batch
        self._telemetry.batch_done(batch.width, len(batch.entries), execution.body_s)
        self._scheduler.finished(batch, time.monotonic(), body_s=execution.ended_s - execution.began_s)
        self._answer_all(execution)

    def _finish_whole(self, execution: Execution) -> None:
        batch, trunk_s = execution.batch, execution.trunk_s
        self._telemetry.batch_done(None, len(batch.entries), trunk_s)
        self._telemetry.batch_done(batch.width, len(batch.entries), execution.body_s)
        body_s = execution.ended_s - execution.began_s - trunk_s
        self._scheduler.finished(batch, time.monotonic(), trunk_s, body_s)
        self._answer_all(execution)

    def _answer_all(self, execution: Execution) -> None:
        batch = execution.batch
        for entry, route, logits_K in zip(batch.entries, batch.routes, execution.logits_NK, strict=True):
            trunk_s = entry.trunk_s if batch.step is Step.BODY else execution.trunk_s
            self._answer(entry, route, logits_K, trunk_s, execution)

    def _answer(self, entry: Entry, route: Route, logits_K: F32, trunk_s: float, last: Execution) -> None:
        """Account one computed image and keep its promise."""
        madds = self._telemetry.body_row(route)
        if not np.isfinite(logits_K).all():
            _break(entry, BackendError("the model answered this image with numbers that are not finite"))
            return
        _charge(entry, madds)
        queue_s = entry.waited_s + last.began_s - entry.queued_s
        gate_logits_G = None if entry.look is None else entry.payload.gate_logits_G
        _keep(entry, Outcome(logits_K, gate_logits_G, route, queue_s, trunk_s, last.body_s, last.ended_s))

    def shed(self, urgency: int, images: int) -> bool:
        """Refuse so many less urgent images that wait, for more urgent ones; False, and none, when there are fewer."""
        given_up = self._scheduler.shed(urgency, images)
        self._give_up(given_up or [], urgency)
        return given_up is not None

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
                _charge(entry, self._forget_trunk_row(entry))
                _break(
                    entry,
                    DeadlineExceededError("the deadline could not be met any more, the image has waited", "expired"),
                )

    def _forget_trunk_row(self, entry: Entry) -> int:
        """Account the trunk row of an entry whose body will never run; its MAdds, 0 if it has not run.

        Who left or set the deadline pays for it; for what we gave up or failed to compute nobody does.
        """
        return 0 if entry.look is None else self._telemetry.trunk_row(None, True)


def _yield_to_others() -> None:
    """Let the event loop have a core as soon as it wants one; without this it waits for a worker's time slice to end.

    Only Linux knows the priority of a thread, and a sandbox may forbid it; then nothing is changed.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            lowered = os.getpriority(os.PRIO_PROCESS, thread) + WORKER_NICENESS
            os.setpriority(os.PRIO_PROCESS, thread, lowered)  # above 19 it is 19


def _miss(order: Order, ticket: Ticket) -> None:
    """The deadline has passed: its caller is told, whatever becomes of the image."""
    if not ticket.done():
        budget_ms, outcome = (order.deadline_s - order.arrived_s) * 1e3, "late" if ticket.running else "expired"
        error = DeadlineExceededError(f"no answer within the latency budget of {budget_ms:g} ms", outcome)
        ticket.future.set_exception(error)


def _charge(entry: Entry, madds: int) -> None:
    assert isinstance(entry.promise, Ticket), "submit makes the tickets: this is a bug"
    if madds and entry.promise.spend is not None:
        entry.promise.spend(madds)


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
