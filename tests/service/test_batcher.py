import asyncio
import math
import threading
import time

import numpy as np
import pytest
import structlog
from batching import SLICES, TRUNK_MADDS, FakeEngine, Harness, settle

from service.batcher import Batcher
from service.errors import BackendError, DeadlineExceededError, DrainingError
from service.latency import Overhead


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


def let_worker_finish(h):
    """Without giving the loop a turn: the batch is computed, and nobody has heard of it."""
    h.engine.hold.set()
    give_up_s = time.monotonic() + 10
    while not h.batcher._finished and time.monotonic() < give_up_s:
        time.sleep(0.001)
    assert len(h.batcher._finished) == 1


async def computed(h, value, **how):
    """An image whose batch a worker has just finished."""
    h.engine.hold.clear()
    image = h.submit(value, **how)
    await settle()
    let_worker_finish(h)
    return image


@pytest.mark.parametrize(("ahead", "counts"), [(0, True), (1, False)])
async def test_without_a_batch_ahead_a_worker_is_kept_until_the_loop_comes_to_it(monkeypatch, ahead, counts):
    h, told_s = Harness(FakeEngine()), []
    h.batcher._ahead = ahead

    def finished(batch, now_s, trunk_s=0.0, body_s=0.0):
        told_s.append((trunk_s, body_s))

    monkeypatch.setattr(h.scheduler, "finished", finished)
    for forced in (None, 1):
        image = await computed(h, 2, forced=forced)
        time.sleep(0.1)  # the loop has others to serve
        await asyncio.wait_for(image, 5)
    (trunk_s, _), _, whole_s = told_s
    assert [seconds >= 0.1 for seconds in (trunk_s, sum(whole_s))] == [counts, counts]
    assert whole_s[1] < 0.1  # the wait is the trunk's


async def test_a_batch_is_settled_for_whoever_comes_first_and_its_answers_are_a_turn_away():
    h = Harness(FakeEngine())
    h.engine.hold.clear()
    first = h.submit(2, forced=0)
    await settle()
    seen = []

    async def begin():
        seen.append((h.batcher.settle_finished(), first.done()))
        await asyncio.sleep(0)
        seen.append((h.batcher.settle_finished(), first.done()))

    newcomers = [asyncio.create_task(begin()) for _ in range(2)]
    let_worker_finish(h)  # the loop hears of it behind the newcomers
    await asyncio.gather(*newcomers)
    assert seen == [(True, False)] * 2 + [(False, True)] * 2
    assert (await asyncio.wait_for(h.submit(4), 5)).logits_K[0] == 8  # its worker is free again


async def test_nobody_waits_for_answers_of_a_trunk():
    h = Harness(FakeEngine())
    image = await computed(h, 2)
    assert not h.batcher.settle_finished()
    assert (await asyncio.wait_for(image, 5)).logits_K[0] == 4


async def test_a_failure_is_told_to_its_batch_and_not_to_whoever_settles_it(monkeypatch):
    h, logged_for, fail = Harness(FakeEngine()), [], Batcher._fail

    def noting(self, execution):
        logged_for.append(structlog.contextvars.get_contextvars())
        fail(self, execution)

    monkeypatch.setattr(Batcher, "_fail", noting)
    h.engine.poison.add(2)
    poisoned = await computed(h, 2)
    with structlog.contextvars.bound_contextvars(request_id="of somebody else"):
        h.batcher.settle_finished()
    assert logged_for == [{}]
    with pytest.raises(BackendError, match="failed on a batch of 1"):
        await asyncio.wait_for(poisoned, 5)
    assert (await asyncio.wait_for(h.submit(4), 5)).logits_K[0] == 8


async def test_a_bug_in_the_books_is_told_to_the_batch_too(monkeypatch):
    h = Harness(FakeEngine())
    victim = await computed(h, 2, forced=0)
    with monkeypatch.context() as patch:
        patch.setattr(h.scheduler, "finished", lambda *_, **__: 1 / 0)
        h.batcher.settle_finished()
    with pytest.raises(BackendError):
        await asyncio.wait_for(victim, 5)


async def test_an_image_that_is_late_during_its_trunk_is_counted_with_that_batch(monkeypatch):
    h, booked = Harness(FakeEngine()), []
    monkeypatch.setattr(Overhead, "worked", lambda self, cpu_s, images: booked.append(images))
    h.engine.hold.clear()
    late, patient = h.submit(2, deadline_s=time.monotonic() + 0.05, done_by_s=math.inf), h.submit(4)
    with pytest.raises(DeadlineExceededError):
        await asyncio.wait_for(late, 5)
    h.engine.hold.set()
    await asyncio.wait_for(patient, 5)
    assert sum(booked) == 2


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
