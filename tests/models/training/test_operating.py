import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoint import OperatingPoint
from models.decision import GateDecision
from models.training.evaluate import Evaluation
from models.training.operating import (
    at_cost,
    calibration_error,
    cross_fitted,
    default_point,
    fit_calibration,
    sweep,
)
from models.training.recipes import OperatingRecipe

MADDS = (10, 20, 40)


def sample(count=4000, seed=0):
    """Gate logits that tell the log-odds of being right, doubled and shifted; wider is likelier right."""
    rng = np.random.default_rng(seed)
    log_odds_NL = rng.normal(1, 1.5, (count, 1)) + np.array([0.0, 0.5, 1.0])
    correct_NL = rng.random((count, 3)) < 1 / (1 + np.exp(-log_odds_NL))
    return (2 * log_odds_NL - 1).astype(np.float32), correct_NL


def evaluation(count=4000, seed=0):
    gate_logits_NG, correct_NL = sample(count, seed)
    logits_NLK = np.stack([correct_NL, ~correct_NL], axis=2).astype(np.float32)
    decision = GateDecision((0, 1, 2), MADDS, fit_calibration(gate_logits_NG, correct_NL))
    inputs = np.zeros((count, 1), np.float32)
    return Evaluation(logits_NLK, inputs, gate_logits_NG, np.zeros(count, np.int64), decision)


def test_calibration_undoes_the_scale_and_the_shift():
    gate_logits_NG, correct_NL = sample()
    uncalibrated = 1 / (1 + np.exp(-gate_logits_NG[:, 0]))
    assert calibration_error(uncalibrated, correct_NL[:, 0]) > 0.08
    p_NL = fit_calibration(gate_logits_NG, correct_NL).probabilities(sample(seed=1)[0])
    for width in range(3):
        assert calibration_error(p_NL[:, width], sample(seed=1)[1][:, width]) < 0.03


def test_cross_fitting_never_shows_a_calibration_its_own_images():
    rng = np.random.default_rng(0)
    noise_NG, correct_N1 = rng.normal(size=(40, 12)).astype(np.float32), rng.random((40, 1)) < 0.5
    held_out = cross_fitted(noise_NG, correct_N1)
    shown = fit_calibration(noise_NG, correct_N1).probabilities(noise_NG)
    likelihood = [np.where(correct_N1, p, 1 - p).mean() for p in (shown, held_out)]
    assert likelihood[0] > likelihood[1] + 0.1


def test_the_calibration_error_is_the_mean_gap():
    assert calibration_error(np.full(10, 0.8, np.float32), np.arange(10) < 8) == pytest.approx(0, abs=1e-6)
    assert calibration_error(np.full(10, 1.0, np.float32), np.arange(10) < 8) == pytest.approx(0.2)


@given(st.floats(0.3, 1.0))
@settings(max_examples=20, deadline=None)
def test_a_cost_share_is_kept_and_nearly_used(share):
    whole = evaluation(1000)
    mean = whole.at(at_cost(whole, share)).gate_mean_madds
    assert mean <= share * MADDS[-1]
    assert mean > share * MADDS[-1] - 1 or whole.at(at_cost(whole, share)).decision.lambda_ == 0


def test_points_fall_in_cost_and_say_what_the_gate_does_there():
    whole = evaluation()
    points = sweep(whole, (0.9, 0.7, 0.5, 0.4, 0.3, 0.2))
    assert all(
        point.madds <= share * MADDS[-1] for point, share in zip(points, (0.9, 0.7, 0.5, 0.4, 0.3), strict=False)
    )
    assert points[-1].madds > MADDS[0]  # 0.2 is less than the narrowest costs
    costs = [point.madds for point in points]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs) >= 4
    for point in points:
        assert sum(point.shares) == pytest.approx(1)
        again = whole.at(GateDecision((0, 1, 2), MADDS, whole.decision.calibration, point.lambda_))
        assert (again.gate_mean_madds, again.gate_accuracy) == (point.madds, point.accuracy)


def points_of(*accuracies):
    """Points that cost 8, 7, ... of the widest slice's 10 multiply-adds."""
    return [OperatingPoint(0.1 * i, 8.0 - i, accuracy, (1.0,)) for i, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("accuracies", "share", "drop", "expected"),
    [
        ((0.90, 0.90, 0.89, 0.88), 1.0, 0.0, 1),  # the cheapest that is as accurate as the widest
        ((0.90, 0.90, 0.89, 0.88), 1.0, 0.01, 2),
        ((0.90, 0.90, 0.89, 0.88), 0.6, 0.0, 2),  # none that is cheap enough is accurate enough: the best of them
        ((0.90, 0.90, 0.89, 0.895), 0.6, 0.0, 3),
        ((0.90, 0.90, 0.89, 0.88), 0.1, 0.0, 1),  # none is cheap enough: all compete
        ((0.80, 0.81, 0.79, 0.78), 1.0, 0.0, 1),  # none is accurate enough: the best
    ],
)
def test_the_default_point(accuracies, share, drop, expected):
    recipe = OperatingRecipe(default_share=share, tolerated_drop=drop)
    assert default_point(points_of(*accuracies), (0.9, 10), recipe) == expected
