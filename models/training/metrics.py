"""What a gate is compared with, and how sure the comparison is. Pure numpy.

The gate at a mean cost is held against three alternatives that need no gate:

* the widest slice for every image;
* the *static ladder* at the same mean cost. Between neighbouring slices k and k+1 its accuracy is
  interpolated linearly in served MAdds. With weight w that is, exactly, serving each image at k+1 with
  probability w and at k otherwise, so every image has an expected correctness (1 - w) c_k + w c_{k+1};
* *random routing*: each image at a slice drawn by the gate's own shares, whatever is in the image.

All are known image by image, so differences are paired. Intervals are percentile intervals of the
bootstrap over images (Efron 1979; Efron and Tibshirani 1993, sections 6 and 13). Ours: a resampled mean
depends only on how often every distinct difference is drawn, which is multinomial, so those counts are
drawn and not the images; the distribution is the same.

Shapes: N images, L ladder length, K classes, G gate choices, P points of a curve.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CURVE_STEP = 0.01  # of the widest slice's MAdds: points that lie closer show noise and nothing else
_COUNTS_LIMIT = 2**22  # multinomial counts in memory at once: 32 MiB


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the bounds of its 95 % interval, in the value's own unit."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Contrast:
    """Accuracy against one alternative on the same images.

    reference       the alternative's accuracy, 0..1. difference: ours minus the reference.
    standard_error  of the difference.
    """

    reference: float
    difference: Interval
    standard_error: float


@dataclass(frozen=True, slots=True)
class GateComparison:
    """The gate at one operating point against what needs no gate, on ``count`` images.

    accuracy     top-1 at the gate's widths. madds_share: mean served MAdds over the widest slice's.
    to_widest, to_ladder, to_random  as at the top of the file.
    """

    count: int
    accuracy: Interval
    madds_share: Interval
    to_widest: Contrast
    to_ladder: Contrast
    to_random: Contrast


def top_k_right(logits_NK: NDArray[np.float32], labels_N: Ints, k: int) -> Bools:
    """Whether the label is among the ``k`` greatest logits, [N]; among equals the lower class goes first.

    Raises ValueError unless 1 <= k <= K.
    """
    classes = logits_NK.shape[1]
    if not 1 <= k <= classes:
        raise ValueError(f"top-{k} of {classes} classes; allowed: 1..{classes}")
    own_N1 = np.take_along_axis(logits_NK, labels_N[:, None], axis=1)
    earlier_NK = np.arange(classes) < labels_N[:, None]
    ahead_N = ((logits_NK > own_N1) | ((logits_NK == own_N1) & earlier_NK)).sum(1)
    right_N: Bools = ahead_N < k
    return right_N


def top_k_accuracy(logits_NK: NDArray[np.float32], labels_N: Ints, k: int) -> float:
    """Share of the images whose label is among the ``k`` greatest logits; ValueError as ``top_k_right``."""
    return float(top_k_right(logits_NK, labels_N, k).mean())


def paired_bootstrap(
    statistic_per_image_a: ArrayLike, statistic_per_image_b: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of ``a - b`` over the images, with its 95 % percentile interval from resampled images.

    a, b  one number per image, [N]: whether it is right, or how likely; any unit, the same for both.
    Raises ValueError when they are not of one shape [N] with N >= 1.
    """
    difference_N = _paired(statistic_per_image_a, statistic_per_image_b)
    values, counts = np.unique(difference_N, return_counts=True)
    means = np.concatenate(list(_resampled_means(values, counts, resamples, seed)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(difference_N.mean()), float(low), float(high))


def _resampled_means(values: F64, counts: Ints, resamples: int, seed: int) -> Iterator[F64]:
    """Means of resamples of a sample that holds ``values`` so many times each, in parts that fit in memory."""
    generator, size = np.random.default_rng(seed), int(counts.sum())
    step = max(1, _COUNTS_LIMIT // len(values))
    for start in range(0, resamples, step):
        drawn = generator.multinomial(size, counts / size, min(step, resamples - start))
        yield drawn @ values / size


def standard_error(statistic_per_image_a: ArrayLike, statistic_per_image_b: ArrayLike) -> float:
    """Standard error of the mean of ``a - b`` over the images; ValueError as ``paired_bootstrap``, or for N = 1."""
    difference_N = _paired(statistic_per_image_a, statistic_per_image_b)
    if len(difference_N) < 2:
        raise ValueError("a standard error needs at least 2 images, given 1")
    return float(difference_N.std(ddof=1) / np.sqrt(len(difference_N)))


def _paired(a: ArrayLike, b: ArrayLike) -> F64:
    a_N, b_N = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a_N.shape != b_N.shape or a_N.ndim != 1 or not len(a_N):
        raise ValueError(f"paired statistics need one number per image each, given shapes {a_N.shape} and {b_N.shape}")
    return a_N - b_N


def ladder_weights(madds_L: ArrayLike, mean_madds: float) -> F64:
    """Shares [L] of the one slice, or the two neighbouring slices, whose mean served MAdds are ``mean_madds``.

    madds_L ascends. Raises ValueError when ``mean_madds`` is outside of the ladder.
    """
    costs_L = np.asarray(madds_L, np.float64)
    slack = 1e-9 * costs_L[-1]  # a mean of equal costs may miss them by rounding
    if not costs_L[0] - slack <= mean_madds <= costs_L[-1] + slack:
        raise ValueError(f"mean of {mean_madds:,.0f} MAdds; the ladder has {costs_L[0]:,.0f}..{costs_L[-1]:,.0f}")
    units_LL = np.eye(len(costs_L))
    return np.array([np.interp(mean_madds, costs_L, unit_L) for unit_L in units_LL])


def interpolated_ladder(correct_NL: Bools, madds_L: ArrayLike, mean_madds: float) -> F64:
    """Expected correctness [N] of every image on the static ladder at a mean cost; see the top of the file.

    Raises ValueError when ``mean_madds`` is outside of the ladder.
    """
    return random_routing(correct_NL, ladder_weights(madds_L, mean_madds))


def width_shares(widths_N: Ints, length: int) -> F64:
    """Share [L] of the images at every slice of a ladder of ``length``."""
    shares_L: F64 = np.bincount(widths_N, minlength=length) / len(widths_N)
    return shares_L


def random_routing(correct_NL: Bools, shares_L: ArrayLike) -> F64:
    """Expected correctness [N] of every image at a slice drawn by ``shares_L``: sum over k of share_k c_nk."""
    expected_N: F64 = correct_NL.astype(np.float64) @ np.asarray(shares_L, np.float64)
    return expected_N


def compare_gate(
    correct_NL: Bools, widths_N: Ints, madds_L: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> GateComparison:
    """Hold the gate's choice of ``widths_N`` against the alternatives on the same images.

    correct_NL  whether every slice is right. madds_L: served, ascending. The gate's mean cost and shares are
    those of all images and stay fixed in the resamples: the alternatives have the budget that was measured.
    Raises ValueError for fewer than 2 images.
    """
    costs_L = np.asarray(madds_L, np.float64)
    gate_N = correct_NL[np.arange(len(widths_N)), widths_N]
    relative_N = costs_L[widths_N] / costs_L[-1]
    nothing_N = np.zeros(len(widths_N))

    def against(reference_N: Bools | F64) -> Contrast:
        difference = paired_bootstrap(gate_N, reference_N, resamples, seed)
        return Contrast(float(reference_N.mean()), difference, standard_error(gate_N, reference_N))

    return GateComparison(
        count=len(widths_N),
        accuracy=paired_bootstrap(gate_N, nothing_N, resamples, seed),
        madds_share=paired_bootstrap(relative_N, nothing_N, resamples, seed),
        to_widest=against(correct_NL[:, -1]),
        to_ladder=against(interpolated_ladder(correct_NL, costs_L, float(costs_L[widths_N].mean()))),
        to_random=against(random_routing(correct_NL, width_shares(widths_N, len(costs_L)))),
    )


def gate_curve(p_right_NG: F64, correct_NG: Bools, madds_G: ArrayLike, widest_madds: float) -> tuple[F64, F64]:
    """(mean served MAdds [P], top-1 [P]) of the gate as lambda sweeps from 0 to where all take the cheapest.

    p_right_NG  probability that every choice is right, in the order of ``madds_G``, ascending. The rule is
    that of ``models.decision``: the greatest ``p - lambda * madds / widest_madds``, the narrower among equals.
    Lambdas are quantiles of those at which an image changes its choice, so points lie where the gate acts; points
    closer than 1 % of the widest slice are thinned out.
    """
    costs_G = np.asarray(madds_G, np.float64)
    relative_G = costs_G / widest_madds
    low, high = np.triu_indices(len(costs_G), 1)
    turns = (p_right_NG[:, high] - p_right_NG[:, low]) / (relative_G[high] - relative_G[low])
    turns = turns[turns > 0]
    steps = np.quantile(turns, np.linspace(0, 1, 101)) if len(turns) else np.zeros(1)
    lambdas = [0.0, *steps, 2 * steps[-1]]  # past the last turn, where rounding decides nothing
    rows = np.arange(len(p_right_NG))
    points: dict[float, float] = {}
    for lambda_ in lambdas:
        chosen_N = (p_right_NG - lambda_ * relative_G).argmax(1)
        points[float(costs_G[chosen_N].mean())] = float(correct_NG[rows, chosen_N].mean())
    ends, step = (min(points), max(points)), _CURVE_STEP * widest_madds
    madds = [ends[0]]
    for cost in sorted(points):
        if cost >= madds[-1] + step and cost <= ends[1] - step:
            madds.append(cost)
    if ends[1] > ends[0]:
        madds.append(ends[1])
    return np.array(madds), np.array([points[cost] for cost in madds])
