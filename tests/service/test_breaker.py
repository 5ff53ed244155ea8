from hypothesis import given
from hypothesis import strategies as st

from service.breaker import FAILURES, Breaker

RETRY_S = 2.0


def opened(now_s=10.0):
    breaker = Breaker(RETRY_S)
    assert [breaker.failed(now_s) for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
    return breaker


def test_it_opens_after_failures_in_a_row_only():
    breaker = Breaker(RETRY_S)
    for _ in range(10):
        for _ in range(FAILURES - 1):
            assert not breaker.failed(0.0)
        assert not breaker.succeeded()
        assert breaker.admits(0.0)
    assert opened().is_open


def test_open_it_admits_one_probe_per_interval():
    breaker = opened(10.0)
    assert not breaker.admits(11.9)
    assert breaker.admits(12.0)
    assert not breaker.admits(12.0)
    assert not breaker.failed(12.5)
    assert not breaker.admits(14.4)
    assert breaker.admits(14.5)
    assert breaker.succeeded()
    assert breaker.admits(14.5)
    assert not breaker.is_open


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=200))
def test_while_every_call_fails_few_go_out(steps):
    """Of any calls over a time T, at most FAILURES and one per retry interval are made."""
    breaker, now_s, made = Breaker(RETRY_S), 0.0, 0
    for pause_s, _ in steps:
        now_s += pause_s
        if breaker.admits(now_s):
            made += 1
            breaker.failed(now_s)
    assert made <= FAILURES + now_s / RETRY_S
