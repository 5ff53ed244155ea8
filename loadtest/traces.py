"""PURE: instants at which requests are due, drawn from a seed, and how fast and how bursty they are.

Arrivals are ``float64`` arrays [N] of seconds from 0, ascending, below the duration, on a grid of 1 us. Rates are
in requests/s. CV2 is the squared coefficient of variation of the gaps, variance / mean^2: 0 for equal gaps, 1 for
a Poisson stream, above 1 for bursts. The constant base under a gamma stream of stated CV2, and the ramp of stated
acceleration, follow the traces of SuperServe (NSDI 2025), section 6; single steps are ours.

Every function raises ValueError, with what was given and what is allowed, for an argument out of range.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Arrivals = npt.NDArray[np.float64]

LIMIT_ARRIVALS = 10_000_000
"""Most requests of a trace, as expected from its rates: above it the argument is a slip, and memory the victim."""
LIMIT_CV2 = 1000.0
_DECIMALS = 6
_LEAST_DRAWS = 64


def poisson(rate_per_s: float, duration_s: float, rng: np.random.Generator) -> Arrivals:
    """Independent arrivals at a constant rate."""
    return modulated([(0.0, rate_per_s)], duration_s, rng)


def constant(rate_per_s: float, duration_s: float) -> Arrivals:
    """Arrivals at equal gaps of 1/rate, the first at 0."""
    _above_zero("rate", rate_per_s, "requests/s")
    _check_size(rate_per_s * _checked_duration(duration_s))
    return _trimmed(np.arange(math.ceil(rate_per_s * duration_s) + 1) / rate_per_s, duration_s)


def bursty(
    rate_per_s: float, base_rate_per_s: float, cv2: float, duration_s: float, rng: np.random.Generator
) -> Arrivals:
    """A stream of equal gaps at the base rate, and a gamma renewal stream of that CV2 for the rest of the rate.

    rate_per_s       mean rate of both together, above the base rate.
    base_rate_per_s  0 for the gamma stream alone.
    """
    if not 0 <= base_rate_per_s < rate_per_s:
        raise ValueError(
            f"base rate is {base_rate_per_s:g} requests/s; allowed: 0 or more and below the mean rate of "
            f"{rate_per_s:g} requests/s"
        )
    burst = modulated([(0.0, rate_per_s - base_rate_per_s)], duration_s, rng, cv2)
    base = constant(base_rate_per_s, duration_s) if base_rate_per_s else np.empty(0)
    return np.sort(np.concatenate([base, burst]))


def accelerating(
    from_rate_per_s: float,
    to_rate_per_s: float,
    tau_per_s2: float,
    duration_s: float,
    rng: np.random.Generator,
    cv2: float = 1.0,
) -> Arrivals:
    """The rate goes from one to the other by ``tau_per_s2`` requests/s each second, then stays.

    cv2  of the gaps, measured in mean gaps of the moment; 1 for a Poisson stream.
    """
    _above_zero("tau", tau_per_s2, "requests/s^2")
    ramp_s = abs(to_rate_per_s - from_rate_per_s) / tau_per_s2
    return modulated([(0.0, from_rate_per_s), (ramp_s, to_rate_per_s)], duration_s, rng, cv2)


def step(
    rate_per_s: float, step_rate_per_s: float, span_s: tuple[float, float], duration_s: float, rng: np.random.Generator
) -> Arrivals:
    """Poisson arrivals at one rate, at the other within ``span_s`` = [from, to), and at the first again."""
    from_s, to_s = span_s
    if not 0 <= from_s < to_s <= duration_s:
        raise ValueError(
            f"the step is from {from_s:g} s to {to_s:g} s; allowed: 0 <= from < to <= the duration of {duration_s:g} s"
        )
    knots = [(0.0, rate_per_s), (from_s, rate_per_s), (from_s, step_rate_per_s), (to_s, step_rate_per_s)]
    return modulated([*knots, (to_s, rate_per_s)], duration_s, rng)


def modulated(
    knots: list[tuple[float, float]], duration_s: float, rng: np.random.Generator, cv2: float = 1.0
) -> Arrivals:
    """Gamma renewal arrivals whose rate is linear between the knots and constant after the last.

    knots  (instant in s, rate in requests/s); the first at 0, instants ascending. Two at one instant are a jump.
    cv2    of the gaps, measured in mean gaps of the moment.
    """
    if not 0 < cv2 <= LIMIT_CV2:
        raise ValueError(f"CV2 is {cv2:g}; allowed: above 0, up to {LIMIT_CV2:g}")
    times_s, rates = (np.asarray(values, np.float64) for values in zip(*knots, strict=True))
    if not (np.isfinite(rates).all() and (rates >= 0).all() and rates.any()):
        given = ", ".join(f"{rate:g}" for rate in rates)
        raise ValueError(f"rates are {given} requests/s; allowed: 0 or more, and one above 0")
    times_s, rates = _until(_checked_duration(duration_s), times_s, rates)
    gaps_s = np.diff(times_s)
    counts = np.concatenate([[0.0], np.cumsum(gaps_s * (rates[:-1] + rates[1:]) / 2)])  # expected until each knot
    _check_size(float(counts[-1]))
    due = _unit_renewal(float(counts[-1]), cv2, rng)
    piece = np.clip(np.searchsorted(counts, due, side="right") - 1, 0, len(gaps_s) - 1)
    slopes = np.divide(np.diff(rates), gaps_s, out=np.zeros_like(gaps_s), where=gaps_s > 0)
    beyond, rate, slope = due - counts[piece], rates[piece], slopes[piece]
    # The root of rate t + slope t^2 / 2 = beyond, in the form that loses no digits where the slope is small.
    root = np.sqrt(np.maximum(rate**2 + 2 * slope * beyond, 0.0))
    since_s = np.divide(2 * beyond, rate + root, out=np.zeros_like(beyond), where=rate + root > 0)
    return _trimmed(times_s[piece] + since_s, duration_s)


def _until(end_s: float, times_s: Arrivals, rates: Arrivals) -> tuple[Arrivals, Arrivals]:
    """The knots up to the end, and one there."""
    kept = times_s <= end_s
    end_rate = np.interp(end_s, times_s, rates)
    if times_s[kept][-1] == end_s:  # and a jump there stays one
        return times_s[kept], rates[kept]
    return np.append(times_s[kept], end_s), np.append(rates[kept], end_rate)


def _unit_renewal(horizon: float, cv2: float, rng: np.random.Generator) -> Arrivals:
    """Arrivals in [0, horizon) with gamma gaps of mean 1 and that CV2, as if the stream had always run.

    The first is due after the rest of a gap that 0 fell into: a gap found so is drawn in proportion to its
    length, which for a gamma law is the law of one more shape, and 0 lies anywhere in it.
    """
    shape = 1 / cv2
    last = float(rng.gamma(shape + 1, cv2) * rng.uniform())
    parts = [np.array([last])]
    while last < horizon:
        draws = min(_LEAST_DRAWS + math.ceil(horizon - last), LIMIT_ARRIVALS)
        part = last + np.cumsum(rng.gamma(shape, cv2, draws))
        parts.append(part)
        last = float(part[-1])
    arrivals = np.concatenate(parts)
    return arrivals[arrivals < horizon]


def mean_rate(arrivals: Arrivals, duration_s: float) -> float:
    """Requests/s over the whole duration."""
    return len(arrivals) / _checked_duration(duration_s)


def peak_rate(arrivals: Arrivals, window_s: float) -> float:
    """The highest rate, in requests/s, over any half-open window of ``window_s`` seconds; 0 without arrivals."""
    _above_zero("window", window_s, "s")
    # A busiest window may be moved right until it begins with an arrival, so those are all that need a look.
    ends = np.searchsorted(arrivals, arrivals + window_s, side="left")
    return float((ends - np.arange(len(arrivals))).max(initial=0)) / window_s


def measured_cv2(arrivals: Arrivals) -> float | None:
    """CV2 of the gaps; None with fewer than 3 arrivals, or when all come at once."""
    gaps_s = np.diff(arrivals)
    if len(gaps_s) < 2 or not gaps_s.any():
        return None
    return float(gaps_s.var() / gaps_s.mean() ** 2)


def _trimmed(times_s: Arrivals, duration_s: float) -> Arrivals:
    times_s = np.round(times_s, _DECIMALS)
    return times_s[times_s < duration_s]


def _checked_duration(duration_s: float) -> float:
    return _above_zero("duration", duration_s, "s")


def _above_zero(name: str, value: float, unit: str) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value:g} {unit}; allowed: above 0 {unit}, and finite")
    return value


def _check_size(expected: float) -> None:
    if not expected <= LIMIT_ARRIVALS:
        raise ValueError(f"the trace would hold about {expected:,.0f} requests; allowed: up to {LIMIT_ARRIVALS:,}")
