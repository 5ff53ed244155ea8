"""The offline twin: a trace replayed through the scheduler, policies and admission of the service. PURE.

A discrete-event run: batches take what a latency table says, the gate says of each image what it said when
the checkpoint was evaluated, and an image is right when that slice was. Nothing is computed and
nobody waits, so it plans for machines and loads that are not at hand and judges policies on the same
arrivals, images and budgets.

What it leaves out: everything around the engine (HTTP, decoding, hand-overs) is one cost per image, and one more
where a body follows the gate, spent by the worker that runs it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import count

from service.latency import LatencyTable
from service.request import Batch, Entry, Look, Reason, Step, Window
from service.scheduler import Scheduler


class Outcome(StrEnum):
    """What became of an image. Only ``MET`` counts as attained."""

    MET = "met"
    LATE = "late"
    EXPIRED = "expired"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One image of a trace.

    at_s        from the start of the trace.
    image       index into the evaluation.
    latency_s   to its deadline; inf without one.
    """

    at_s: float
    image: int
    window: Window
    latency_s: float = math.inf
    urgency: int = 3


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one arrival.

    width        of the slice that computed it; None if nothing did.
    gate_width   the gate's wish; None when the gate did not run.
    finish_s     when it was answered, from the start of the trace; None unless it was computed.
    predicted_s  when it would have been finished, had it been let in; None unless it was refused at the door.
    """

    outcome: Outcome
    width: int | None = None
    reason: Reason | None = None
    finish_s: float | None = None
    gate_width: int | None = None
    predicted_s: float | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run takes for granted.

    times            seconds of trunks and bodies.
    workers          batches that run at once.
    capacity_images  that may be in work.
    default_slo_s    orders images without a deadline.
    overhead_s       worker seconds that each image costs beside trunk and body.
    look_s           and those that it costs more when its body is a second batch, because the gate was asked.
    has_exit         slice 0 is an early exit: whom it answers has no second batch.
    """

    times: LatencyTable
    workers: int
    capacity_images: int
    default_slo_s: float
    overhead_s: float = 0.0
    look_s: float = 0.0
    has_exit: bool = False

    def batch_s(self, step: Step, width: int | None, images: int) -> tuple[float, float]:
        """Seconds of the trunk's and of the body's part of a batch, but for what asking costs."""
        trunk_s = 0.0 if step is Step.BODY else self.times.seconds(None, images) + self.overhead_s * images
        return trunk_s, 0.0 if width is None else self.times.seconds(width, images)

    def asking_s(self, step: Step, images: int) -> float:
        """What a batch takes beside that; the scheduler knows of it and need not learn it."""
        return self.look_s * images if step is (Step.BODY if self.has_exit else Step.TRUNK) else 0.0


class _Caller:
    """A promise for the scheduler to ask; kept once the run knows what became of the image."""

    __slots__ = ("number", "served")

    def __init__(self, number: int) -> None:
        self.number = number
        self.served: Served | None = None

    def done(self) -> bool:
        return self.served is not None


class Run:
    """One replay. ``looks[i]``: what the gate says of image ``i``; empty for a policy that never asks it."""

    def __init__(self, scheduler: Scheduler, machine: Machine, looks: Sequence[Look]) -> None:
        self._scheduler, self._machine, self._looks = scheduler, machine, looks
        self._callers: list[_Caller] = []
        self._arrivals: Sequence[Arrival] = ()
        self._ends: list[tuple[float, int, Batch]] = []
        self._order = count()
        self._in_work = 0

    def replay(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """What became of each arrival; they must be in the order of their times."""
        self._callers, self._arrivals = [_Caller(number) for number in range(len(arrivals))], arrivals
        coming = 0
        while coming < len(arrivals) or self._ends:
            next_s = arrivals[coming].at_s if coming < len(arrivals) else math.inf
            if self._ends and self._ends[0][0] <= next_s:
                now_s, _, batch = heapq.heappop(self._ends)
                self._finish(batch, now_s)
            else:
                now_s = next_s
                self._arrive(coming, now_s)
                coming += 1
            self._pump(now_s)
        return [caller.served or Served(Outcome.EXPIRED) for caller in self._callers]

    def _arrive(self, number: int, now_s: float) -> None:
        arrival, caller = self._arrivals[number], self._callers[number]
        deadline_s = now_s + arrival.latency_s
        if not self._make_room(arrival, deadline_s, now_s):
            predicted_s = self._scheduler.finish_s(now_s, deadline_s, arrival.window)
            caller.served = Served(Outcome.REFUSED, predicted_s=predicted_s)
            return
        due_s = min(deadline_s, now_s + self._machine.default_slo_s)
        place = self._scheduler.expect(now_s, due_s, deadline_s < math.inf, arrival.window)
        self._in_work += 1
        self._scheduler.push(
            Entry(caller, number, arrival.window, now_s, due_s, now_s, deadline_s, arrival.urgency, place=place)
        )

    def _make_room(self, arrival: Arrival, deadline_s: float, now_s: float) -> bool:
        """Admission, as in the service: less urgent images are given up for a more urgent one."""
        if self._in_work >= self._machine.capacity_images:
            shed = self._scheduler.shed(arrival.urgency, 1)
            if shed is None:
                return False
            self._give_up(shed[0], now_s)
        given_up = self._scheduler.make_room(now_s, deadline_s, arrival.window, arrival.urgency)
        for victim in given_up or []:
            self._give_up(victim, now_s)
        return given_up is not None

    def _pump(self, now_s: float) -> None:
        while len(self._ends) < self._machine.workers:
            selection = self._scheduler.next_batch(now_s)
            for entry in (*selection.expired, *selection.cancelled):
                self._settle(entry, self._answered(entry, now_s) or Served(Outcome.EXPIRED))
            if selection.batch is None:
                return
            batch = selection.batch
            images = len(batch.entries)
            end_s = now_s + self._machine.asking_s(batch.step, images)
            end_s += sum(self._machine.batch_s(batch.step, batch.width, images))
            heapq.heappush(self._ends, (end_s, next(self._order), batch))

    def _finish(self, batch: Batch, now_s: float) -> None:
        images = len(batch.entries)
        self._scheduler.finished(batch, now_s, *self._machine.batch_s(batch.step, batch.width, images))
        if batch.step is Step.TRUNK:
            looks = (self._looks[self._arrivals[entry.payload].image] for entry in batch.entries)
            seen = [replace(entry, look=look, queued_s=now_s) for entry, look in zip(batch.entries, looks, strict=True)]
            at_exit = self._scheduler.push_seen(seen, now_s)
            if at_exit is None:
                return
            batch = at_exit
        for entry, route in zip(batch.entries, batch.routes, strict=True):
            if now_s <= entry.deadline_s:
                self._settle(entry, Served(Outcome.MET, route.width, route.reason, now_s, route.gate_width))
            else:
                late = Served(Outcome.LATE, route.width, route.reason, now_s, route.gate_width)
                self._settle(entry, self._answered(entry, now_s) or late)

    def _answered(self, entry: Entry, now_s: float) -> Served | None:
        """By an early exit, no later than at its deadline; None without one."""
        if not self._scheduler.is_answered(entry) or entry.look is None:
            return None
        finish_s = min(now_s, entry.deadline_s)
        return Served(Outcome.MET, 0, Reason.LATENCY_BUDGET, finish_s, entry.look.wish)

    def _give_up(self, entry: Entry, now_s: float) -> None:
        answered = self._answered(entry, now_s)
        self._settle(entry, replace(answered, reason=Reason.LOAD) if answered else Served(Outcome.REFUSED))

    def _settle(self, entry: Entry, served: Served) -> None:
        self._in_work -= 1
        self._callers[entry.payload].served = served
