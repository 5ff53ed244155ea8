"""Threads that compute let the event loop go first: a few microseconds of work that everybody waits for."""

from __future__ import annotations

import os
import sys
import threading

from service.settings import WorkerPriority

WORKER_NICENESS = 5


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
