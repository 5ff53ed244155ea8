"""What the gate's logits are worth: calibrated probabilities of being right, and operating points.

Ours. The published code chooses a budget by choosing which slices to route among; here one trained
gate gives a curve of budgets, each point with its own trade of probability against cost.

Shapes: N images, L ladder length, G gate choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from models.checkpoint import OperatingPoint
from models.decision import F32, GateCalibration, GateDecision
from models.training.evaluate import Evaluation
from models.training.recipes import OperatingRecipe

BINS = 15
FOLDS = 5
_RIDGE = 1e-3


def fit_calibration(gate_logits_NG: F32, correct_NL: NDArray[np.bool_]) -> GateCalibration:
    """Logistic regression of every slice's correctness on all gate logits (Platt 1999, several inputs).

    The logits are standardised for the fit and a small ridge keeps separable toy data finite.
    """
    x = torch.from_numpy(gate_logits_NG).double()
    mean_G, scale_G = x.mean(0), x.std(0).clamp_min(1e-6)
    x_NG = (x - mean_G) / scale_G
    y_NL = torch.from_numpy(correct_NL).double()
    weight_LG = torch.zeros(y_NL.shape[1], x.shape[1], dtype=torch.float64, requires_grad=True)
    bias_L = torch.zeros(y_NL.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight_LG, bias_L], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        log_odds_NL = F.linear(x_NG, weight_LG, bias_L)
        total = F.binary_cross_entropy_with_logits(log_odds_NL, y_NL) + _RIDGE * weight_LG.square().mean()
        total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return total

    solver.step(loss)  # type: ignore[no-untyped-call]
    weight, bias = (weight_LG / scale_G).detach(), bias_L.detach()
    bias = bias - weight @ mean_G
    return GateCalibration(tuple(tuple(row) for row in weight.tolist()), tuple(bias.tolist()))


def calibration_error(probability_N: F32, correct_N: NDArray[np.bool_]) -> float:
    """Expected calibration error over 15 equal bins (Guo et al. 2017, equation 3)."""
    bins_N = np.minimum((probability_N * BINS).astype(np.int64), BINS - 1)
    gaps = np.zeros(BINS)
    np.add.at(gaps, bins_N, probability_N - correct_N)
    return float(np.abs(gaps).sum() / len(correct_N))


def cross_fitted(gate_logits_NG: F32, correct_NL: NDArray[np.bool_]) -> F32:
    """P(right) [N, L] of every image from a calibration that did not see it: image i is in fold i mod 5."""
    fold_N = np.arange(len(correct_NL)) % FOLDS
    p_NL = np.empty(correct_NL.shape, np.float32)
    for fold in range(FOLDS):
        fitted = fit_calibration(gate_logits_NG[fold_N != fold], correct_NL[fold_N != fold])
        p_NL[fold_N == fold] = fitted.probabilities(gate_logits_NG[fold_N == fold])
    return p_NL


def at_cost(evaluation: Evaluation, share: float) -> GateDecision:
    """The decision with the least lambda whose mean MAdds are at most ``share`` of the widest slice's.

    Bisection: the mean cost falls as lambda rises. The narrowest choice's cost bounds what can be had.
    """
    decision = evaluation.decision
    bar = share * decision.madds[-1]
    low, high = 0.0, 1.0

    def with_lambda(lambda_: float) -> GateDecision:
        return GateDecision(decision.choices, decision.madds, decision.calibration, lambda_)

    if evaluation.at(with_lambda(0.0)).gate_mean_madds <= bar:
        return with_lambda(0.0)
    while evaluation.at(with_lambda(high)).gate_mean_madds > bar and high < 1e3:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        if evaluation.at(with_lambda(middle)).gate_mean_madds > bar:
            low = middle
        else:
            high = middle
    return with_lambda(high)


def sweep(evaluation: Evaluation, cost_shares: Sequence[float]) -> tuple[OperatingPoint, ...]:
    """Operating points, costly first: one for each share of the widest slice's MAdds.

    Left out are repeats, and shares that not even the narrowest choice for all images keeps.
    """
    points: list[OperatingPoint] = []
    for share in sorted(cost_shares, reverse=True):
        decision = at_cost(evaluation, share)
        here = evaluation.at(decision)
        is_kept = here.gate_mean_madds <= share * decision.madds[-1]
        if is_kept and (not points or here.gate_mean_madds < points[-1].madds):
            points.append(OperatingPoint(decision.lambda_, here.gate_mean_madds, here.gate_accuracy, here.gate_shares))
    return tuple(points)


def default_point(points: Sequence[OperatingPoint], widest: tuple[float, int], recipe: OperatingRecipe) -> int:
    """Index of the point that ``recipe`` makes the default; ``widest`` is that slice's top-1 and MAdds.

    Where no point is cheap enough all compete; where none is accurate enough the most accurate wins.
    """
    accuracy, madds = widest
    cheap = [index for index, point in enumerate(points) if point.madds <= recipe.default_share * madds]
    allowed = cheap or range(len(points))
    good = [index for index in allowed if points[index].accuracy >= accuracy - recipe.tolerated_drop]
    return good[-1] if good else max(allowed, key=lambda index: points[index].accuracy)
