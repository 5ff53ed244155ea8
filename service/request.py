"""The frozen vocabulary of a request, from its headers to its answer.

Times are seconds on the monotonic clock unless a name says otherwise; costs are MAdds of one image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Forced = int | Literal["narrowest", "widest"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What the client grants, as parsed from the wire; None = not stated.

    compute_madds     ceiling on this image's served MAdds.
    compute_share     the same as an exact share (0, 1] of the widest slice's served MAdds.
    latency_s         answered or refused within this time from the last byte's arrival.
    accuracy_floor    least accuracy, ratio in (0, 1], exact.
    forced            the slice to use, bypassing the gate.
    urgency           RFC 9218: 0 most urgent .. 7, default 3.
    """

    compute_madds: int | None = None
    compute_share: Fraction | None = None
    latency_s: float | None = None
    accuracy_floor: Fraction | None = None
    forced: Forced | None = None
    urgency: int = 3

    def deadline_s(self, arrived_s: float) -> float:
        """When an image that arrived then has to be answered; inf without a latency budget."""
        return math.inf if self.latency_s is None else arrived_s + self.latency_s

    def kinds(self) -> tuple[str, ...]:
        """The budgets that are stated, by their metric label."""
        stated = {
            "latency": self.latency_s is not None,
            "compute": self.compute_madds is not None or self.compute_share is not None,
            "accuracy": self.accuracy_floor is not None,
        }
        return tuple(kind for kind, is_stated in stated.items() if is_stated)


@dataclass(frozen=True, slots=True)
class SliceFacts:
    """What routing knows of one slice. accuracy: top-1 on the test split, None until measured."""

    width: int
    madds_published: int
    madds_served: int
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Window:
    """The slices that a request allows: lo..hi inclusive; forced is inside it when set."""

    lo: int
    hi: int
    forced: int | None = None


class Reason(StrEnum):
    """Why the served slice is what it is; the first that applies, in this order."""

    FORCED = "forced"
    ACCURACY_FLOOR = "accuracy_floor"
    COMPUTE_BUDGET = "compute_budget"
    LATENCY_BUDGET = "latency_budget"
    LOAD = "load"
    WIDENED = "widened"
    POLICY = "policy"
    GATE = "gate"


@dataclass(frozen=True, slots=True)
class Route:
    """The decision for one image. gate_width: the gate's wish, None when it did not run."""

    width: int
    reason: Reason
    gate_width: int | None


class Step(StrEnum):
    """What one batch runs: the trunk (and the gate), the body at one width, or both at a width known before."""

    TRUNK = "trunk"
    BODY = "body"
    WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class Look:
    """What the gate made of an image.

    wish    ladder index at the operating point.
    widths  ladder index at every price of time, for policies that have prices; never wider than the wish.
    best    up to this ladder index the probability of being right does not fall from the wish on; the wish itself
            where the policy never widens.
    """

    wish: int
    widths: tuple[int, ...]
    best: int = 0


class Promise(Protocol):
    """The one future of a request; the scheduler only asks whether anybody still waits."""

    def done(self) -> bool: ...


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One image on its way through the queues; equal to itself alone.

    due_s       orders the queues: the deadline, or arrival plus the default target without one.
    deadline_s  hard: its last batch has to be done by then, or the entry is dropped, never computed. inf without a
                Latency-Budget.
    queued_s    when it entered the queue it is in now.
    waited_s    what it waited in earlier queues.
    trunk_s     seconds of its trunk batch, 0 before the trunk.
    payload     the image before the trunk, its features after it; opaque to everything that decides.
    look        what the gate made of it; None before the trunk.
    place       what the scheduler's books know it by.
    """

    promise: Promise
    payload: Any
    window: Window
    arrived_s: float
    due_s: float
    queued_s: float
    deadline_s: float = math.inf
    urgency: int = 3
    waited_s: float = 0.0
    trunk_s: float = 0.0
    look: Look | None = None
    place: int = -1

    @property
    def seen(self) -> Look:
        """Its look; only of entries that are past the trunk."""
        assert self.look is not None, "nobody has seen it yet: this is a bug"
        return self.look

    def after_trunk(self, payload: Any, look: Look, now_s: float, waited_s: float, trunk_s: float) -> Entry:
        """The same image from now on, with what is known since."""
        return Entry(  # ``dataclasses.replace`` takes twice the time, for every image that the gate sees
            self.promise, payload, self.window, self.arrived_s, self.due_s, now_s, self.deadline_s, self.urgency,
            waited_s, trunk_s, look, self.place,
        )  # fmt: skip

    def abandoned(self) -> bool:
        """True when the caller has gone or has been answered already."""
        return self.promise.done()


@dataclass(frozen=True, slots=True)
class Batch:
    """Entries that run together.

    step    what runs; width: None for the trunk, else of every entry.
    routes  one per entry, why it is served at that width; empty for the trunk.
    """

    step: Step
    width: int | None
    entries: tuple[Entry, ...]
    routes: tuple[Route, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Where one image's time went, in seconds; measured once, shown everywhere.

    queue  wait for a decoding thread, before the trunk and in the bucket.
    total  arrival of the last byte to the answer.
    """

    decode_s: float = 0.0
    queue_s: float = 0.0
    trunk_s: float = 0.0
    body_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """One image's answer: class probabilities (highest first, indices beside them) and its route.

    madds                      what an image costs at this slice; spent_madds: what this one did, 0 from the cache.
    logits_K, probabilities_K  of all classes. gate_logits_G: None when the gate did not run.
    cached                     computed for an earlier request; the route is the one of that.
    """

    indices: tuple[int, ...]
    probabilities: tuple[float, ...]
    route: Route
    madds: int
    timings: Timings
    logits_K: NDArray[np.float32] = field(compare=False)
    probabilities_K: NDArray[np.float64] = field(compare=False)
    gate_logits_G: NDArray[np.float32] | None = field(compare=False)
    cached: bool = False

    @property
    def spent_madds(self) -> int:
        """MAdds that were computed for this answer."""
        return 0 if self.cached else self.madds
