"""What an early exit answers needs no worker."""

import asyncio
import threading

import pytest
from batching import FakeEngine, Harness, settle

from service.errors import BackendError


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
