"""The shared store against a real Redis: alive, killed, started again, frozen, slow, and full of rubbish."""

import asyncio
import contextlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis
from redis_server import running_redis

from service import quota, store
from service.caching import Answer
from service.errors import StoreError
from service.quota import Limit
from service.redis_client import RedisClient
from service.request import Reason, Route, Window
from service.settings import SettingError
from service.store import ANSWER_PREFIX, QUOTA_PREFIX, RedisCache, RedisQuotas
from service.telemetry import Telemetry

K = 10
ANY = Window(0, 5)
TIMEOUT_S, RETRY_S = 0.2, 0.3


@pytest.fixture(scope="module")
def server():
    with running_redis() as running:
        yield running


@pytest.fixture
def redis(server):
    server.ask("FLUSHALL")
    return server


def answer(width, value=0.0):
    return Answer(Route(width, Reason.GATE, width), np.full(K, value, np.float32), np.zeros(3, np.float32))


class Shop:
    """A client and both stores on it."""

    def __init__(self, url, ttl_s=60):
        self.telemetry = Telemetry()
        self.client = RedisClient(url, TIMEOUT_S, RETRY_S, self.telemetry)
        self.cache, self.quotas = RedisCache(self.client, ttl_s), RedisQuotas(self.client)

    async def keep(self, key, kept):
        self.cache.keep(key, kept)
        await asyncio.gather(*self.cache._pending)

    async def find(self, key, window=ANY):
        return await self.cache.find(key, window, K, None)

    async def close(self):
        await self.quotas.close()
        await self.cache.close()
        await self.client.close()

    def failures(self, kind):
        return self.telemetry.registry.get_sample_value("slicewise_store_failures_total", {"kind": kind}) or 0


@contextlib.asynccontextmanager
async def shop(server, **changes):
    opened = Shop(server.url, **changes)
    try:
        yield opened
    finally:
        await opened.close()


async def refused(call):
    with pytest.raises(StoreError):
        await call


async def comes_back(call, give_up_s=10):
    async with asyncio.timeout(give_up_s):
        while True:
            with contextlib.suppress(StoreError):
                return await call()
            await asyncio.sleep(0.05)


async def test_replicas_share_answers_which_serve_the_windows_that_hold_them(redis):
    async with shop(redis) as one, shop(redis) as other:
        assert await one.find("a") is None
        await one.keep("a", answer(2, 0.5))
        await one.keep("a", answer(4, 0.7))
        assert (await other.find("a")).route.width == 4
        assert (await other.find("a", Window(0, 3))).logits_K[0] == 0.5
        assert await other.find("a", Window(3, 3)) is None
        assert await other.find("b") is None


async def test_everything_that_is_written_expires(redis):
    async with shop(redis, ttl_s=77) as one:
        await one.keep("a", answer(2))
        one.quotas.charge("somebody", Limit(10, 100), 500)
        await one.quotas.close()
        with Redis.from_url(redis.url) as raw:
            names = [name.decode() for name in raw.keys("*")]
            assert sorted(name.rpartition(":")[0] + ":" for name in names) == [ANSWER_PREFIX, QUOTA_PREFIX]
            assert raw.ttl(ANSWER_PREFIX + "a") in (76, 77)
            assert 49 <= raw.ttl(next(name for name in names if name.startswith(QUOTA_PREFIX))) <= 51
            assert "somebody" not in "".join(names)


async def test_a_damaged_answer_is_an_error_and_never_served(redis):
    async with shop(redis) as one:
        await one.keep("a", answer(2))
        with Redis.from_url(redis.url) as raw:
            raw.hset(ANSWER_PREFIX + "a", "2", b"rubbish")
            raw.set(ANSWER_PREFIX + "b", b"of another type")
        await refused(one.find("a"))
        await refused(one.find("b"))
        assert one.failures("find") == 1


async def test_replicas_share_buckets(redis):
    limit = Limit(1, 1000)
    async with shop(redis) as one, shop(redis) as other:
        assert await one.quotas.tokens_madds("a", limit) == 1000
        for _ in range(10):
            one.quotas.charge("a", limit, 70)
            other.quotas.charge("a", limit, 80)
        assert await one.quotas.tokens_madds("a", limit) <= 1000 - 700 + 1
        await one.quotas.close()
        await other.quotas.close()
        for replica in (one, other):
            assert await replica.quotas.tokens_madds("a", limit) == pytest.approx(-500, abs=5)
            assert await replica.quotas.tokens_madds("b", limit) == 1000


async def test_clients_whose_charges_wait_are_bounded(redis, monkeypatch):
    monkeypatch.setattr(store, "MOST_CLIENTS", 2)
    limit = Limit(1, 1000)
    async with shop(redis) as one:
        for client in "abcab":
            one.quotas.charge(client, limit, 100)
        await one.quotas.close()
        assert [round(await one.quotas.tokens_madds(client, limit), -1) for client in "abc"] == [800, 800, 1000]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(Limit, st.integers(1, 10**9), st.integers(1, 3600)),
    st.lists(st.tuples(st.integers(0, 10**8), st.integers(0, 10**10)), max_size=20),
)
def test_the_script_counts_as_the_pure_bucket_does(redis, limit, steps):
    """With the time handed in instead of read; microseconds, as the store's clock tells them."""
    script = quota.REDIS_SCRIPT.replace("redis.call('TIME')", "{ARGV[4], ARGV[5]}")
    redis.ask("FLUSHALL")
    with Redis.from_url(redis.url) as raw:
        now_us = 1_700_000_000_000_000
        bucket = quota.full(limit, now_us / 1e6)
        for pause_us, madds in steps:
            now_us += pause_us
            now = divmod(now_us, 10**6)
            told = raw.eval(script, 1, "x", limit.madds_per_s, limit.capacity_madds, madds, *now)
            now_s = now[0] + now[1] / 1e6
            if madds:
                bucket = quota.after(bucket, limit, now_s, madds)
            expected = quota.after(bucket, limit, now_s).tokens_madds
            assert float(told) == pytest.approx(expected, rel=1e-12, abs=1e-6)


async def test_killed_and_started_again(redis):
    async with shop(redis) as one:
        await one.keep("a", answer(2))
        redis.kill()
        for _ in range(5):
            await refused(one.find("a"))
        one.quotas.charge("a", Limit(1, 1000), 10)
        await one.quotas.close()
        await one.keep("b", answer(1))
        assert (one.failures("find"), one.failures("charge"), one.failures("keep")) == (5, 1, 1)
        redis.start()
        assert await comes_back(lambda: one.find("a")) is None
        await one.keep("a", answer(2))
        assert (await one.find("a")).route.width == 2
        assert await one.quotas.tokens_madds("a", Limit(1, 1000)) == 1000


async def test_frozen_it_costs_a_few_timeouts_and_then_nothing(redis):
    async with shop(redis) as one:
        await one.keep("a", answer(2))
        redis.freeze()
        try:
            loop = asyncio.get_running_loop()
            times = []
            for _ in range(20):
                began_s = loop.time()
                await refused(one.find("a"))
                times.append(loop.time() - began_s)
            assert sum(seconds > TIMEOUT_S / 2 for seconds in times) <= 3 + sum(times) / RETRY_S
            assert one.failures("find") == 20
        finally:
            redis.thaw()
        found = await comes_back(lambda: one.find("a"))
        assert found.route.width == 2  # and not what an earlier, abandoned question was answered


async def test_slow_answers_are_not_taken_for_those_of_later_questions(redis):
    async with shop(redis) as one:
        for name, width in (("a", 1), ("b", 2), ("c", 3)):
            await one.keep(name, answer(width))
        redis.pause(int(TIMEOUT_S * 2500))
        await asyncio.gather(*(refused(one.find(name)) for name in "abc"))
        await asyncio.sleep(TIMEOUT_S * 2)
        for _ in range(10):
            for name, width in (("a", 1), ("b", 2), ("c", 3)):
                assert (await comes_back(lambda name=name: one.find(name))).route.width == width


async def test_a_deadline_shortens_the_question_and_does_not_blame_the_store(redis):
    async with shop(redis) as one:
        await one.keep("a", answer(1))
        redis.freeze()
        try:
            for _ in range(10):
                with pytest.raises(StoreError, match="deadline"):
                    await one.cache.find("a", ANY, K, 0.005)
        finally:
            redis.thaw()
        assert (await one.find("a")).route.width == 1


def test_an_address_that_is_none_is_a_setting_error_that_tells_no_password():
    with pytest.raises(SettingError, match="redis_url") as caught:
        RedisClient("http://user:hunter2@host", 1, 1, Telemetry())
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
