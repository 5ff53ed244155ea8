"""The twins in memory; what they share with Redis is in test_redis_store.py."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import caching, store
from service.caching import Answer
from service.quota import Limit
from service.request import Reason, Route, Window
from service.store import ENTRY_BYTES, MemoryCache, MemoryQuotas

K = 10
ANY = Window(0, 5)


def answer(width, value=0.0):
    return Answer(Route(width, Reason.GATE, width), np.full(K, value, np.float32), np.zeros(3, np.float32))


SIZE = len(caching.encode(answer(0))) + ENTRY_BYTES


def find(cache, key, window=ANY):
    return asyncio.run(cache.find(key, window, K, None))


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 5), st.booleans())), st.integers(0, 4 * SIZE))
def test_memory_is_bounded_and_what_is_there_was_kept(operations, limit_bytes):
    cache, kept = MemoryCache(limit_bytes, 60), set()
    for key, width, is_kept in operations:
        if is_kept:
            cache.keep(key, answer(width, width))
            kept.add((key, width))
        else:
            found = find(cache, key)
            assert found is None or ((key, found.route.width) in kept and found.logits_K[0] == found.route.width)
        assert 0 <= cache.held_bytes <= limit_bytes


def test_the_answers_used_longest_ago_go_first():
    cache = MemoryCache(2 * SIZE, 60)
    cache.keep("a", answer(0))
    cache.keep("b", answer(0))
    assert find(cache, "a")
    cache.keep("c", answer(0))
    assert [bool(find(cache, key)) for key in "abc"] == [True, False, True]


def test_an_expired_answer_is_gone(monkeypatch):
    cache, now_s = MemoryCache(10 * SIZE, 60), [0.0]
    monkeypatch.setattr(store.time, "monotonic", lambda: now_s[0])
    cache.keep("a", answer(0))
    now_s[0] = 59.9
    assert find(cache, "a")
    now_s[0] = 60.0
    assert find(cache, "a") is None
    assert cache.held_bytes == 0


def test_clients_have_buckets_of_their_own_which_are_bounded(monkeypatch):
    monkeypatch.setattr(store, "MOST_CLIENTS", 2)
    quotas, limit = MemoryQuotas(), Limit(1, 1000)

    def left(client):
        return asyncio.run(quotas.tokens_madds(client, limit))

    quotas.charge("a", limit, 1500)
    assert left("a") == pytest.approx(-500, abs=5)
    assert left("b") == 1000
    quotas.charge("b", limit, 10)
    quotas.charge("c", limit, 10)
    assert left("a") == 1000  # forgotten: the one not charged for longest
    assert left("c") == pytest.approx(990, abs=5)
