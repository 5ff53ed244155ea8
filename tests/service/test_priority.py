"""How worker threads share the cores with the event loop."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from batching import FakeEngine, Harness

from service import priority
from service.priority import PINNED_FROM_S, WORKER_NICENESS, own_cores, worker_start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has neither priority nor cores")


class SeenEngine(FakeEngine):
    """Notes how the scheduler of the operating system sees the thread that it runs on."""

    def trunk(self, images):
        self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        self.scheduling, self.cores = os.sched_getscheduler(0), os.sched_getaffinity(0)  # of this thread
        return super().trunk(images)


async def test_workers_give_way_to_the_event_loop():
    h = Harness(SeenEngine())
    await h.submit(2)
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert (h.engine.niceness, h.engine.scheduling) == (min(19, own + WORKER_NICENESS), os.sched_getscheduler(0))
    assert h.engine.cores == os.sched_getaffinity(0)


async def test_workers_may_have_what_nobody_else_wants():
    h = Harness(SeenEngine(), start=worker_start("idle"))
    await h.submit(2)
    assert h.engine.scheduling == os.SCHED_IDLE
    assert os.sched_getscheduler(0) != os.SCHED_IDLE


def test_each_worker_keeps_to_a_core_of_its_own():
    cores, barrier, free = sorted(os.sched_getaffinity(0)), threading.Barrier(3), set(os.sched_getaffinity(0))

    def seen(_):
        barrier.wait(10)  # so that each thread takes one
        return os.sched_getaffinity(0)

    wanted = [cores[0], cores[-1]]
    with ThreadPoolExecutor(3, initializer=worker_start("low", wanted)) as pool:
        found = list(pool.map(seen, range(3)))
    assert sorted(map(sorted, found)) == sorted([[cores[0]], [cores[-1]], cores])
    assert os.sched_getaffinity(0) == free


def test_a_sandbox_that_forbids_it_leaves_workers_where_they_are(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with ThreadPoolExecutor(1, initializer=worker_start("low", [0])) as pool:
        assert pool.submit(os.sched_getaffinity, 0).result(10) == os.sched_getaffinity(0)


@pytest.fixture
def machine(monkeypatch):
    """Cores 2, 3, 6 and 7, and a quota."""

    def has(quota):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 3, 2, 6})
        monkeypatch.setattr(priority, "quota_cores", lambda _: quota)

    return has


@pytest.mark.parametrize(
    ("workers", "quota", "others", "is_pinned"),
    [
        (4, None, ("low", PINNED_FROM_S, True), True),
        (4, None, ("low", PINNED_FROM_S * 0.99, True), False),  # small networks: the event loop would wait
        (4, None, ("idle", 0.0, True), True),  # it never does for these
        (4, None, ("idle", 1.0, False), False),  # their first workers would share a core
        (4, None, ("low", 1.0, False), False),
        (
            3,
            None,
            ("low", 1.0, True),
            False,
        ),  # a core would be without a worker, and two processes would share the first
        (5, None, ("low", 1.0, True), False),
        (4, 4.0, ("low", 1.0, True), True),
        (4, 3.5, ("low", 1.0, True), False),  # rounded up to 4 workers that are throttled together
        (2, 2.0, ("low", 1.0, True), False),  # a container's two cores, anywhere on four
    ],
)
def test_workers_keep_to_their_cores_where_they_fill_the_machine(machine, workers, quota, others, is_pinned):
    """others: priority, seconds of an image, whether no other model may be served."""
    machine(quota)
    assert own_cores(workers, None, *others) == ([2, 3, 6, 7] if is_pinned else [])


def test_the_setting_has_the_last_word(machine):
    machine(1.0)
    assert own_cores(4, False, "idle", 1.0, True) == []
    assert own_cores(2, True, "low", 0.0, False) == [2, 3]
    assert own_cores(2, True, "low", 0.0, True) == [2, 3]
    assert own_cores(6, True, "low", 0.0, True) == [2, 3, 6, 7, 2, 3]


def test_elsewhere_than_on_linux_workers_run_anywhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert own_cores(1, True, "idle", 1.0, True) == []
