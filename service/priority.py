"""Threads that compute let the event loop go first, and may keep to one core each."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable

from service.settings import WorkerPriority, usable_cores

WORKER_NICENESS = 5
PINNED_FROM_S = 1e-3
"""Seconds of an image on a worker. Workers of shorter ones sleep so often that a core of their own would make them wait
for the event loop while another core is free (docs/adr/0018)."""


def worker_start(priority: WorkerPriority, cores: Iterable[int] = ()) -> Callable[[], None]:
    """What each worker thread does first. cores: each takes one, and keeps to it; those that find none run on any."""
    left = deque(cores)

    def start() -> None:
        yield_to_others(priority)
        if left:
            with contextlib.suppress(OSError):  # a sandbox may forbid it
                os.sched_setaffinity(threading.get_native_id(), {left.popleft()})

    return start


def own_cores(workers: int, pinned: bool | None, priority: WorkerPriority, image_s: float) -> list[int]:
    """A core for each worker, or none where they may run on any.

    pinned   whether they shall; None: where they are as many as the cores that the process may use in full, and either
             give way at once or have enough to do. image_s: seconds of one image through the narrowest slice, alone.

    Linux leaves a core idle for the moment between two short waits while two workers share another one; each on its own
    core is never idle as long as there is work. Elsewhere than on Linux there is none.
    """
    if sys.platform != "linux":
        return []
    cores = sorted(os.sched_getaffinity(0))
    if pinned is None:
        pinned = workers == len(cores) == usable_cores() and (priority == "idle" or image_s >= PINNED_FROM_S)
    return [cores[worker % len(cores)] for worker in range(workers)] if pinned else []


def yield_to_others(priority: WorkerPriority) -> None:
    """Let the event loop have a core as soon as it wants one; without this it waits for a time slice to end.

    priority  "low": this thread gets a third of what another one gets. "idle": what nobody else wants, see the setting;
              where that is refused, as "low".

    Of the calling thread. Only Linux knows the priority of a thread, and a sandbox may forbid it; then nothing is
    changed.
    """
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    try:
        if priority == "idle":
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        else:
            lowered = os.getpriority(os.PRIO_PROCESS, thread) + WORKER_NICENESS
            os.setpriority(os.PRIO_PROCESS, thread, lowered)  # above 19 it is 19
    except OSError:
        if priority == "idle":
            yield_to_others("low")
