"""What waits, in worker seconds at every price of time: how wide may images be, is there room for one more. PURE.

Workers always take the image that is due first. With ``W`` of them, image ``j`` is then finished when they
have spent about ``C_j + (W - 1) / 2 c_j`` seconds together, of which ``C_j`` is all work due no later than it
and ``c_j`` its own: list scheduling ends between ``C_j`` and ``C_j + (W - 1) c_j`` (Graham 1966), and this is
the middle; and never sooner than ``c_j`` alone takes. A price is feasible when every image that waits is
finished by the time it is due, if all of them take their widths at that price.

The plan is an exact sum over the queue, made anew when a sixteenth of the queue has changed: its cost per
image does not grow with the queue. In between, what has been added is counted, and what has been done
is taken to be worth the time that has passed.

Shapes: N images that wait, P prices, L ladder length, W workers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.latency import Costs
from service.request import Window

F64 = NDArray[np.float64]

STALE_SHARE = 16
STALE_S, STALE_S_PER_IMAGE = 0.02, 5e-5
RATE_MEMORY_S, RATE_MEMORY_IMAGES = 1.0, 50
"""Of the arrival rate, the longer of both: longer than a clump of requests, shorter than a spike in traffic."""
ROUNDING_SHARE = 1e-5
CALM_SHARE = 0.25
"""Of the headroom: below it the rate of arrivals is no reason to narrow. Callers that wait for one answer before they
send the next come as fast as they are served; their rate says nothing of what they would bear."""
TYPICAL_MEMORY = 0.995
"""Of the widths that images take at each price: the last few hundred images that the gate has seen."""


@dataclass(slots=True)
class _Plan:
    """Sums of one moment.

    free_s   when each worker is done with what it has.
    price    the lowest that is feasible.
    is_calm  what waits is so little, even at no price, that it does not matter how much comes.
    due_s    of every image that waits, ascending; used_s: work due no later, at the top price.
    room_s   worker seconds that may come before this image without making it or one behind it late.
    added_*  what has come since.
    """

    made_s: float = -math.inf
    free_s: list[float] = field(default_factory=list)
    price: int = 0
    is_calm: bool = True
    due_s: list[float] = field(default_factory=list)
    used_s: list[float] = field(default_factory=list)
    room_s: list[float] = field(default_factory=list)
    changes: int = 0
    added_due_s: list[float] = field(default_factory=list)
    added_s: list[float] = field(default_factory=list)


class Backlog:
    """Told of every image that comes, is seen and goes. Not thread-safe.

    costs     may be replaced when a better estimate is at hand.
    headroom  share of the workers' time that prices may plan; the rest meets what nobody foresaw.
    """

    def __init__(self, costs: Costs, prices: int, workers: int, headroom: float) -> None:
        self.costs, self._workers, self._headroom = costs, workers, headroom
        self._due_s, self._hard, self._live = np.empty(64), np.zeros(64, bool), np.zeros(64, bool)
        self._seen, self._needs_trunk = np.zeros(64, bool), np.zeros(64, bool)
        self._bounds, self._body_s = np.zeros((64, 2), np.uint8), np.zeros((64, prices), np.float32)
        self._unused = list(range(63, -1, -1))
        self._typical_P = np.full(prices, costs.body_s[0])  # until images were seen, hope for the best
        self._rate, self._rate_at_s = 0.0, 0.0
        self._memory_s = max(RATE_MEMORY_S, RATE_MEMORY_IMAGES * self._own_s(0) / workers)
        self._plan = _Plan()

    def __len__(self) -> int:
        return len(self._live) - len(self._unused)

    def arrived(self, now_s: float) -> None:
        """Count one image more at the door, for the rate."""
        self._rate, self._rate_at_s = self.rate(now_s) + 1.0 / self._memory_s, now_s

    def rate(self, now_s: float) -> float:
        """Images per second at the door, exponentially smoothed."""
        return self._rate * math.exp(min(0.0, self._rate_at_s - now_s) / self._memory_s)

    def add(self, due_s: float, hard: bool, window: Window) -> int:
        """One image more that waits for its trunk; returns its slot. hard: late is no use to its caller."""
        if not self._unused:
            self._grow()
        slot = self._unused.pop()
        lo, hi = (window.lo, window.hi) if window.forced is None else (window.forced, window.forced)
        self._due_s[slot], self._hard[slot], self._live[slot], self._seen[slot] = due_s, hard, True, False
        self._needs_trunk[slot], self._bounds[slot] = True, (lo, hi)
        self._note(due_s, self._own_s(lo))
        return slot

    def see(self, slot: int, widths_P: Sequence[int]) -> None:
        """The gate has seen the image, which waits for its body: its width at every price."""
        lo, hi = self._bounds[slot].tolist()
        body_L = np.asarray(self.costs.body_s)
        self._body_s[slot], self._seen[slot], self._needs_trunk[slot] = body_L[np.clip(widths_P, lo, hi)], True, False
        self._typical_P += (1.0 - TYPICAL_MEMORY) * (body_L[np.asarray(widths_P)] - self._typical_P)
        self._plan.changes += 1

    def begin(self, slot: int) -> None:
        """A worker has taken the image for its trunk; its body is still to come."""
        self._needs_trunk[slot] = False
        self._plan.changes += 1

    def remove(self, slot: int) -> None:
        """The image waits no more."""
        self._live[slot] = False
        self._unused.append(slot)
        self._plan.changes += 1

    def price(self, now_s: float, busy_until_s: Sequence[float]) -> int:
        """The lowest price at which what waits is in time and what is expected can be kept up with."""
        plan = self._current_plan(now_s, busy_until_s)
        if plan.is_calm:
            return plan.price
        demand_P = self.rate(now_s) * (self.costs.trunk_s + self._typical_P)
        lasting = np.flatnonzero(demand_P <= self._workers)
        return max(plan.price, int(lasting[0]) if lasting.size else len(demand_P) - 1)

    def finish_s(self, now_s: float, due_s: float, lo: int, busy_until_s: Sequence[float]) -> float:
        """When an image that is due then and comes now would be finished, everything at its narrowest width."""
        plan = self._current_plan(now_s, busy_until_s)
        at = bisect_right(plan.due_s, due_s)
        used_s = plan.used_s[at - 1] if at else 0.0
        used_s += sum(plan.added_s[: bisect_right(plan.added_due_s, due_s)])
        own_s = self._own_s(lo)
        behind_all_s = (sum(plan.free_s) + used_s + (self._workers + 1) / 2 * own_s) / self._workers
        return max(behind_all_s, min(plan.free_s) + own_s)  # no image is split between workers

    def missing(self, now_s: float, due_s: float, lo: int, busy_until_s: Sequence[float]) -> tuple[float, float]:
        """What keeps one more image from being in time, or would make another late that was promised to be in time.

        Worker seconds of work that would have to go, 0 or less when there is room; and by when that work is due.
        """
        late_s = self._workers * (self.finish_s(now_s, due_s, lo, busy_until_s) - due_s)
        plan, at = self._plan, bisect_right(self._plan.due_s, due_s)
        if min(plan.free_s) + self._own_s(lo) > due_s:
            return math.inf, due_s  # late even alone
        if at == len(plan.room_s):
            return late_s, due_s
        over_s = sum(plan.added_s) + self._own_s(lo) - plan.room_s[at]
        if late_s > 0 or over_s <= 0:
            return max(late_s, over_s), due_s
        spoilt = bisect_right(plan.room_s, plan.room_s[at], lo=at) - 1
        return over_s, plan.due_s[spoilt]

    def _own_s(self, lo: int) -> float:
        return self.costs.trunk_s + self.costs.body_s[lo]

    def _current_plan(self, now_s: float, busy_until_s: Sequence[float]) -> _Plan:
        plan = self._plan
        images = len(self)
        if plan.changes * STALE_SHARE > images or now_s - plan.made_s > STALE_S + STALE_S_PER_IMAGE * images:
            self._plan = plan = self._make_plan(now_s, busy_until_s)
        return plan

    def _make_plan(self, now_s: float, busy_until_s: Sequence[float]) -> _Plan:
        free_s = [max(now_s, busy_s) for busy_s in busy_until_s]
        free_s += [now_s] * (self._workers - len(free_s))
        slots = np.flatnonzero(self._live)
        slots = slots[np.argsort(self._due_s[slots], kind="stable")]
        due_s = self._due_s[slots]
        cost_NP = self._costs(slots)
        used_NP = np.cumsum(cost_NP, axis=0)
        need_NP = np.maximum(used_NP + np.float32((self._workers - 1) / 2) * cost_NP, self._workers * cost_NP)
        capacity_s = sum((np.maximum(0.0, due_s - free) for free in free_s), np.zeros(len(due_s)))
        limit_N = (self._headroom * (1 + ROUNDING_SHARE) * capacity_s).astype(np.float32)
        is_calm = bool((need_NP[:, 0] <= CALM_SHARE * limit_N).all())
        feasible_P = np.asarray((need_NP <= limit_N[:, None]).all(axis=0))
        room_s = np.where(self._hard[slots], capacity_s - need_NP[:, -1], math.inf)
        room_s = np.minimum.accumulate(room_s[::-1])[::-1]
        price = int(feasible_P.argmax()) if feasible_P.any() else len(feasible_P) - 1
        return _Plan(now_s, free_s, price, is_calm, due_s.tolist(), used_NP[:, -1].tolist(), room_s.tolist())

    def _costs(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Worker seconds [N, P] that these images still need at every price."""
        cost_NP = self._body_s[slots]
        unseen_N = np.flatnonzero(~self._seen[slots])
        if unseen_N.size:
            body_L = np.asarray(self.costs.body_s, np.float32)
            lo_N, hi_N = self._bounds[slots[unseen_N]].T
            cost_NP[unseen_N] = np.clip(self._typical_P.astype(np.float32), body_L[lo_N, None], body_L[hi_N, None])
        cost_NP += np.float32(self.costs.trunk_s) * self._needs_trunk[slots, None]
        return cost_NP

    def _note(self, due_s: float, cost_s: float) -> None:
        """Count what was added since the plan was made."""
        plan = self._plan
        plan.changes += 1
        at = bisect_right(plan.added_due_s, due_s)
        plan.added_due_s.insert(at, due_s)
        plan.added_s.insert(at, cost_s)

    def _grow(self) -> None:
        size = len(self._live)
        self._unused = list(range(2 * size - 1, size - 1, -1))
        for name in ("_due_s", "_hard", "_live", "_seen", "_needs_trunk", "_bounds", "_body_s"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
