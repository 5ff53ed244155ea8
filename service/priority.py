"""Threads that compute let the event loop go first, and may keep to one core each."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable

from service.settings import CPU_MAX, WorkerPriority, quota_cores

WORKER_NICENESS = 5
PINNED_FROM_S = 1e-3
"""Seconds of an image on a worker. Workers of shorter ones sleep so often that on a core of their own they stop the
event loop, which is there, while another core is free. Between two networks that were measured (docs/adr/0018)."""


def worker_start(priority: WorkerPriority, cores: Iterable[int] = ()) -> Callable[[], None]:
    """What each worker thread does first. cores: each takes one, and keeps to it; those that find none run on any."""
    left = deque(cores)

    def start() -> None:
        yield_to_others(priority)
        with contextlib.suppress(IndexError, OSError):  # none is left; or a sandbox forbids it
            os.sched_setaffinity(threading.get_native_id(), {left.popleft()})

    return start


def own_cores(
    workers: int, pinned: bool | None, priority: WorkerPriority, image_s: float, is_alone: bool
) -> list[int]:  # fmt: skip
    """A core for each worker of one model, or none where they may run on any.

    pinned    whether they shall; None: where no other model may be served, they are as many as the cores that the
              process may use in full, and they either give way at once or have enough to do.
    image_s   seconds of one image through the narrowest slice, alone.
    is_alone  no other model is served or can be loaded.

    Linux leaves a core idle for the moment between two short waits while two workers share another one; each on its own
    core is never idle as long as there is work. Elsewhere than on Linux there is none. The first workers of two models
    would have the same core, and other threads of a busy one may stop a worker that cannot leave it.
    """
    if sys.platform != "linux":
        return []
    cores = sorted(os.sched_getaffinity(0))
    if pinned is None:
        quota = quota_cores(CPU_MAX)
        is_whole = workers == len(cores) and (quota is None or quota >= len(cores))
        pinned = is_alone and is_whole and (priority == "idle" or image_s >= PINNED_FROM_S)
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
