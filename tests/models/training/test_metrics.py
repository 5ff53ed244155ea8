import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.decision import GateCalibration, GateDecision
from models.training import metrics
from models.training.metrics import (
    compare_gate,
    gate_curve,
    interpolated_ladder,
    ladder_weights,
    paired_bootstrap,
    random_routing,
    standard_error,
    top_k_accuracy,
    width_shares,
)

MADDS = (10, 20, 40)


def slices(count=500, seed=0):
    """Which of three slices is right, [N, 3], and how likely each was to be; wider is likelier."""
    rng = np.random.default_rng(seed)
    ease_N1 = rng.normal(0, 2, (count, 1))
    p_NL = 1 / (1 + np.exp(-(ease_N1 + np.array([0.0, 1.0, 2.0]))))
    return rng.random((count, 3)) < p_NL, p_NL


def test_top_k_counts_what_is_strictly_ahead_and_lower_classes_among_equals():
    logits = np.array([[3, 2, 1, 0], [3, 2, 1, 0], [1, 1, 1, 1]], np.float32)
    labels = np.array([0, 2, 1])
    assert [top_k_accuracy(logits, labels, k) for k in (1, 2, 3, 4)] == [1 / 3, 2 / 3, 1, 1]
    assert top_k_accuracy(logits, labels, 1) == (logits.argmax(1) == labels).mean()
    with pytest.raises(ValueError, match=r"top-5 of 4 classes; allowed: 1\.\.4"):
        top_k_accuracy(logits, labels, 5)


def test_equal_statistics_differ_by_nothing_in_every_resample():
    right = slices()[0][:, 0]
    found = paired_bootstrap(right, right, 200)
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert standard_error(right, right) == 0


def test_the_interval_is_that_of_resampled_images():
    a, b = slices(200)[0][:, 2], interpolated_ladder(slices(200)[0], MADDS, 17)
    found = paired_bootstrap(a, b, 20_000)
    rng = np.random.default_rng(1)
    means = (a - b)[rng.integers(0, 200, (20_000, 200))].mean(1)
    assert found.value == pytest.approx((a - b).mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.003)
    assert standard_error(a, b) == pytest.approx(means.std(), rel=0.03)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        found = paired_bootstrap(rng.random(300) < 0.8, rng.random(300) < 0.7, 500, seed)
        covered += found.low <= 0.1 <= found.high
    assert 0.90 <= covered / 300 <= 0.985


def test_pairing_narrows_the_interval_of_statistics_that_go_together():
    right_NL, _ = slices(1000)
    paired = paired_bootstrap(right_NL[:, 2], right_NL[:, 1], 1000)
    shuffled = paired_bootstrap(right_NL[:, 2], np.random.default_rng(0).permutation(right_NL[:, 1]), 1000)
    assert paired.value == pytest.approx(shuffled.value)
    assert paired.high - paired.low < 0.95 * (shuffled.high - shuffled.low)


def test_resamples_drawn_in_parts_are_the_same(monkeypatch):
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    whole = paired_bootstrap(a, b, 300, seed=3)
    monkeypatch.setattr(metrics, "_COUNTS_LIMIT", 50 * 7)
    parts = paired_bootstrap(a, b, 300, seed=3)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-12)
    assert paired_bootstrap(a, b, 300, seed=4) != whole


@pytest.mark.parametrize(("a", "b"), [([1, 0], [1]), ([], []), ([[1, 0]], [[1, 0]])])
def test_statistics_that_are_not_paired_are_refused(a, b):
    with pytest.raises(ValueError, match="one number per image each"):
        paired_bootstrap(a, b)


def test_the_ladder_is_exact_at_its_slices_and_linear_between_them():
    right_NL, _ = slices()
    for width, madds in enumerate(MADDS):
        assert (interpolated_ladder(right_NL, MADDS, madds) == right_NL[:, width]).all()
    accuracy = right_NL.mean(0)
    assert interpolated_ladder(right_NL, MADDS, 25).mean() == pytest.approx(0.75 * accuracy[1] + 0.25 * accuracy[2])


@given(st.floats(10, 40))
@settings(max_examples=50, deadline=None)
def test_the_ladder_serves_two_neighbours_at_the_asked_mean_cost(madds):
    weights = ladder_weights(MADDS, madds)
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    assert weights @ MADDS == pytest.approx(madds)
    assert weights[0] == 0 or weights[2] == 0


@pytest.mark.parametrize("madds", [9.9, 40.1])
def test_a_cost_off_the_ladder_is_refused(madds):
    with pytest.raises(ValueError, match=r"the ladder has 10\.\.40"):
        ladder_weights(MADDS, madds)


def test_random_routing_is_what_drawing_widths_gives_on_average():
    right_NL, _ = slices()
    shares = np.array([0.5, 0.2, 0.3])
    expected_N = random_routing(right_NL, shares)
    assert expected_N.mean() == pytest.approx(right_NL.mean(0) @ shares)
    rng = np.random.default_rng(0)
    drawn = [right_NL[np.arange(500), rng.choice(3, 500, p=shares)] for _ in range(2000)]
    assert np.abs(np.mean(drawn, 0) - expected_N).max() < 0.05


@pytest.mark.parametrize("width", range(3))
def test_a_gate_that_does_not_choose_is_its_slice(width):
    right_NL, _ = slices()
    found = compare_gate(right_NL, np.full(500, width), MADDS, 200)
    assert found.accuracy.value == pytest.approx(right_NL[:, width].mean())
    assert found.madds_share.value == found.madds_share.low == MADDS[width] / 40
    for contrast in (found.to_ladder, found.to_random):
        assert contrast.difference.value == contrast.difference.low == contrast.difference.high == 0


def test_a_gate_that_knows_beats_random_routing_and_the_ladder_and_one_that_draws_does_not():
    right_NL, _ = slices(2000)
    knowing = np.where(right_NL[:, 0], 0, 2)
    found = compare_gate(right_NL, knowing, MADDS, 1000)
    assert found.count == 2000
    assert found.to_random.difference.low > 0.02
    assert found.to_ladder.difference.low > 0.02
    shares = width_shares(knowing, 3)
    assert found.to_random.reference == pytest.approx(right_NL.mean(0) @ shares)
    assert found.madds_share.value == pytest.approx(shares @ MADDS / 40)
    drawing = compare_gate(right_NL, np.random.default_rng(0).permutation(knowing), MADDS, 1000)
    assert drawing.to_random.difference.low < 0 < drawing.to_random.difference.high


def test_the_curve_goes_from_the_cheapest_choice_to_lambda_zero_through_the_points_of_the_rule():
    right_NL, p_NL = slices()
    madds, accuracy = gate_curve(p_NL, right_NL, MADDS, 40)
    assert (np.diff(madds) > 0).all()
    assert madds[0] == 10
    assert accuracy[0] == right_NL[:, 0].mean()
    assert (madds[-1], accuracy[-1]) == (40, right_NL[:, 2].mean())  # the widest is the likeliest for all
    log_odds_NL = np.log(p_NL / (1 - p_NL)).astype(np.float32)
    decision = GateDecision((0, 1, 2), MADDS, GateCalibration(tuple(map(tuple, np.eye(3))), (0.0,) * 3), 0.3)
    widths_N = decision.widths(log_odds_NL)
    at = np.asarray(MADDS)[widths_N].mean()
    assert np.interp(at, madds, accuracy) == pytest.approx(right_NL[np.arange(500), widths_N].mean(), abs=0.01)


def test_a_gate_that_thinks_all_slices_alike_has_one_point():
    right_NL, _ = slices()
    madds, accuracy = gate_curve(np.full((500, 3), 0.5), right_NL, MADDS, 40)
    assert (madds.tolist(), accuracy.tolist()) == ([10], [right_NL[:, 0].mean()])
