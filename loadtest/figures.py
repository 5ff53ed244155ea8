"""PURE: what repeated measurements say: percentiles, and medians with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
LEAST_VALUES = 6
"""The least and the greatest of five values hold the true median between them with a probability of 0.94 only."""
SEED = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median and the interval around it, in the unit of the values it was made from."""

    median: float
    low: float
    high: float


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` (0..100) of the values lie, interpolated. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values: a percentile needs at least 1")
    return float(np.percentile(values, percent))


def median_interval(values: Sequence[float], seed: int = SEED) -> Estimate:
    """The median with its 95 % bootstrap interval (percentile method); the same for the same seed.

    Of fewer than ``LEAST_VALUES`` it is the range from the least to the greatest. Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no values: a median needs at least 1")
    if len(values) < LEAST_VALUES:
        return Estimate(float(np.median(values)), min(values), max(values))
    given = np.asarray(values, np.float64)
    picks = np.random.default_rng(seed).integers(0, len(given), (RESAMPLES, len(given)))
    medians = np.median(given[picks], axis=1)
    low, high = np.percentile(medians, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return Estimate(float(np.median(given)), float(low), float(high))


def pair_ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a / b, pair by pair. Raises ValueError unless both are as long as each other and every b is above 0."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values; pairs need as many of each")
    if any(value <= 0 for value in b):
        raise ValueError("a pair has a denominator of 0 or less")
    return [x / y for x, y in zip(a, b, strict=True)]


def pair_differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a - b, pair by pair. Raises ValueError unless both are as long as each other."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values; pairs need as many of each")
    return [x - y for x, y in zip(a, b, strict=True)]
