"""Threads that share cores, in simulated time: what runs, how fast, and what ends next. PURE.

A thread does one job after the other. While more of them run than there are cores, all go at the same share of
their speed, cores / threads that run; those that yield get a smaller part of the cores.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count

from service.settings import WorkerPriority

YIELDING: Mapping[WorkerPriority, float] = {"low": 335 / 1024, "idle": 3 / 1024}
"""Of the part of the cores that another thread gets: Linux's weights of niceness 5 and of the idle class, which the
service's workers may have, and of niceness 0. With equal parts the loop would not get the core that it needs at
saturation."""


@dataclass(eq=False, slots=True)
class Job:
    """What a thread does without a pause. Instants in seconds.

    end_alone_s  when it would be over with a core to itself.
    over         called once it is, with this job.
    is_foreign   another process does it.
    yields       its thread is one of those with the smaller part, see ``YIELDING``.
    end_s        when it was over; nothing before.
    """

    began_s: float
    end_alone_s: float
    over: Callable[[Job], None]
    is_foreign: bool = False
    yields: bool = False
    end_s: float = math.nan

    @property
    def cpu_s(self) -> float:
        """Seconds of a core."""
        return self.end_alone_s - self.began_s

    @property
    def stretch(self) -> float:
        """How many times as long it has taken; exactly 1 with a core to itself."""
        return (self.end_s - self.began_s) / self.cpu_s


class Cores:
    """So many cores; None: one for every thread. priority: of the threads that yield."""

    def __init__(self, cores: int | None, priority: WorkerPriority = "low") -> None:
        self._cores, self._yielding = math.inf if cores is None else cores, YIELDING[priority]
        self._running: list[tuple[float, int, Job]] = []  # a heap, by their ends as things stand
        self._order = count()
        self._threads = [0, 0]  # that run: those that do not yield, and those that do
        self._speeds = (1.0, 1.0)  # of either
        self._own_cpu_s = 0.0  # of jobs that are over and not foreign

    @property
    def next_s(self) -> float:
        """When the next job is over, if none begins before; inf when none runs."""
        return self._running[0][0] if self._running else math.inf

    def begin(self, job: Job) -> None:
        """It runs from its beginning on, which is now."""
        self._threads[job.yields] += 1
        self._share(job.began_s)
        speed = self._speeds[job.yields]
        end_s = job.end_alone_s if speed == 1.0 else job.began_s + job.cpu_s / speed
        heapq.heappush(self._running, (end_s, next(self._order), job))

    def end_next(self) -> Job:
        """The job that is over next; of several that of them which began first."""
        end_s, _, job = heapq.heappop(self._running)
        job.end_s = end_s
        if not job.is_foreign:
            self._own_cpu_s += job.cpu_s
        self._threads[job.yields] -= 1
        self._share(end_s)
        return job

    def own_cpu_s(self, now_s: float) -> float:
        """Seconds of cores that all jobs but foreign ones have taken so far."""
        running = ((end_s, job) for end_s, _, job in self._running if not job.is_foreign)
        return self._own_cpu_s + sum(job.cpu_s - (end_s - now_s) * self._speeds[job.yields] for end_s, job in running)

    def _share(self, now_s: float) -> None:
        """Other threads run from now on: what is left of each job takes longer, or less."""
        before, now = self._speeds, self._speeds_now()
        if before == now:
            return
        ratios, self._speeds = (before[0] / now[0], before[1] / now[1]), now
        self._running = [
            (now_s + (end_s - now_s) * ratios[job.yields], order, job) for end_s, order, job in self._running
        ]
        heapq.heapify(self._running)

    def _speeds_now(self) -> tuple[float, float]:
        """Equal parts of the cores by weight; what one thread cannot use the others share."""
        firm, yielding = self._threads
        if firm + yielding <= self._cores:
            return 1.0, 1.0
        part = self._cores / (firm + self._yielding * yielding)
        if part < 1.0:
            return part, self._yielding * part
        return 1.0, (self._cores - firm) / yielding


Done = Callable[[float, float], None]
"""Told when a job began and when it was over, which is now."""


class Station:
    """One thread and what waits for it, first come, first served. is_foreign: of another process."""

    def __init__(self, cores: Cores, *, is_foreign: bool = False) -> None:
        self._cores, self._is_foreign = cores, is_foreign
        self._first: deque[tuple[float, Done]] = deque()
        self._others: deque[tuple[float, Done]] = deque()
        self._is_busy = False

    def put(self, now_s: float, seconds: float, done: Done, *, goes_first: bool = False) -> None:
        """One job more of so many seconds. goes_first: before all that wait and do not, never in the midst of a job."""
        (self._first if goes_first else self._others).append((seconds, done))
        self._work(now_s)

    def _work(self, now_s: float) -> None:
        """Take up what waits until something takes time. What a job puts here waits until that job is over."""
        while not self._is_busy and (waiting := self._first or self._others):
            seconds, done = waiting.popleft()
            self._is_busy = True
            if seconds:
                self._cores.begin(Job(now_s, now_s + seconds, partial(self._over, done), self._is_foreign))
                return
            done(now_s, now_s)
            self._is_busy = False

    def _over(self, done: Done, job: Job) -> None:
        done(job.began_s, job.end_s)
        self._is_busy = False
        self._work(job.end_s)
