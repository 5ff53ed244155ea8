"""The asyncio shell of one model: feeds free workers from the scheduler and keeps every promise.

Two steps per image: the trunk and the gate on a mixed batch, then the body at the decided width on a
dense batch. An image whose width is known without the gate takes both in one. Everything here runs on the
event loop except ``_work``; what it runs is in ``service.execution`` and touches the engine only.

An image whose caller has gone, or whose deadline has passed, is dropped when a batch is formed and
never disturbs its batch-mates; a batch that fails fails alone; a closed batcher answers everything.

Where slice 0 is an early exit, whoever has passed the trunk has an answer: it leaves at once where it is what
the image is served, and is kept for those that go on, should time or room run out.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import structlog

from service.engine.base import F32, Engine
from service.errors import BackendError, DeadlineExceededError, DrainingError, QueueFullError
from service.execution import Execution, Looks
from service.latency import Overhead
from service.request import Batch, Entry, Reason, Route, Step, Window
from service.scheduler import Scheduler, Selection
from service.telemetry import ModelTelemetry, width_label
from service.tickets import Order, Outcome, Ticket, ticket_of

log = structlog.get_logger()

DRAIN_RETRY_S = 1.0
"""Retry-After of refusals at shutdown: another replica can take the request at once."""
LAST_BATCH_S = 5.0
"""How long a batch that is on a worker may outlast the drain limit; a thread cannot be killed."""


class Batcher:
    """Owns the queues and the worker slots of one model.

    overhead  is told what batches take of the cores.
    capacity  images that are admitted at most; when more lie in the queues, some have lost their
              callers and are swept out.
    start     what each worker thread does first.
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
        start: Callable[[], None],
        ahead: int = 0,
    ) -> None:
        self._engine, self._scheduler, self._looks, self._telemetry = engine, scheduler, looks, telemetry
        self._overhead = overhead
        self._capacity = capacity
        self._free, self._ahead = engine.workers + ahead, ahead
        self._pool = ThreadPoolExecutor(engine.workers, "engine", start)
        self._running: set[Execution] = set()
        self._finished: deque[Execution] = deque()  # by workers
        self._settled = self._leaving = 0
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
        timers = [loop.call_later(order.deadline_s - now_s, self._miss, order, ticket)]
        if self._engine.has_exit:
            timers.append(loop.call_later(order.done_by_s - now_s, self._hurry, ticket))
        try:
            return await ticket.future
        finally:
            for timer in timers:
                timer.cancel()

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
                ticket_of(entry).refuse(
                    BackendError(f"the model did not finish its batch within {LAST_BATCH_S:g} s of shutdown")
                )
        for entry in self._without_answered(self._scheduler.clear(), Reason.LOAD):
            self._forget_trunk_row(entry)
            ticket_of(entry).refuse(
                DrainingError("the service shut down before this image was computed", DRAIN_RETRY_S)
            )
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
        execution.given_s = now_s
        self._free -= 1
        self._running.add(execution)
        self._idle.clear()
        self._telemetry.batch_dispatched(execution.batch.entries, now_s)
        for entry in execution.batch.entries:
            ticket_of(entry).running = True
        self._pool.submit(self._work, execution, asyncio.get_running_loop())

    def _work(self, execution: Execution, loop: asyncio.AbstractEventLoop) -> None:
        """On a worker thread. No future in between: what waits for the batch waits for its own promises."""
        execution.run(self._engine, self._looks)
        self._finished.append(execution)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for this batch any more
            loop.call_soon_threadsafe(self._over)

    def _over(self) -> None:
        """Batches are off their workers, who are free for the next ones."""
        try:
            self.settle_finished()
        finally:
            self._free += self._settled
            self._settled = 0
            self._pump()
            if not self._running:
                self._idle.set()

    def settle_finished(self) -> bool:
        """Settle the batches that workers have finished; whether answers are about to leave: one turn of the loop later
        they have, those to several images of one request a few turns later.

        A worker gets its next batch when the loop comes to ``_over``, no sooner: until then more images come, and a
        batch of many costs hardly more than a batch of one.
        """
        while self._finished:
            execution = self._finished.popleft()
            self._settled += 1
            self._running.discard(execution)
            try:
                contextvars.Context().run(self._settle, execution)  # of no request, least of all of who comes by here
            except Exception:  # a bug of ours is this batch's answer, too
                log.exception("batch_not_settled", images=len(execution.batch.entries))
                self._refuse_failed(execution.batch)
            if self._engine.has_exit or execution.batch.step is not Step.TRUNK:
                self._leaving += 1
                asyncio.get_running_loop().call_soon(self._left)  # behind those whom it has answered
        return self._leaving > 0

    def _left(self) -> None:
        self._leaving -= 1

    def _settle(self, execution: Execution) -> None:
        """Whatever happened to a batch, its entries move on or are answered."""
        batch = execution.batch
        gone = [entry for entry in batch.entries if batch.step is not Step.TRUNK or entry.abandoned()]
        self._overhead.worked(execution.cpu_s, len(gone))
        self._overhead.learn(time.monotonic(), time.process_time())
        self._conclude(execution, self._finish[batch.step])

    def _conclude(self, execution: Execution, finish: Callable[[Execution], None]) -> None:
        """``finish`` what was computed; where that or the computing fails, the batch fails."""
        batch = execution.batch
        try:
            if execution.error is not None:
                raise execution.error
            finish(execution)
        except Exception as error:  # the engine is foreign code; its failure is this batch's answer
            log.error(
                "batch_failed", width=width_label(batch.width, "trunk"), images=len(batch.entries), exc_info=error
            )
            self._fail(execution)

    def _kept_s(self, execution: Execution, now_s: float) -> float:
        """How long a batch has kept its worker from other batches, which is what plans go by.

        Where none waits ready-made, the worker has to wake up first, and then waits until the loop comes to it: now.
        """
        if self._ahead:
            return execution.ended_s - execution.began_s
        return now_s - execution.given_s

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
        self._refuse_failed(batch)

    def _refuse_failed(self, batch: Batch) -> None:
        for entry in batch.entries:
            ticket_of(entry).refuse(BackendError(f"the model failed on a batch of {len(batch.entries)} images"))

    def _finish_trunk(self, execution: Execution) -> None:
        batch, seconds = execution.batch, execution.trunk_s
        self._telemetry.batch_done(None, len(batch.entries), seconds)
        done_s = time.monotonic()
        self._scheduler.finished(batch, done_s, trunk_s=self._kept_s(execution, done_s))
        seen = []
        for entry, (after, look) in zip(batch.entries, execution.seen, strict=True):
            ticket_of(entry).running = False
            waited_s = entry.waited_s + execution.began_s - entry.queued_s
            going = entry.after_trunk(after, look, done_s, waited_s, seconds)
            seen.append(going)
            if self._scheduler.is_answered(going):
                ticket_of(going).answered = going
        at_exit = self._scheduler.push_seen(seen, done_s)
        if at_exit is not None:
            self._answer_at_exit(at_exit, execution.ended_s)

    def _answer_at_exit(self, batch: Batch, done_s: float) -> None:
        """What the trunk has answered: looked up right here, in less time than it takes to wake a worker.

        done_s  since when the answers could have left.
        """
        execution = Execution(batch)
        self._telemetry.batch_dispatched(batch.entries, time.monotonic())
        execution.run(self._engine, self._looks)
        self._overhead.worked(0.0, len(batch.entries))
        execution.ended_s = done_s
        self._conclude(execution, self._finish_exit)

    def _finish_exit(self, execution: Execution) -> None:
        self._telemetry.batch_done(0, len(execution.batch.entries), execution.body_s)
        self._answer_all(execution)

    def _hurry(self, ticket: Ticket) -> None:
        """There is no more time for a body: what an early exit has answered is the answer."""
        entry = ticket.answered
        if entry is None or ticket.done():
            return
        if not ticket.running:
            self._scheduler.withdraw(entry)
            self._without_answered([entry], Reason.LATENCY_BUDGET)
            return
        logits_K = self._engine.body(0, [entry.payload.feature])[0]
        if np.isfinite(logits_K).all():  # its body goes on, and is accounted for when it is done
            route, now_s = _to_exit(entry, Reason.LATENCY_BUDGET), time.monotonic()
            queue_s, seen = entry.waited_s + now_s - entry.queued_s, entry.payload
            ticket.keep(Outcome(logits_K, seen.gate_logits_G, route, queue_s, entry.trunk_s, 0.0, now_s))

    def _miss(self, order: Order, ticket: Ticket) -> None:
        """The deadline has passed: its caller is told, whatever becomes of the image."""
        self._hurry(ticket)  # timers that end together run in any order
        budget_ms, outcome = (order.deadline_s - order.arrived_s) * 1e3, "late" if ticket.running else "expired"
        ticket.refuse(DeadlineExceededError(f"no answer within the latency budget of {budget_ms:g} ms", outcome))

    def _without_answered(self, entries: Sequence[Entry], reason: Reason) -> list[Entry]:
        """Answer those, already out of their queues, that an early exit has answered; the others are returned."""
        answered = [e for e in entries if self._scheduler.is_answered(e) and not e.abandoned()]
        if answered:
            routes = tuple(_to_exit(entry, reason) for entry in answered)
            self._answer_at_exit(Batch(Step.BODY, 0, tuple(answered), routes), time.monotonic())
        return [entry for entry in entries if entry not in answered]

    def _finish_body(self, execution: Execution) -> None:
        batch = execution.batch
        self._telemetry.batch_done(batch.width, len(batch.entries), execution.body_s)
        now_s = time.monotonic()
        self._scheduler.finished(batch, now_s, body_s=self._kept_s(execution, now_s))
        self._answer_all(execution)

    def _finish_whole(self, execution: Execution) -> None:
        batch, trunk_s = execution.batch, execution.trunk_s
        self._telemetry.batch_done(None, len(batch.entries), trunk_s)
        self._telemetry.batch_done(batch.width, len(batch.entries), execution.body_s)
        now_s = time.monotonic()
        self._scheduler.finished(batch, now_s, self._kept_s(execution, now_s) - execution.body_s, execution.body_s)
        self._answer_all(execution)

    def _answer_all(self, execution: Execution) -> None:
        """Account every computed image and keep its promise."""
        batch = execution.batch
        is_finite = np.logical_and.reduce(np.isfinite(execution.logits_NK), axis=1).tolist()
        rows = zip(batch.entries, batch.routes, execution.logits_NK, is_finite, strict=True)
        for entry, route, logits_K, is_sound in rows:
            madds = self._telemetry.body_row(route)
            if is_sound:
                self._answer(entry, route, logits_K, madds, execution)
            else:
                ticket_of(entry).refuse(BackendError("the model answered this image with numbers that are not finite"))

    def _answer(self, entry: Entry, route: Route, logits_K: F32, madds: int, last: Execution) -> None:
        trunk_s = entry.trunk_s if last.batch.step is Step.BODY else last.trunk_s
        ticket_of(entry).charge(madds)
        queue_s = entry.waited_s + last.began_s - entry.queued_s
        gate_logits_G = None if entry.look is None else entry.payload.gate_logits_G
        ticket_of(entry).keep(Outcome(logits_K, gate_logits_G, route, queue_s, trunk_s, last.body_s, last.ended_s))

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
        for entry in self._without_answered(entries, Reason.LOAD):
            self._forget_trunk_row(entry)
            ticket_of(entry).refuse(QueueFullError(f"given up for an image of urgency {urgency}", DRAIN_RETRY_S))

    def _drop(self, selection: Selection) -> None:
        """Account entries that will never be computed and answer those that still have a caller."""
        dropped = self._telemetry.telemetry.dropped
        expired = self._without_answered(selection.expired, Reason.LATENCY_BUDGET)
        for reason, entries in (("cancelled", selection.cancelled), ("expired", expired)):
            for entry in entries:
                dropped.labels(reason).inc()
                ticket_of(entry).charge(self._forget_trunk_row(entry))
                late = "the deadline could not be met any more, the image has waited"
                ticket_of(entry).refuse(DeadlineExceededError(late, "expired"))

    def _forget_trunk_row(self, entry: Entry) -> int:
        """Account the trunk row of an entry whose body will never run; its MAdds, 0 if it has not run.

        Who left or set the deadline pays for it; for what we gave up or failed to compute nobody does.
        """
        return 0 if entry.look is None else self._telemetry.trunk_row(None, True)


def _to_exit(entry: Entry, reason: Reason) -> Route:
    assert entry.look is not None, "an exit answers images that were seen: this is a bug"
    return Route(0, reason, entry.look.wish)
