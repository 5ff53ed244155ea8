import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import traces

rates = st.floats(1, 300)
durations = st.floats(0.1, 5)
seeds = st.integers(0, 2**32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@st.composite
def drawn(draw) -> tuple[np.ndarray, float]:
    """Arrivals of any kind, and their duration in s."""
    duration_s, source = draw(durations), rng(draw(seeds))
    low, high, cv2 = draw(rates), draw(rates), draw(st.floats(0.1, 16))
    kind = draw(st.sampled_from(["poisson", "constant", "bursty", "accelerating", "step"]))
    match kind:
        case "poisson":
            return traces.poisson(low, duration_s, source), duration_s
        case "constant":
            return traces.constant(low, duration_s), duration_s
        case "bursty":
            return traces.bursty(low + high, low, cv2, duration_s, source), duration_s
        case "accelerating":
            return traces.accelerating(low, high, draw(st.floats(0.1, 500)), duration_s, source, cv2), duration_s
    span_s = (duration_s * draw(st.floats(0, 0.4)), duration_s * draw(st.floats(0.5, 1)))
    return traces.step(low, high, span_s, duration_s, source), duration_s


@given(drawn())
def test_arrivals_ascend_from_0_to_below_the_duration(found):
    arrivals, duration_s = found
    assert (np.diff(arrivals) >= 0).all()
    assert ((arrivals >= 0) & (arrivals < duration_s)).all()
    assert (np.round(arrivals, 6) == arrivals).all()


@given(rates, durations, st.floats(0.1, 16), seeds)
def test_the_same_seed_gives_the_same_arrivals(rate, duration_s, cv2, seed):
    first, second = (traces.bursty(2 * rate, rate, cv2, duration_s, rng(seed)) for _ in range(2))
    assert (first == second).all()


def test_another_seed_gives_other_arrivals():
    assert traces.poisson(100, 2, rng(1)).tolist() != traces.poisson(100, 2, rng(2)).tolist()


@given(rates, durations)
def test_equal_gaps_are_one_over_the_rate_from_0(rate, duration_s):
    arrivals = traces.constant(rate, duration_s)
    assert arrivals[0] == 0
    assert np.diff(arrivals) == pytest.approx(1 / rate, abs=2e-6)
    assert len(arrivals) == pytest.approx(rate * duration_s, abs=1)


@pytest.mark.parametrize("cv2", [0.25, 1.0, 2.0, 4.0, 8.0])
def test_a_renewal_stream_has_its_rate_and_its_cv2(cv2):
    arrivals = traces.modulated([(0.0, 500.0)], 400, rng(5), cv2)
    assert traces.mean_rate(arrivals, 400) == pytest.approx(500, rel=5 * math.sqrt(cv2 / 200_000))
    assert traces.measured_cv2(arrivals) == pytest.approx(cv2, rel=0.08)


def test_a_stream_of_bursts_is_stationary_from_its_start():
    """A renewal stream that began with a whole gap would have (CV2 - 1) / 2 = 3.5 arrivals too many here."""
    counts = [len(traces.modulated([(0.0, 10.0)], 2.0, rng(seed), 8.0)) for seed in range(4000)]
    assert np.mean(counts) == pytest.approx(20, abs=5 * np.std(counts) / math.sqrt(4000))
    assert 5 * np.std(counts) / math.sqrt(4000) < 1.5


def test_bursts_come_on_top_of_equal_gaps():
    arrivals = traces.bursty(300, 100, 4.0, 200, rng(1))
    assert set(traces.constant(100, 200)) <= set(arrivals.tolist())
    assert traces.mean_rate(arrivals, 200) == pytest.approx(300, rel=0.05)
    assert traces.bursty(300, 0, 4.0, 200, rng(1)).tolist() == traces.modulated([(0, 300)], 200, rng(1), 4.0).tolist()


@pytest.mark.parametrize("cv2", [1.0, 4.0])
def test_a_ramp_has_the_expected_counts_and_then_stays(cv2):
    arrivals = traces.accelerating(100, 500, 20, 60, rng(3), cv2)  # 20 s of ramp
    in_ramp, first_half, after = ((arrivals >= a) & (arrivals < b) for a, b in ((0, 20), (0, 10), (20, 60)))
    assert in_ramp.sum() == pytest.approx(6000, rel=0.06)
    assert first_half.sum() == pytest.approx(2000, rel=0.12)
    assert after.sum() == pytest.approx(20_000, rel=0.04)


def test_a_ramp_may_go_down_to_nothing_and_may_outlast_the_trace():
    assert traces.accelerating(100, 0, 10, 60, rng(0))[-1] < 10
    slow = traces.accelerating(200, 1e6, 1e-3, 10, rng(0))
    assert len(slow) == pytest.approx(2000, rel=0.15)


def test_a_step_changes_the_rate_within_its_span_only():
    arrivals = traces.step(100, 900, (20, 30), 60, rng(2))
    before, within, after = (((arrivals >= a) & (arrivals < b)).sum() for a, b in ((0, 20), (20, 30), (30, 60)))
    assert (before, within, after) == (
        pytest.approx(2000, rel=0.12), pytest.approx(9000, rel=0.06), pytest.approx(3000, rel=0.1)
    )  # fmt: skip


def test_a_step_to_the_end_and_a_step_from_nothing():
    to_the_end = traces.step(10, 1000, (5, 10), 10, rng(0))
    assert (to_the_end >= 5).sum() == pytest.approx(5000, rel=0.08)
    only = traces.step(0, 200, (2, 3), 10, rng(0))
    assert len(only) > 100
    assert ((only >= 2) & (only < 3)).all()


@given(drawn(), st.floats(0.01, 3))
def test_the_peak_is_the_most_that_any_window_holds(found, window_s):
    arrivals, duration_s = found
    edges = [*arrivals, *(arrivals - window_s), *np.linspace(0, duration_s, 20)]
    most = max(int(((arrivals >= edge) & (arrivals < edge + window_s)).sum()) for edge in edges)
    assert traces.peak_rate(arrivals, window_s) == pytest.approx(most / window_s)


def test_peak_and_mean_of_known_arrivals():
    arrivals = np.array([0.0, 0.4, 0.9, 1.0, 5.0])
    assert traces.peak_rate(arrivals, 1.0) == 3  # 1.0 is out of [0, 1) and 0 is out of [0.4, 1.4)
    assert traces.mean_rate(arrivals, 10) == 0.5
    assert traces.peak_rate(np.empty(0), 1.0) == 0


def test_cv2_of_known_gaps():
    assert traces.measured_cv2(np.array([0.0, 1.0, 4.0])) == pytest.approx(1 / 4)  # gaps 1 and 3
    assert traces.measured_cv2(traces.constant(100, 5)) == pytest.approx(0, abs=1e-9)
    assert traces.measured_cv2(np.array([0.0, 1.0])) is None
    assert traces.measured_cv2(np.array([2.0, 2.0, 2.0])) is None


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: traces.poisson(0, 1, rng()), r"rates are 0 requests/s; allowed: 0 or more, and one above 0"),
        (lambda: traces.poisson(math.nan, 1, rng()), "rates are nan"),
        (lambda: traces.poisson(1, 0, rng()), r"duration is 0 s; allowed: above 0 s"),
        (lambda: traces.poisson(1e9, 1e3, rng()), r"1,000,000,000,000 requests; allowed: up to 10,000,000"),
        (lambda: traces.constant(-1, 1), r"rate is -1 requests/s; allowed: above 0 requests/s"),
        (lambda: traces.constant(1, math.inf), "duration is inf s"),
        (lambda: traces.bursty(100, 100, 2, 1, rng()), "base rate is 100 requests/s; allowed: .* below the mean rate"),
        (lambda: traces.bursty(100, -1, 2, 1, rng()), "base rate is -1"),
        (lambda: traces.bursty(100, 50, 0, 1, rng()), r"CV2 is 0; allowed: above 0, up to 1000"),
        (lambda: traces.accelerating(1, 2, 0, 1, rng()), r"tau is 0 requests/s\^2"),
        (lambda: traces.accelerating(-1, 2, 1, 1, rng()), "rates are -1, 2 requests/s"),
        (lambda: traces.step(1, 2, (3, 3), 5, rng()), r"from 3 s to 3 s; allowed: 0 <= from < to"),
        (lambda: traces.step(1, 2, (3, 6), 5, rng()), "duration of 5 s"),
        (lambda: traces.peak_rate(np.empty(0), 0), "window is 0 s"),
        (lambda: traces.mean_rate(np.empty(0), -1), "duration is -1 s"),
    ],
)
def test_what_is_out_of_range_is_refused_with_what_is_allowed(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()
