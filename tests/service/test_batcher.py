import asyncio
import math
import os
import sys
import threading
import time

import numpy as np
import pytest

from service.batcher import WORKER_NICENESS, Batcher, Order
from service.engine.base import TrunkResult
from service.errors import BackendError, DeadlineExceededError, DrainingError
from service.latency import LatencyTable, LiveTimes, Overhead
from service.policies import Gate
from service.request import SliceFacts, Window
from service.scheduler import Scheduler
from service.telemetry import ModelLabels, ModelTelemetry, Telemetry

SLICES = (SliceFacts(0, 100, 110, None), SliceFacts(1, 200, 210, None))
TRUNK_MADDS = 60


class FakeEngine:
    """Doubles its input. An image is [value]; its gate wishes width 1 for odd values.

    ``hold`` stops the workers at the next call until it is set again; a value in ``poison`` fails the
    batch that it is in.
    """

    name, device, has_exit = "fake", "cpu", False

    def __init__(self, workers=1):
        self.workers = workers
        self.hold = threading.Event()
        self.hold.set()
        self.poison = set()
        self.trunk_batches, self.body_batches = [], []
        self.niceness = None

    def trunk(self, images):
        self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        assert self.hold.wait(10)
        self.trunk_batches.append([i[0] for i in images])
        if self.poison & set(self.trunk_batches[-1]):
            raise RuntimeError("poisoned trunk")
        return TrunkResult(list(images), np.stack(images))

    def gate(self, inputs):
        return np.stack([1 - inputs[:, 0] % 2, inputs[:, 0] % 2], axis=1)

    def body(self, width, features):
        assert self.hold.wait(10)
        self.body_batches.append((width, [f[0] for f in features]))
        if self.poison & {-v for v in self.body_batches[-1][1]}:
            raise RuntimeError("poisoned body")
        return np.stack(features) * 2


def table(limit):
    """Batches of up to ``limit`` images cost no more than one image."""
    return LatencyTable({(width, size): 1e-4 for width in (None, 0, 1) for size in {1, limit}})


class Harness:
    def __init__(self, engine, limit=4, capacity=100, wish=lambda logits_NG: logits_NG.argmax(1)):
        self.telemetry = Telemetry()
        model = ModelTelemetry(self.telemetry, ModelLabels("m", "1"), SLICES)
        model._trunk_madds = TRUNK_MADDS  # what describe() takes from the manifest
        self.engine, self.overhead = engine, Overhead()
        policy = Gate()
        self.scheduler = Scheduler(policy, LiveTimes(table(limit)), engine.workers, has_exit=engine.has_exit)

        def looks(logits_NG):
            wish_N = wish(logits_NG)
            return policy.looks(logits_NG, wish_N, wish_N)

        self.batcher = Batcher(engine, self.scheduler, looks, model, self.overhead, capacity)

    def submit(self, value, *, forced=None, deadline_s=math.inf, spend=None):
        now_s, window = time.monotonic(), Window(0, 1, forced)
        due_s = min(deadline_s, now_s + 1)
        place = self.scheduler.expect(now_s, due_s, deadline_s < math.inf, window)
        pixels = np.array([value], np.float32)
        order = Order(pixels, window, now_s, due_s, deadline_s, deadline_s, place=place, spend=spend)
        return asyncio.ensure_future(self.batcher.submit(order))

    def metric(self, name, **labels):
        return self.telemetry.registry.get_sample_value(name, labels) or 0


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_cancelling_one_caller_of_a_batch_leaves_its_batch_mates_served():
    h = Harness(FakeEngine())
    h.engine.hold.clear()
    first, second, third = (h.submit(v) for v in (2, 4, 6))
    await settle()  # the first is on the worker; in a second round the others share a batch
    second.cancel()
    h.engine.hold.set()
    outcomes = await asyncio.wait_for(asyncio.gather(first, third), 5)
    assert [o.logits_K[0] for o in outcomes] == [4, 12]
    assert second.cancelled()
    assert 4 not in [v for batch in h.engine.trunk_batches for v in batch]
    assert h.metric("slicewise_dropped_total", reason="cancelled") == 1


async def test_cancelling_a_caller_whose_batch_is_running_leaves_its_batch_mates_served():
    h = Harness(FakeEngine())
    h.engine.hold.clear()
    blocker = h.submit(100)
    await settle()
    mates = [h.submit(v) for v in (2, 4, 6)]
    h.engine.hold.set()
    await blocker
    while not any(len(batch) == 3 for batch in h.engine.trunk_batches):
        await asyncio.sleep(0.001)
    mates[1].cancel()
    assert [(await asyncio.wait_for(m, 5)).logits_K[0] for m in (mates[0], mates[2])] == [4, 12]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
async def test_workers_give_way_to_the_event_loop():
    h = Harness(FakeEngine())
    await asyncio.wait_for(h.submit(2), 5)
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert h.engine.niceness == min(19, own + WORKER_NICENESS)


async def test_every_batch_counts_what_it_took_of_a_core_and_every_image_once(monkeypatch):
    h, booked = Harness(FakeEngine()), []
    monkeypatch.setattr(Overhead, "worked", lambda self, cpu_s, images: booked.append((cpu_s, images)))
    before_s = time.process_time()
    await asyncio.wait_for(h.submit(2), 5)  # asked
    await asyncio.wait_for(h.submit(2, forced=1), 5)
    took_s = time.process_time() - before_s
    assert [images for _, images in booked] == [0, 1, 1]
    assert all(cpu_s > 0 for cpu_s, _ in booked)
    assert sum(cpu_s for cpu_s, _ in booked) < took_s


async def test_images_are_grouped_by_the_width_that_the_gate_wishes():
    h = Harness(FakeEngine(), limit=8)
    h.engine.hold.clear()
    blocker = h.submit(0)
    await settle()
    others = [h.submit(v) for v in range(1, 7)]
    h.engine.hold.set()
    outcomes = await asyncio.gather(blocker, *others)
    assert [o.route.width for o in outcomes] == [0, 1, 0, 1, 0, 1, 0]
    assert all(width == value % 2 for width, values in h.engine.body_batches for value in values)
    assert (1, [1, 3, 5]) in h.engine.body_batches
    assert [o.logits_K[0] for o in outcomes] == [0, 2, 4, 6, 8, 10, 12]


async def test_a_forced_width_skips_the_gate_beside_images_that_do_not():
    h = Harness(FakeEngine(), limit=8)
    h.engine.hold.clear()
    blocker = h.submit(0)
    await settle()
    forced, free = h.submit(2, forced=1), h.submit(4)
    h.engine.hold.set()
    forced, free, _ = await asyncio.gather(forced, free, blocker)
    assert (forced.route.width, forced.gate_logits_G) == (1, None)
    assert (forced.route.gate_width, free.route.gate_width) == (None, 0)
    assert (free.route.width, list(free.gate_logits_G)) == (0, [1, 0])
    assert [2] in h.engine.trunk_batches  # a forced image is no part of a mixed batch


async def test_forced_images_of_one_width_run_trunk_and_body_in_one_batch():
    h = Harness(FakeEngine(), limit=8)
    h.engine.hold.clear()
    blocker = h.submit(0)
    await settle()
    images = [h.submit(v, forced=v % 2) for v in range(1, 6)]
    h.engine.hold.set()
    outcomes = await asyncio.gather(*images)
    assert [o.logits_K[0] for o in outcomes] == [2, 4, 6, 8, 10]
    assert {tuple(batch) for batch in h.engine.trunk_batches} == {(0,), (1, 3, 5), (2, 4)}
    assert all(o.trunk_s > 0 and o.body_s > 0 and o.queue_s > 0 for o in outcomes)
    await blocker


async def test_the_rule_turns_the_logits_of_a_batch_into_wishes_at_once():
    seen = []

    def least_logit(logits_NG):
        seen.append(logits_NG.tolist())
        return logits_NG.argmin(1)

    h = Harness(FakeEngine(), limit=8, wish=least_logit)
    h.engine.hold.clear()
    blocker = h.submit(0)
    await settle()
    images = [h.submit(1), h.submit(2, forced=0), h.submit(3), h.submit(4)]
    h.engine.hold.set()
    outcomes = await asyncio.gather(blocker, *images)
    assert [o.route.gate_width for o in outcomes] == [1, 0, None, 0, 1]
    assert sorted(seen) == [[[0, 1], [0, 1], [1, 0]], [[1, 0]]]


async def test_a_rule_that_fails_fails_its_batch_alone():
    def only_even(logits_NG):
        assert logits_NG[0, 0] == 1
        return logits_NG.argmax(1)

    h = Harness(FakeEngine(), limit=1, wish=only_even)
    bad, good = h.submit(1), h.submit(2)
    with pytest.raises(BackendError):
        await bad
    assert (await good).logits_K[0] == 4
    rows = h.metric("slicewise_batch_size_sum", model="m", width="trunk")
    lost = h.metric("slicewise_madds_total", model="m", version="1", width="none", stage="trunk")
    assert (rows, lost) == (2, TRUNK_MADDS)  # the trunk of the bad one had run


@pytest.mark.parametrize("forced", [None, 1])
@pytest.mark.parametrize("poison", [4, -4], ids=["trunk", "body"])
async def test_a_failing_batch_fails_alone(poison, forced):
    h = Harness(FakeEngine(), limit=1)
    h.engine.poison = {poison}
    good, bad, after = (h.submit(v, forced=forced) for v in (2, 4, 6))
    with pytest.raises(BackendError):
        await bad
    assert [(await t).logits_K[0] for t in (good, after)] == [4, 12]


async def test_logits_that_are_not_finite_fail_their_image_alone():
    h = Harness(FakeEngine(), limit=8)
    h.engine.hold.clear()
    blocker = h.submit(0)
    await settle()
    bad, good = h.submit(math.nan, forced=0), h.submit(4, forced=0)
    h.engine.hold.set()
    with pytest.raises(BackendError, match="not finite"):
        await bad
    assert (await good).logits_K[0] == 8
    await blocker


async def test_at_the_deadline_the_caller_is_told_while_its_batch_still_runs():
    h = Harness(FakeEngine())
    h.engine.hold.clear()
    late = h.submit(2, deadline_s=time.monotonic() + 0.05)
    with pytest.raises(DeadlineExceededError) as caught:
        await asyncio.wait_for(late, 5)
    assert caught.value.outcome == "late"
    h.engine.hold.set()
    assert (await h.submit(8)).logits_K[0] == 16


async def test_an_image_that_expires_in_the_queue_is_never_computed():
    h = Harness(FakeEngine())
    h.engine.hold.clear()
    blocker = h.submit(2)
    await settle()
    waiting = h.submit(4, deadline_s=time.monotonic() + 0.03)
    with pytest.raises(DeadlineExceededError) as caught:
        await waiting
    assert caught.value.outcome == "expired"
    h.engine.hold.set()
    await blocker
    await h.submit(6)
    assert all(4 not in batch for batch in h.engine.trunk_batches)
    assert h.metric("slicewise_dropped_total", reason="expired") == 1


async def test_closing_finishes_what_waits():
    h = Harness(FakeEngine())
    tasks = [h.submit(v) for v in range(10)]
    await settle()
    await h.batcher.close(5)
    assert [(await t).logits_K[0] for t in tasks] == [2 * v for v in range(10)]
    with pytest.raises(DrainingError):
        await h.submit(1)


async def test_closing_refuses_what_does_not_fit_the_drain_time_and_every_promise_resolves():
    h = Harness(FakeEngine(), limit=1)
    h.engine.hold.clear()
    tasks = [h.submit(v) for v in range(6)]
    await settle()
    closing = asyncio.ensure_future(h.batcher.close(0.02))
    await asyncio.sleep(0.1)
    h.engine.hold.set()
    await asyncio.wait_for(closing, 5)
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert all(isinstance(r, DrainingError) for r in results)


async def test_departed_callers_do_not_fill_the_queue():
    h = Harness(FakeEngine(), capacity=4)
    h.engine.hold.clear()
    blocker = h.submit(0)
    await settle()
    for value in range(50):
        gone = h.submit(value)
        await settle()
        gone.cancel()
        await settle()
    assert h.batcher.waiting <= 4
    h.engine.hold.set()
    assert (await blocker).logits_K[0] == 0


async def test_the_ledger_is_exact_whatever_happens_to_the_images():
    h = Harness(FakeEngine(workers=2), limit=3)
    h.engine.poison = {-7, -15, -20}
    rng = np.random.default_rng(0)
    tasks = []
    for value in range(60):
        soon = time.monotonic() + 0.001 if value % 11 == 0 else math.inf
        tasks.append(h.submit(value, forced=0 if value % 5 == 0 else None, deadline_s=soon))
        if value % 7 == 3:
            await asyncio.sleep(0)
            tasks[int(rng.integers(len(tasks)))].cancel()
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    await h.batcher.close(5)
    rows = h.metric("slicewise_batch_size_sum", model="m", width="trunk")
    trunk = sum(
        h.metric("slicewise_madds_total", model="m", version="1", width=w, stage="trunk") for w in ("0", "1", "none")
    )
    gated = (trunk - rows * TRUNK_MADDS) / 10
    assert rows == sum(map(len, h.engine.trunk_batches))
    assert gated == int(gated)
    assert 0 < gated < rows
    for width in (0, 1):
        images = h.metric("slicewise_batch_size_sum", model="m", width=str(width))
        body = h.metric("slicewise_madds_total", model="m", version="1", width=str(width), stage="body")
        assert body == images * (SLICES[width].madds_published - TRUNK_MADDS)


async def test_callers_pay_what_the_ledger_says_and_nothing_for_what_failed():
    h, paid = Harness(FakeEngine(), limit=1), []
    for value, forced in ((2, None), (3, None), (4, 1)):
        await h.submit(value, forced=forced, spend=paid.append)
    assert paid == [110, 210, 200]
    ledger = [
        sample.value
        for family in h.telemetry.registry.collect()
        for sample in family.samples
        if sample.name == "slicewise_madds_total"
    ]
    assert sum(paid) == sum(ledger)
    h.engine.poison = {5, -6}
    for value in (5, 6):
        with pytest.raises(BackendError):
            await h.submit(value, spend=paid.append)
    assert len(paid) == 3


async def test_who_leaves_after_the_trunk_pays_for_the_trunk():
    h, paid = Harness(FakeEngine(), limit=1), []
    began, go_on = threading.Event(), threading.Event()
    gate = h.engine.gate

    def slow_gate(inputs):
        began.set()
        assert go_on.wait(10)
        return gate(inputs)

    h.engine.gate = slow_gate
    leaver = h.submit(2, spend=paid.append)
    assert await asyncio.to_thread(began.wait, 10)
    leaver.cancel()
    go_on.set()
    await asyncio.gather(leaver, return_exceptions=True)
    await h.submit(4)
    assert paid == [TRUNK_MADDS + 10]


class ExitEngine(FakeEngine):
    """Its slice 0 is an early exit: even values are answered by the trunk. ``bodies`` holds up all others."""

    has_exit = True

    def __init__(self, workers=1):
        super().__init__(workers)
        self.bodies, self.threads = threading.Event(), {}
        self.bodies.set()

    def body(self, width, features):
        assert width == 0 or self.bodies.wait(10)
        self.threads.setdefault(width, set()).add(threading.get_ident())
        return super().body(width, features)


async def test_what_an_exit_answers_takes_no_worker():
    h = Harness(ExitEngine())
    outcomes = await asyncio.wait_for(asyncio.gather(*(h.submit(v) for v in (1, 2, 3, 4))), 5)
    assert [o.logits_K[0] for o in outcomes] == [2, 4, 6, 8]
    assert [o.route.width for o in outcomes] == [1, 0, 1, 0]
    assert h.engine.threads[0] == {threading.get_ident()}
    assert threading.get_ident() not in h.engine.threads[1]
    for width in ("0", "1"):
        assert h.metric("slicewise_batch_size_sum", model="m", width=width) == 2
    assert len(h.scheduler) == 0


async def test_what_an_exit_answers_does_not_wait_for_bodies():
    h = Harness(ExitEngine(), limit=2)
    h.engine.bodies.clear()
    h.engine.hold.clear()
    first = h.submit(4)
    await settle()  # it is on the worker; the others share the next trunk
    odd, even = h.submit(1), h.submit(2)
    await settle()
    h.engine.hold.set()
    assert (await asyncio.wait_for(first, 5)).logits_K[0] == 8
    assert (await asyncio.wait_for(even, 5)).logits_K[0] == 4
    assert not odd.done()
    h.engine.bodies.set()
    assert (await asyncio.wait_for(odd, 5)).logits_K[0] == 2


async def test_a_caller_who_left_is_not_answered_at_an_exit():
    h = Harness(ExitEngine())
    h.engine.hold.clear()
    gone, odd = h.submit(2), h.submit(1)
    await settle()
    gone.cancel()
    h.engine.hold.set()
    await asyncio.wait_for(odd, 5)
    assert h.metric("slicewise_dropped_total", reason="cancelled") == 1
    assert h.metric("slicewise_batch_size_sum", model="m", width="0") == 0


async def test_an_exit_that_fails_fails_alone():
    h = Harness(ExitEngine())
    h.engine.poison = {-2}
    first, second = h.submit(2), h.submit(3)
    with pytest.raises(BackendError):
        await asyncio.wait_for(first, 5)
    assert (await asyncio.wait_for(second, 5)).logits_K[0] == 6
    assert (await asyncio.wait_for(h.submit(4), 5)).logits_K[0] == 8
