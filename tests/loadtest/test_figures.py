import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.figures import median_interval, pair_differences, pair_ratios, percentile

positive = st.floats(0.01, 1e6)
values = st.lists(positive, min_size=1, max_size=25)


@given(values)
def test_the_interval_holds_the_median_and_stays_within_the_values(given_values):
    found = median_interval(given_values)
    assert min(given_values) <= found.low <= found.median <= found.high <= max(given_values)


@given(values, st.floats(0.1, 10))
def test_the_interval_scales_with_its_values(given_values, factor):
    found, scaled = median_interval(given_values), median_interval([factor * value for value in given_values])
    expected = (factor * found.low, factor * found.median, factor * found.high)
    assert (scaled.low, scaled.median, scaled.high) == pytest.approx(expected)


@given(positive, st.integers(1, 25))
def test_equal_values_leave_no_doubt(value, count):
    found = median_interval([value] * count)
    assert (found.low, found.median, found.high) == pytest.approx((value, value, value))


def test_the_same_seed_gives_the_same_interval():
    given_values = list(np.random.default_rng(3).normal(1.2, 0.1, 20))
    assert median_interval(given_values, seed=7) == median_interval(given_values, seed=7)


def test_the_interval_of_many_pairs_covers_the_true_median_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [median_interval(list(rng.normal(1.0, 0.1, 20))) for _ in range(200)]
    assert 0.88 <= np.mean([one.low <= 1.0 <= one.high for one in found]) <= 1.0


@given(st.lists(positive, min_size=1, max_size=5))
def test_of_few_values_the_interval_is_their_range(given_values):
    found = median_interval(given_values)
    assert (found.low, found.high) == (min(given_values), max(given_values))


@given(st.lists(st.tuples(positive, positive), min_size=1))
def test_ratios_and_differences_undo_themselves(pairs):
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    assert [ratio * y for ratio, y in zip(pair_ratios(a, b), b, strict=True)] == pytest.approx(a)
    assert [left + y for left, y in zip(pair_differences(a, b), b, strict=True)] == pytest.approx(a)


@given(values, st.floats(0, 100))
def test_a_percentile_lies_within_its_values(given_values, percent):
    tiny = 1e-9 * max(given_values)
    assert min(given_values) - tiny <= percentile(given_values, percent) <= max(given_values) + tiny


def test_percentiles_of_a_hundred():
    hundred = list(range(101))
    assert (percentile(hundred, 50), percentile(hundred, 99)) == (50, 99)


def test_what_cannot_be_computed_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        median_interval([])
    with pytest.raises(ValueError, match="at least 1"):
        percentile([], 50)
    with pytest.raises(ValueError, match="1 and 2 values"):
        pair_ratios([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="1 and 0 values"):
        pair_differences([1.0], [])
    with pytest.raises(ValueError, match="denominator"):
        pair_ratios([1.0], [0.0])
