import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import quota
from service.quota import MOST_MADDS, Bucket, Limit

limits = st.builds(Limit, st.integers(1, 10**9), st.integers(1, 3600))
steps = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10**10)), max_size=50)


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (1, 0), (-5, 1), (MOST_MADDS + 1, 1), (10**13, 3600)])
def test_limits_that_cannot_be_counted_with_are_refused(rate, burst):
    with pytest.raises(ValueError, match="allowed"):
        Limit(rate, burst)


def test_it_fills_at_its_rate_up_to_its_capacity_and_goes_below_zero():
    limit = Limit(100, 10)
    bucket = quota.after(quota.full(limit, 5.0), limit, 5.0, 1500)
    assert bucket == Bucket(-500.0, 5.0)
    assert quota.retry_after_s(bucket.tokens_madds, limit) == pytest.approx(5.01)
    assert quota.after(bucket, limit, 9.0).tokens_madds == -100
    assert quota.after(bucket, limit, 11.0).tokens_madds == 100
    assert quota.after(bucket, limit, 1000.0).tokens_madds == 1000


@given(limits, steps)
def test_nobody_spends_more_than_rate_and_capacity_and_one_request(limit, requests):
    """What entered costs at most what came in over the time, the capacity, and the last request's debt."""
    bucket, now_s, spent, last = quota.full(limit, 0.0), 0.0, 0, 0
    for pause_s, madds in requests:
        now_s += pause_s
        bucket = quota.after(bucket, limit, now_s)
        assert bucket.tokens_madds <= limit.capacity_madds
        if quota.admits(bucket.tokens_madds):
            spent, last = spent + madds, madds
            bucket = quota.after(bucket, limit, now_s, madds)
    assert spent <= (limit.capacity_madds + now_s * limit.madds_per_s) * (1 + 1e-9) + last


@given(limits, st.integers(0, 10**12))
def test_who_waits_as_told_is_admitted(limit, spent):
    bucket = quota.after(quota.full(limit, 0.0), limit, 0.0, spent)
    wait_s = quota.retry_after_s(bucket.tokens_madds, limit)
    assert quota.admits(quota.after(bucket, limit, wait_s * (1 + 1e-9) + 1e-6).tokens_madds)


def test_a_clock_that_goes_back_gives_nothing():
    limit = Limit(100, 10)
    bucket = quota.after(quota.full(limit, 50.0), limit, 50.0, 1000)
    back = quota.after(bucket, limit, 20.0)
    assert back == Bucket(0.0, 50.0)
    assert quota.after(back, limit, 51.0).tokens_madds == 100


@given(limits, st.floats(-1e12, 1e15))
def test_fields_are_structured_items_with_integers(limit, tokens):
    policy = re.fullmatch(r'"madds";q=(\d{1,15});qu="madds";w=(\d{1,15})', quota.policy_field(limit))
    left = re.fullmatch(r'"madds";r=(\d{1,15});t=(\d{1,15})', quota.limit_field(tokens, limit))
    assert policy
    assert left
    assert (int(policy[1]), int(policy[2])) == (limit.capacity_madds, limit.burst_s)
    assert int(left[1]) <= limit.capacity_madds
    assert (int(left[2]) == 0) == (tokens >= limit.capacity_madds)
