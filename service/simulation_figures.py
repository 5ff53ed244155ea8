"""What replays amount to: figures of each, and policies beside each other. PURE.

Shapes: M images answered in time, I images that the traces name, L ladder length, T traces, P policies, D draws.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.request import SliceFacts
from service.simulate import Arrival, Outcome, Served

F64 = NDArray[np.float64]

DRAWS = 2000
_DRAWS_AT_ONCE = 50
"""Bounds memory: so many weights of every image are held at a time."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of slices and images; arrays are indexed by image and width, None where nothing was evaluated."""

    slices: Sequence[SliceFacts]
    correct_IL: NDArray[np.bool_] | None = None
    p_right_IL: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """One trace under one policy.

    served      what became of each of ``arrivals``.
    infeasible  images of the trace beside them whose budgets no slice satisfies.
    wall_s      what the replay took.
    """

    trace: str
    policy: str
    arrivals: Sequence[Arrival]
    served: Sequence[Served]
    infeasible: int = 0
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one trace under one policy. None where there is nothing to average.

    images        met, late, expired and refused ones; infeasible ones are not among them.
    attainment    share of them that was met.
    top1          share of the answers in time that is right; p_right: what the calibrated gate expects of it.
    mean_madds    MAdds really spent on an answer in time; width_shares: of these answers, in ladder order.
    p50_ms        from arrival to answer, of answers in time.
    wall_us       that the simulator takes for an image.
    """

    trace: str
    policy: str
    images: int
    infeasible: int
    met: int
    late: int
    expired: int
    refused: int
    attainment: float
    top1: float | None
    p_right: float | None
    mean_madds: float | None
    width_shares: tuple[float, ...] | None
    p50_ms: float | None
    p99_ms: float | None
    wall_us: float


@dataclass(frozen=True, slots=True)
class Means:
    """Of one policy, over traces that all weigh the same."""

    policy: str
    traces: int
    attainment: float
    top1: float | None
    p_right: float | None
    mean_madds: float | None
    p50_ms: float | None
    p99_ms: float | None
    wall_us: float


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """``policy`` less ``against``, on the same traces and images; None where it cannot be told."""

    policy: str
    against: str
    attainment: Interval
    top1: Interval | None


@dataclass(frozen=True, slots=True)
class Dominated:
    """On this trace each policy of ``by`` attains as much and answers as well, and does better in one of them."""

    trace: str
    policy: str
    by: tuple[str, ...]


def figures(replay: Replay, known: Known) -> Figures:
    """Of a replay of at least one image."""
    counts = Counter(end.outcome for end in replay.served)
    met = [(arrival, end) for arrival, end in zip(replay.arrivals, replay.served, strict=True) if _is_met(end)]
    image_M = np.array([arrival.image for arrival, _ in met], np.int64)
    width_M = np.array([end.width for _, end in met], np.int64)
    madds_M = [_spent(known.slices, end) for _, end in met]
    latency_M_ms = np.array([_finish_s(end) - arrival.at_s for arrival, end in met]) * 1e3
    shares_L = np.bincount(width_M, minlength=len(known.slices)) / max(len(met), 1)
    return Figures(
        trace=replay.trace,
        policy=replay.policy,
        images=len(replay.served),
        infeasible=replay.infeasible,
        met=counts[Outcome.MET],
        late=counts[Outcome.LATE],
        expired=counts[Outcome.EXPIRED],
        refused=counts[Outcome.REFUSED],
        attainment=len(met) / len(replay.served),
        top1=_mean_at(known.correct_IL, image_M, width_M),
        p_right=_mean_at(known.p_right_IL, image_M, width_M),
        mean_madds=float(np.mean(madds_M)) if met else None,
        width_shares=tuple(shares_L.tolist()) if met else None,
        p50_ms=float(np.quantile(latency_M_ms, 0.5)) if met else None,
        p99_ms=float(np.quantile(latency_M_ms, 0.99)) if met else None,
        wall_us=replay.wall_s / len(replay.served) * 1e6,
    )


def _is_met(end: Served) -> bool:
    return end.outcome is Outcome.MET


def _finish_s(end: Served) -> float:
    assert end.finish_s is not None, "what was met has finished: this is a bug"
    return end.finish_s


def _spent(slices: Sequence[SliceFacts], end: Served) -> int:
    """As the service bills it: the gate's own cost only where the gate ran."""
    assert end.width is not None, "what was met has a width: this is a bug"
    facts = slices[end.width]
    return facts.madds_published if end.gate_width is None else facts.madds_served


def _mean_at(
    values_IL: NDArray[np.bool_] | NDArray[np.float32] | None, image_M: NDArray[np.int64], width_M: NDArray[np.int64]
) -> float | None:
    if values_IL is None or not image_M.size:
        return None
    return float(values_IL[image_M, width_M].mean(dtype=np.float64))


def means(every: Sequence[Figures]) -> list[Means]:
    """Per policy, in the order in which policies appear."""
    found = []
    for policy in dict.fromkeys(one.policy for one in every):
        own = [one for one in every if one.policy == policy]
        found.append(
            Means(
                policy=policy,
                traces=len(own),
                attainment=math.fsum(one.attainment for one in own) / len(own),
                top1=_mean(one.top1 for one in own),
                p_right=_mean(one.p_right for one in own),
                mean_madds=_mean(one.mean_madds for one in own),
                p50_ms=_mean(one.p50_ms for one in own),
                p99_ms=_mean(one.p99_ms for one in own),
                wall_us=math.fsum(one.wall_us for one in own) / len(own),
            )
        )
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    """Of what is there; None when nothing is."""
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


def dominated(every: Sequence[Figures]) -> list[Dominated]:
    """Every policy that another one beats on a trace; nothing where answers were not judged."""
    if all(one.top1 is None for one in every):
        return []
    found = []
    for one in every:
        rivals = [other for other in every if other.trace == one.trace]
        by = tuple(other.policy for other in rivals if _beats(other, one))
        found += [Dominated(one.trace, one.policy, by)] if by else []
    return found


def _beats(a: Figures, b: Figures) -> bool:
    a_both, b_both = (a.attainment, a.top1 or 0.0), (b.attainment, b.top1 or 0.0)
    return a_both != b_both and all(x >= y for x, y in zip(a_both, b_both, strict=True))


@dataclass(frozen=True, slots=True)
class _Tallies:
    """Per image: how often each trace asks for it, and how often a policy met that, and was right; right: if judged."""

    asked_TI: F64
    met_PTI: F64
    right_PTI: F64 | None


def compare(
    replays: Sequence[Replay], against: str, known: Known, draws: int = DRAWS, seed: int = 0
) -> list[Comparison]:
    """Every policy less ``against``: mean over traces of the differences on each, and how sure that is.

    Every policy must have been replayed on every trace. Draws take traces and, whatever trace they are in, images with
    replacement; what became of an image in its queue is kept.
    """
    policies = list(dict.fromkeys(replay.policy for replay in replays))
    tallies = _tallies(replays, policies, known)
    traces, images = tallies.asked_TI.shape
    reference = policies.index(against)

    def differences(weight_DI: F64, weight_DT: F64) -> tuple[F64, F64]:
        asked_TD = tallies.asked_TI @ weight_DI.T
        met_PTD = tallies.met_PTI @ weight_DI.T
        right_PTD = np.full_like(met_PTD, np.nan) if tallies.right_PTI is None else tallies.right_PTI @ weight_DI.T
        return (
            _difference(met_PTD, np.broadcast_to(asked_TD, met_PTD.shape), weight_DT, reference),
            _difference(right_PTD, met_PTD, weight_DT, reference),
        )

    values = differences(np.ones((1, images)), np.ones((1, traces)))
    rng = np.random.default_rng(seed)
    drawn = [
        differences(_multiplicities(rng, count, images), _multiplicities(rng, count, traces))
        for count in _parts(draws, _DRAWS_AT_ONCE)
    ]
    attained, right = (
        [_interval(value[p, 0], np.concatenate([part[p] for part in parts])) for p in range(len(policies))]
        for value, parts in zip(values, zip(*drawn, strict=True), strict=True)
    )
    found = []
    for policy, attainment, top1 in zip(policies, attained, right, strict=True):
        if policy != against:
            assert attainment is not None, "every trace asks for an image: this is a bug"
            found.append(Comparison(policy, against, attainment, top1))
    return found


def _tallies(replays: Sequence[Replay], policies: Sequence[str], known: Known) -> _Tallies:
    traces = list(dict.fromkeys(replay.trace for replay in replays))
    image_I = np.unique(np.concatenate([[arrival.image for arrival in replay.arrivals] for replay in replays]))
    shape = len(policies), len(traces), len(image_I)
    asked_TI, met_PTI, right_PTI = np.zeros(shape[1:]), np.zeros(shape), np.zeros(shape)
    for replay in replays:
        at = policies.index(replay.policy), traces.index(replay.trace)
        image_N = np.array([arrival.image for arrival in replay.arrivals])
        place_N = np.searchsorted(image_I, image_N)
        met_N = np.array([_is_met(end) for end in replay.served])
        asked_TI[at[1]] = np.bincount(place_N, minlength=len(image_I))
        met_PTI[at] = np.bincount(place_N[met_N], minlength=len(image_I))
        if known.correct_IL is not None:
            width_M = np.array([end.width for end in replay.served if _is_met(end)], np.int64)
            right_M = known.correct_IL[image_N[met_N], width_M]
            right_PTI[at] = np.bincount(place_N[met_N], right_M, minlength=len(image_I))
    return _Tallies(asked_TI, met_PTI, None if known.correct_IL is None else right_PTI)


def _difference(part_PTD: F64, whole_PTD: F64, weight_DT: F64, reference: int) -> F64:
    """Ratios less those of the reference, [P, D]: the mean over the traces on which both have one, else NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_PTD = part_PTD / whole_PTD
        difference_PTD = ratio_PTD - ratio_PTD[reference]
        weight_PTD = weight_DT.T * np.isfinite(difference_PTD)
        mean_PD: F64 = (weight_PTD * np.nan_to_num(difference_PTD)).sum(1) / weight_PTD.sum(1)
    return mean_PD


def _multiplicities(rng: np.random.Generator, draws: int, items: int) -> F64:
    """[D, items]: how often each item comes up when as many are drawn with replacement."""
    drawn = rng.integers(items, size=(draws, items)) + items * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * items).reshape(draws, items).astype(np.float64)


def _parts(total: int, most: int) -> Iterator[int]:
    yield from (min(most, total - begun) for begun in range(0, total, most))


def _interval(value: float, drawn_D: F64) -> Interval | None:
    drawn_D = drawn_D[np.isfinite(drawn_D)]
    if not (math.isfinite(value) and drawn_D.size):
        return None
    low, high = np.quantile(drawn_D, (0.025, 0.975)).tolist()
    return Interval(float(value), low, high)
