"""The offline twin: a trace replayed through the scheduler, policies and admission of the service. PURE.

A discrete-event run: batches take what a latency table says, the gate says of each image what it said when
the checkpoint was evaluated, and an image is right when that slice was. Nothing is computed and
nobody waits, so it plans for machines and loads that are not at hand and judges policies on the same
arrivals, images and budgets.

Beside the workers there are two threads, each of which does one thing after the other: the event loop, and the
client that sends the trace and reads the answers. An image is sent, taken up by the loop, admitted, computed, answered
by the loop and read. Finished batches and answers go before newcomers (docs/adr/0016); the loop has to do something for
each batch as well. All may share some cores, of which workers get a smaller part, as their niceness has it.

What it leaves out: batches take what the table says, and threads that share cores get their parts of them at once and
at no cost. The loop takes as long for one image as for any other, and for one batch as for any other, and does nothing
else; to turn an image away costs it no more than to take it up. No client gives up. What is left of the work around
the engine is one cost per image, and one more where the gate is asked, spent by the worker that runs it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from service.cores import Cores, Job, Station
from service.latency import Delay, LatencyTable, Overhead
from service.request import Batch, Entry, Look, Reason, Route, Step, Window
from service.scheduler import Scheduler
from service.settings import WorkerPriority


class Outcome(StrEnum):
    """What became of an image, as its caller sees it. Only ``MET`` counts as attained."""

    MET = "met"
    LATE = "late"
    EXPIRED = "expired"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One image of a trace.

    at_s        when it is to be sent, from the start of the trace.
    image       index into the evaluation.
    latency_s   within which its caller wants to have read the answer, counted from there; inf without a deadline. The
                service counts it from when the image has been sent.
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
    finish_s     when its answer had been read, from the start of the trace; None unless it was computed.
    predicted_s  when that would have been, had it been let in; None unless it was refused at the door.
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
    ask_s            and those that it costs more when the gate is asked. ask_loop_s: of the event loop, likewise.
    front_s          seconds of the event loop for an image until it is admitted or refused.
    back_s           and for its answer, once it is computed.
    handover_s       and for each batch, between its end and the next one's beginning.
    client_s         seconds of the client for an image: half of them to send it, half to read what becomes of it.
    cores            shared by workers, event loop and client; None: each of them has its own.
    ahead            batches that wait ready-made for the next free worker.
    worker_priority  how workers yield to the others.
    """

    times: LatencyTable
    workers: int
    capacity_images: int
    default_slo_s: float
    overhead_s: float = 0.0
    ask_s: float = 0.0
    ask_loop_s: float = 0.0
    front_s: float = 0.0
    back_s: float = 0.0
    handover_s: float = 0.0
    client_s: float = 0.0
    cores: int | None = None
    ahead: int = 0
    worker_priority: WorkerPriority = "low"

    @property
    def has_loop(self) -> bool:
        """Whether the event loop takes any time."""
        return self.front_s + self.back_s + self.handover_s > 0

    @property
    def plans_count_loop(self) -> bool:
        """Whether it takes that from the workers, and plans count it, as in the service."""
        return self.has_loop and self.cores is not None and self.workers >= self.cores

    def settling_s(self, step: Step, images: int) -> float:
        """Seconds of the event loop between the end of a batch and what becomes of its images."""
        return self.handover_s + (self.ask_loop_s * images if step is Step.TRUNK else 0.0)

    def batch_s(self, step: Step, width: int | None, images: int) -> tuple[float, float]:
        """Seconds of the trunk's and of the body's part of a batch."""
        each_s = self.overhead_s + (self.ask_s if step is Step.TRUNK else 0.0)
        trunk_s = 0.0 if step is Step.BODY else self.times.seconds(None, images) + each_s * images
        return trunk_s, 0.0 if width is None else self.times.seconds(width, images)


@dataclass(eq=False, slots=True)
class _Caller:
    """A promise for the scheduler to ask. is_done: it is kept or broken; served: what the caller has seen."""

    is_done: bool = False
    served: Served | None = None

    def done(self) -> bool:
        return self.is_done


@dataclass(frozen=True, slots=True)
class _Answer:
    """On its way out.

    number   of its arrival.
    kept_s   when the loop found that out; since_s: when it left for it, which a timer of the service sees to.
    done_s   when its batch was over.
    """

    number: int
    route: Route
    kept_s: float
    since_s: float
    done_s: float


class Run:
    """One replay. ``looks[i]``: what the gate says of image ``i``; empty for a policy that never asks it.

    process  is told what the loop and the batches take of the cores; None where no plan counts that.
    """

    def __init__(
        self, scheduler: Scheduler, machine: Machine, looks: Sequence[Look], process: Overhead | None = None
    ) -> None:
        self._scheduler, self._machine, self._looks, self._process = scheduler, machine, looks, process
        self._callers: list[_Caller] = []
        self._arrivals: Sequence[Arrival] = ()
        self._cores = Cores(machine.cores, machine.worker_priority)
        self._loop, self._client = Station(self._cores), Station(self._cores, is_foreign=True)
        self._half_s = machine.client_s / 2
        self._free, self._idle = machine.workers + machine.ahead, machine.workers
        self._ready: deque[Batch] = deque()  # for the workers, of which none is idle then
        self._lag = Delay()
        self._in_work = 0

    def replay(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """What became of each arrival; they must be in the order of their times."""
        self._callers, self._arrivals = [_Caller() for _ in arrivals], arrivals
        coming, cores = 0, self._cores
        while coming < len(arrivals) or cores.next_s < math.inf:
            next_s = arrivals[coming].at_s if coming < len(arrivals) else math.inf
            if cores.next_s <= next_s:
                job = cores.end_next()
                job.over(job)
            else:
                self._client.put(next_s, self._half_s, partial(self._sent, coming))
                coming += 1
        assert self._in_work == 0, "an image was lost: this is a bug"
        return [self._known(caller) for caller in self._callers]

    def _sent(self, number: int, _: float, now_s: float) -> None:
        self._loop.put(now_s, self._machine.front_s, partial(self._arrived, number, now_s))

    def _arrived(self, number: int, sent_s: float, began_s: float, now_s: float) -> None:
        """The loop has read and decoded an image; meanwhile it has done nothing else."""
        self._scheduler.begun(began_s, began_s - sent_s)
        self._admit(number, sent_s, now_s)
        self._pump(now_s)

    def _admit(self, number: int, sent_s: float, now_s: float) -> None:
        arrival, caller = self._arrivals[number], self._callers[number]
        deadline_s, lag_s = sent_s + arrival.latency_s, self._lag.allowance_s(now_s)
        done_by_s = deadline_s - lag_s
        if not self._make_room(arrival, done_by_s, now_s):
            finish_s = self._scheduler.finish_s(now_s, done_by_s, arrival.window)
            self._turn_away(caller, Served(Outcome.REFUSED, predicted_s=finish_s + lag_s + self._half_s), now_s)
            return
        due_s = min(done_by_s, sent_s + self._machine.default_slo_s)
        place = self._scheduler.expect(now_s, due_s, deadline_s < math.inf, arrival.window)
        self._in_work += 1
        self._scheduler.push(
            Entry(caller, number, arrival.window, sent_s, due_s, now_s, done_by_s, arrival.urgency, place=place)
        )

    def _make_room(self, arrival: Arrival, done_by_s: float, now_s: float) -> bool:
        """Admission, as in the service: less urgent images are given up for a more urgent one."""
        if self._in_work >= self._machine.capacity_images:
            shed = self._scheduler.shed(arrival.urgency, 1)
            if shed is None:
                return False
            self._give_up(shed[0], Outcome.REFUSED, Reason.LOAD, now_s)
        given_up = self._scheduler.make_room(now_s, done_by_s, arrival.window, arrival.urgency)
        for victim in given_up or []:
            self._give_up(victim, Outcome.REFUSED, Reason.LOAD, now_s)
        return given_up is not None

    def _pump(self, now_s: float) -> None:
        while self._free:
            selection = self._scheduler.next_batch(now_s)
            for entry in (*selection.expired, *selection.cancelled):
                self._give_up(entry, Outcome.EXPIRED, Reason.LATENCY_BUDGET, now_s)
            if selection.batch is None:
                return
            self._free -= 1
            if self._idle:
                self._idle -= 1
                self._begin(selection.batch, now_s)
            else:
                self._ready.append(selection.batch)

    def _begin(self, batch: Batch, now_s: float) -> None:
        end_s = now_s + sum(self._machine.batch_s(batch.step, batch.width, len(batch.entries)))
        self._cores.begin(Job(now_s, end_s, partial(self._computed, batch), yields=True))

    def _computed(self, batch: Batch, job: Job) -> None:
        """A worker is done. It has the next batch at once if one is ready; else the loop has to come to this one."""
        if self._ready:
            self._begin(self._ready.popleft(), job.end_s)
        else:
            self._idle += 1
        seconds = self._machine.settling_s(batch.step, len(batch.entries))
        self._loop.put(job.end_s, seconds, partial(self._settle, batch, job), goes_first=True)

    def _settle(self, batch: Batch, job: Job, _: float, now_s: float) -> None:
        """The loop has come to a batch that is over: its images go on or are answered, its place is free."""
        images, has_body = len(batch.entries), batch.step is not Step.TRUNK
        self._account(job.cpu_s, images if has_body else 0, now_s)
        trunk_s, body_s = self._machine.batch_s(batch.step, batch.width, images)
        waited_s = 0.0 if self._machine.ahead else now_s - job.end_s  # for the loop, which the worker had to
        if trunk_s:
            self._scheduler.finished(batch, now_s, trunk_s * job.stretch + waited_s, body_s * job.stretch)
        else:
            self._scheduler.finished(batch, now_s, body_s=body_s * job.stretch + waited_s)
        leaving = batch if has_body else self._after_trunk(batch, now_s)
        for entry, route in zip(leaving.entries, leaving.routes, strict=True) if leaving else ():
            if now_s > entry.deadline_s and self._scheduler.is_answered(entry):
                self._answer_at_exit(entry, Reason.LATENCY_BUDGET, now_s)
            else:
                self._answer(_Answer(entry.payload, route, now_s, now_s, job.end_s))
        self._free += 1
        self._pump(now_s)

    def _account(self, cpu_s: float, images: int, now_s: float) -> None:
        """A batch has taken so much of the cores, the last one of so many images."""
        if self._process is not None:
            self._process.worked(cpu_s, images)
            self._process.learn(now_s, self._cores.own_cpu_s(now_s))

    def _after_trunk(self, batch: Batch, now_s: float) -> Batch | None:
        """Those that an early exit serves, if any; the others wait for their bodies."""
        looks = (self._looks[self._arrivals[entry.payload].image] for entry in batch.entries)
        rows = zip(batch.entries, looks, strict=True)
        seen = [entry.after_trunk(entry.payload, look, now_s, 0.0, 0.0) for entry, look in rows]
        at_exit = self._scheduler.push_seen(seen, now_s)
        if at_exit is not None and self._process is not None:
            self._process.worked(0.0, len(at_exit.entries))
        return at_exit

    def _give_up(self, entry: Entry, outcome: Outcome, reason: Reason, now_s: float) -> None:
        """It will not be computed further: an early exit has answered it, or nobody does."""
        if self._scheduler.is_answered(entry):
            if self._process is not None:
                self._process.worked(0.0, 1)
            self._answer_at_exit(entry, reason, now_s)
            return
        self._in_work -= 1
        self._turn_away(self._callers[entry.payload], Served(outcome), now_s)

    def _turn_away(self, caller: _Caller, served: Served, now_s: float) -> None:
        if self._process is not None:
            self._process.turned_away()
        self._keep(caller, served)
        self._client.put(now_s, self._half_s, _ignore)

    def _answer_at_exit(self, entry: Entry, reason: Reason, now_s: float) -> None:
        """What the trunk has answered leaves; where the time for a body ran out since the trunk, it has left then."""
        assert entry.look is not None, "an exit answers images that were seen: this is a bug"
        since_s = max(entry.queued_s, min(now_s, entry.deadline_s))
        self._answer(_Answer(entry.payload, Route(0, reason, entry.look.wish), now_s, since_s, now_s))

    def _answer(self, answer: _Answer) -> None:
        self._callers[answer.number].is_done = True
        self._loop.put(answer.kept_s, self._machine.back_s, partial(self._answered, answer), goes_first=True)

    def _answered(self, answer: _Answer, _: float, now_s: float) -> None:
        self._in_work -= 1
        self._lag.learn(now_s - answer.done_s, now_s)
        self._client.put(now_s, self._half_s, partial(self._read, answer))

    def _read(self, answer: _Answer, _: float, now_s: float) -> None:
        """The caller has its answer, and says whether that was in time."""
        arrival, route = self._arrivals[answer.number], answer.route
        finish_s = answer.since_s + (now_s - answer.kept_s)
        outcome = Outcome.MET if finish_s <= arrival.at_s + arrival.latency_s else Outcome.LATE
        served = Served(outcome, route.width, route.reason, finish_s, route.gate_width)
        self._keep(self._callers[answer.number], served)

    @staticmethod
    def _keep(caller: _Caller, served: Served) -> None:
        assert caller.served is None, "an image has two ends: this is a bug"
        caller.is_done, caller.served = True, served

    @staticmethod
    def _known(caller: _Caller) -> Served:
        assert caller.served is not None, "an image has no end: this is a bug"
        return caller.served


def _ignore(_began_s: float, _now_s: float) -> None:
    """The client has read that it was turned away."""
