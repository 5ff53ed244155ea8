"""From the gate's logits to a width, and to how likely each width is to be right. Pure numpy.

Source: argmax of the slimming logits is DS-Net's rule in evaluation (arXiv 2103.13258, section 3.3).
Ours: the logits, calibrated on a hold-out, give for every slice the probability that its answer is
right; the wish is then the choice with the greatest ``probability - lambda * relative cost``.

Shapes: N images, G gate choices, L ladder length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

F32 = NDArray[np.float32]


ROUNDING = 1e-6
"""Of sums of probabilities in float32."""


@dataclass(frozen=True, slots=True)
class GateCalibration:
    """Log-odds that each slice is right: ``weight @ gate_logits + bias``.

    weight  one row per ladder index, one column per gate choice. bias: one entry per ladder index.

    Raises ValueError when they differ in length.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    weight: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.weight) != len(self.bias) or len({len(row) for row in self.weight}) != 1:
            raise ValueError(
                f"calibration has {len(self.weight)} rows of lengths {sorted({len(row) for row in self.weight})} and "
                f"{len(self.bias)} biases; it needs one row and one bias per slice, all rows of one length"
            )

    def probabilities(self, gate_logits_NG: F32) -> F32:
        """P(right) [N, L] of every slice."""
        return _probabilities(gate_logits_NG, np.asarray(self.weight, np.float32), np.asarray(self.bias, np.float32))


def _probabilities(gate_logits_NG: F32, weight_LG: F32, bias_L: F32) -> F32:
    """Of as many slices as there are rows of weights."""
    # Not a matrix product: BLAS rounds by batch size, and a tie would then depend on an image's batch-mates.
    log_odds_NL = np.add.reduce(gate_logits_NG[:, None, :] * weight_LG, axis=2) + bias_L
    p_NL: F32 = 0.5 * (1.0 + np.tanh(0.5 * log_odds_NL))  # never overflows
    return p_NL


@dataclass(frozen=True, slots=True)
class GateDecision:
    """The gate's rule at one operating point.

    choices      ladder indices, ascending, one per gate logit.
    madds        served MAdds of every slice, in ladder order.
    calibration  None: the greatest logit wins, and lambda_ means nothing.
    lambda_      probability of being right that the widest slice's whole cost must be worth.
    """

    choices: tuple[int, ...]
    madds: tuple[int, ...]
    calibration: GateCalibration | None = None
    lambda_: float = 0.0
    _choices_G: NDArray[np.int64] = field(init=False, repr=False, compare=False)
    _penalty_G: F32 = field(init=False, repr=False, compare=False)
    _weight_GG: F32 = field(init=False, repr=False, compare=False)
    _bias_G: F32 = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        choices_G = np.asarray(self.choices)
        relative_G = np.asarray(self.madds)[choices_G] / self.madds[-1]
        penalty_G = (self.lambda_ * relative_G).astype(np.float32)
        arrays: dict[str, NDArray[Any]] = {"choices_G": choices_G, "penalty_G": penalty_G}
        if self.calibration is not None:
            arrays["weight_GG"] = np.asarray(self.calibration.weight, np.float32)[choices_G]
            arrays["bias_G"] = np.asarray(self.calibration.bias, np.float32)[choices_G]
        for name, array in arrays.items():  # once: on every batch they would take longer than what is done with them
            object.__setattr__(self, f"_{name}", array)

    def utility(self, gate_logits_NG: F32) -> F32:
        """[N, G]; the greatest is the gate's wish."""
        if self.calibration is None:
            return gate_logits_NG
        utility_NG: F32 = _probabilities(gate_logits_NG, self._weight_GG, self._bias_G) - self._penalty_G
        return utility_NG

    def worth_of(self, utility_NG: F32) -> F32:
        """[N, G] in units of probability: of being right at a choice, less what the operating point asks for its cost.

        utility_NG  from ``utility``. Without a calibration, where these are the gate's logits (ours): the probability
                    that a choice is wide enough, taking the softmax for the probability that it is the narrowest
                    one that is.
        """
        if self.calibration is not None:
            return utility_NG
        weight_NG = np.exp(utility_NG - utility_NG.max(1, keepdims=True))
        enough_NG: F32 = (weight_NG.cumsum(1) / weight_NG.sum(1, keepdims=True)).astype(np.float32)
        return enough_NG

    def widths(self, gate_logits_NG: F32) -> NDArray[np.int64]:
        """Ladder index [N] that the gate wishes for each image; ties go to the narrower."""
        return self.widths_of(self.utility(gate_logits_NG))

    def widths_of(self, utility_NG: F32) -> NDArray[np.int64]:
        """The same from what ``utility`` gave."""
        widths_N: NDArray[np.int64] = self._choices_G[utility_NG.argmax(1)]
        return widths_N

    def best_of(self, utility_NG: F32) -> NDArray[np.int64]:
        """The widest ladder index [N] among the choices up to which P(right) does not fall from the wish on.

        Wider than the wish where an image would gain and the operating point asks too much for it. Without a
        calibration nothing is known beyond the wish.
        """
        if self.calibration is None:
            return self.widths_of(utility_NG)
        p_NG = utility_NG + self._penalty_G
        stops_NG = np.ones(p_NG.shape, bool)
        stops_NG[:, :-1] = ~(p_NG[:, 1:] - p_NG[:, :-1] >= -ROUNDING)
        stops_NG &= np.arange(len(self.choices)) >= utility_NG.argmax(1)[:, None]
        best_N: NDArray[np.int64] = self._choices_G[stops_NG.argmax(1)]
        return best_N


def shares(widths: NDArray[np.int64], choices: Sequence[int]) -> tuple[float, ...]:
    """Share of the images at each choice."""
    return tuple(float((widths == choice).mean()) for choice in choices)
