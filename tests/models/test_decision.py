import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.decision import GateCalibration, GateDecision, shares

MADDS = (10, 20, 40)
EVERY_ODDS_IS_ITS_LOGIT = GateCalibration(((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)), (0.0, 0.0, 0.0))


def log_odds(*probabilities: float) -> np.ndarray:
    p = np.asarray(probabilities)
    return np.log(p / (1 - p))[None].astype(np.float32)


def test_without_a_calibration_the_greatest_logit_wins_and_ties_go_to_the_narrower():
    decision = GateDecision((0, 1, 3), (1, 2, 3, 4), lambda_=9.0)
    logits = np.array([[0, 2, 1], [3, 3, 1], [1, 5, 5], [-1, -2, -0.5], [7, 7, 7]], np.float32)
    assert decision.widths(logits).tolist() == [1, 0, 1, 3, 0]


def test_the_wish_is_the_greatest_probability_less_lambda_times_relative_cost():
    gate_logits = log_odds(0.5, 0.7, 0.9)
    # 0.5 - 0.25 lambda, 0.7 - 0.5 lambda, 0.9 - lambda: they cross at lambda 0.4 and 0.8.
    for lambda_, width in ((0.0, 2), (0.39, 2), (0.41, 1), (0.79, 1), (0.81, 0), (100.0, 0)):
        decision = GateDecision((0, 1, 2), MADDS, EVERY_ODDS_IS_ITS_LOGIT, lambda_)
        assert decision.widths(gate_logits).tolist() == [width]
        expected = np.array([[0.5, 0.7, 0.9]]) - lambda_ * np.array([0.25, 0.5, 1.0])
        np.testing.assert_allclose(decision.utility(gate_logits), expected, rtol=1e-5, atol=1e-6)


def test_the_best_is_as_far_up_as_the_probability_does_not_fall():
    for probabilities, best in (((0.5, 0.7, 0.9), 2), ((0.5, 0.7, 0.6), 1), ((0.5, 0.4, 0.9), 0), ((0.5, 0.5, 0.4), 1)):
        decision = GateDecision((0, 1, 2), MADDS, EVERY_ODDS_IS_ITS_LOGIT, 9.0)
        assert decision.widths(log_odds(*probabilities)).tolist() == [0]
        assert decision.best_of(decision.utility(log_odds(*probabilities))).tolist() == [best]


def test_the_best_is_never_below_the_wish_and_a_choice():
    decision = GateDecision((0, 2), MADDS, GateCalibration(((1.0, 0.0),) * 3, (0.0, 9.0, 3.0)), 0.1)
    assert decision.best_of(decision.utility(np.array([[0.0, 0.0], [-9.0, 0.0]], np.float32))).tolist() == [2, 2]
    blind = GateDecision((0, 1, 2), MADDS)
    assert blind.best_of(blind.utility(np.array([[1.0, 0.0, 2.0]], np.float32))).tolist() == [2]


def test_only_the_choices_can_be_wished_and_cost_is_relative_to_the_widest_slice():
    calibration = GateCalibration(((0.0, 0.0),) * 4, (5.0, 1.0, 9.0, 2.0))
    decision = GateDecision((1, 3), (10, 20, 30, 40), calibration, 0.5)
    gate_logits = np.zeros((1, 2), np.float32)
    assert calibration.probabilities(gate_logits).argmax() == 2
    assert decision.widths(gate_logits).tolist() == [1]
    gap = decision.utility(gate_logits)[0] - calibration.probabilities(gate_logits)[0, [1, 3]]
    np.testing.assert_allclose(gap, [-0.25, -0.5], atol=1e-6)


def test_ties_of_utility_go_to_the_narrower():
    decision = GateDecision((0, 1, 2), MADDS, EVERY_ODDS_IS_ITS_LOGIT)
    assert decision.widths(np.array([[1, 1, 1], [0, 4, 4]], np.float32)).tolist() == [0, 1]


def test_every_slice_has_its_own_weights_and_bias():
    calibration = GateCalibration(((1.0, -1.0), (0.5, 2.0), (0.0, 0.0)), (0.0, 1.0, -2.0))
    p = calibration.probabilities(np.array([[1.0, 2.0]], np.float32))
    np.testing.assert_allclose(p, [[1 / (1 + np.exp(1)), 1 / (1 + np.exp(-5.5)), 1 / (1 + np.exp(2))]], rtol=1e-6)
    assert p.dtype == np.float32


@pytest.mark.parametrize(
    ("weight", "bias"), [(((1.0,), (1.0,)), (0.0,)), (((1.0,), (1.0, 2.0)), (0.0, 0.0)), ((), ())], ids=str
)
def test_a_calibration_that_is_no_matrix_with_a_bias_per_row(weight, bias):
    with pytest.raises(ValueError, match=f"calibration has {len(weight)} rows of lengths .* and {len(bias)} biases"):
        GateCalibration(weight, bias)


def test_shares_are_of_the_choices():
    assert shares(np.array([0, 3, 3, 0, 3]), (0, 1, 3)) == (0.4, 0.0, 0.6)


COORDINATES = st.floats(-10, 10, width=32)
ROWS = arrays(np.float32, st.tuples(st.integers(1, 6), st.just(3)), elements=COORDINATES)


@st.composite
def calibrations(draw):
    numbers = st.tuples(COORDINATES, COORDINATES, COORDINATES)
    return GateCalibration(draw(st.tuples(*[numbers] * 4)), draw(st.tuples(*[COORDINATES] * 4)))


@st.composite
def decisions(draw):
    """Over a ladder of 4, with 3 choices; lambda is a multiple of 0.01, so that rounding decides nothing."""
    choices = draw(st.sampled_from([(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)]))
    madds = tuple(sorted(draw(st.sets(st.integers(1, 100), min_size=4, max_size=4))))
    return GateDecision(choices, madds, draw(calibrations()), draw(st.integers(0, 200)) / 100)


@given(decisions(), ROWS, st.integers(1, 200))
def test_raising_lambda_never_widens_an_image_and_so_never_raises_the_mean_cost(decision, gate_logits, more):
    before = decision.widths(gate_logits)
    after = replace(decision, lambda_=decision.lambda_ + more / 100).widths(gate_logits)
    assert (after <= before).all()
    assert np.asarray(decision.madds)[after].mean() <= np.asarray(decision.madds)[before].mean()


@given(decisions(), ROWS)
def test_the_wish_is_a_choice_and_no_choice_is_worth_more(decision, gate_logits):
    widths, utility = decision.widths(gate_logits), decision.utility(gate_logits)
    for width, values in zip(widths, utility, strict=True):
        chosen = decision.choices.index(width)
        assert values[chosen] == values.max()
        assert (values[:chosen] < values.max()).all()


@given(calibrations(), arrays(np.float32, (5, 3), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_probabilities_are_finite_and_within_0_and_1_for_huge_logits(calibration, gate_logits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = calibration.probabilities(gate_logits)
    assert p.shape == (5, 4)
    assert np.isfinite(p).all()
    assert (p >= 0).all()
    assert (p <= 1).all()


@given(st.integers(0, 200), ROWS)
def test_without_a_calibration_lambda_means_nothing(hundredths, gate_logits):
    decision = GateDecision((0, 1, 3), (1, 2, 3, 4), None, hundredths / 100)
    assert decision.widths(gate_logits).tolist() == [(0, 1, 3)[k] for k in gate_logits.argmax(1)]
