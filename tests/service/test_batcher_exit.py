"""What an early exit answers needs no worker."""

import asyncio
import threading
import time

import numpy as np
import pytest
from batching import FakeEngine, Harness, settle

from service.errors import BackendError, DeadlineExceededError
from service.request import Reason, Route


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


EARLY = Route(0, Reason.LATENCY_BUDGET, 1)
SLICE_0_MADDS, SLICE_1_MADDS = 110, 210


async def behind_a_body(h, value=3, **fields):
    """An image that is past the trunk; the only worker is busy with the body of another, until ``bodies`` is set."""
    h.engine.hold.clear()
    image = h.submit(value, **fields)
    await settle()
    blocker = h.submit(1, forced=1, deadline_s=time.monotonic() + 0.1)
    h.engine.bodies.clear()
    h.engine.hold.set()
    with pytest.raises(DeadlineExceededError):  # a forced slice is not narrowed
        await asyncio.wait_for(blocker, 5)
    return image


def spent_madds(h):
    stages = ((width, stage) for width in ("none", "0", "1") for stage in ("trunk", "body"))
    return sum(
        h.metric("slicewise_madds_total", model="m", version="1", width=width, stage=stage) for width, stage in stages
    )


async def test_who_waits_for_a_body_at_the_deadline_is_answered_by_the_exit():
    h, spent = Harness(ExitEngine()), []
    image = await behind_a_body(h, deadline_s=time.monotonic() + 0.3, spend=spent.append)
    outcome = await asyncio.wait_for(image, 5)
    assert (outcome.route, outcome.logits_K[0], spent) == (EARLY, 6, [SLICE_0_MADDS])
    h.engine.bodies.set()
    await asyncio.wait_for(h.submit(5), 5)
    assert all(3 not in values for width, values in h.engine.body_batches if width == 1)
    assert spent == [SLICE_0_MADDS]
    assert h.metric("slicewise_dropped_total", reason="expired") == 0
    assert len(h.scheduler) == len(h.scheduler._backlog) == 0


async def test_who_may_not_have_the_exit_is_late():
    h = Harness(ExitEngine())
    image = await behind_a_body(h, least=1, deadline_s=time.monotonic() + 0.2)
    with pytest.raises(DeadlineExceededError):
        await asyncio.wait_for(image, 5)
    h.engine.bodies.set()


async def test_a_body_that_takes_too_long_leaves_the_answer_of_the_exit_and_is_paid_for():
    h, spent = Harness(ExitEngine()), []
    h.engine.bodies.clear()
    outcome = await asyncio.wait_for(h.submit(3, deadline_s=time.monotonic() + 0.1, spend=spent.append), 5)
    assert (outcome.route, outcome.logits_K[0], spent) == (EARLY, 6, [])
    h.engine.bodies.set()
    await asyncio.wait_for(h.submit(5), 5)
    assert spent == [SLICE_1_MADDS]
    assert spent_madds(h) == 2 * SLICE_1_MADDS


async def test_a_trunk_that_ends_after_the_time_for_batches_and_before_the_deadline_answers():
    h, now_s = Harness(ExitEngine()), time.monotonic()
    h.engine.hold.clear()
    image = h.submit(3, done_by_s=now_s + 0.05, deadline_s=now_s + 5)
    await asyncio.sleep(0.1)
    h.engine.hold.set()
    assert (await asyncio.wait_for(image, 1)).route == EARLY


async def test_who_is_given_up_for_an_urgent_image_is_answered_by_the_exit():
    h = Harness(ExitEngine())
    image = await behind_a_body(h, urgency=7)
    assert h.batcher.shed(0, 1)
    assert (await asyncio.wait_for(image, 5)).route == Route(0, Reason.LOAD, 1)
    assert not h.batcher.shed(0, 1)
    h.engine.bodies.set()


async def test_closing_answers_who_is_past_the_trunk():
    h = Harness(ExitEngine())
    image = await behind_a_body(h)
    closing = asyncio.ensure_future(h.batcher.close(0.01))
    await asyncio.sleep(0.05)
    h.engine.bodies.set()
    await asyncio.wait_for(closing, 5)
    assert (await image).route == Route(0, Reason.LOAD, 1)


async def test_an_exit_that_is_not_finite_at_the_deadline_leaves_it_to_the_body():
    h = Harness(ExitEngine(), wish=lambda logits_NG: np.ones(len(logits_NG), int))
    h.engine.bodies.clear()
    image = h.submit(np.nan, done_by_s=time.monotonic() + 0.05, deadline_s=time.monotonic() + 5)
    await asyncio.sleep(0.1)
    assert not image.done()
    h.engine.bodies.set()
    with pytest.raises(BackendError, match="not finite"):
        await asyncio.wait_for(image, 5)


async def test_an_answer_at_the_exit_could_have_left_when_the_trunk_ended():
    h = Harness(ExitEngine())
    h.engine.hold.clear()
    image = h.submit(2)
    await settle()
    h.engine.hold.set()
    time.sleep(0.1)  # the event loop has others to serve
    resumed_s = time.monotonic()
    assert (await asyncio.wait_for(image, 5)).done_s < resumed_s - 0.05
