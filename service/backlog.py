"""What waits, in worker seconds at every price of time: how wide may images be, is there room for one more. PURE.

Workers always take the image that is due first. With ``W`` of them, image ``j`` is then finished when they
have spent about ``C_j + (W - 1) / 2 c_j`` seconds together, of which ``C_j`` is all work due no later than it
and ``c_j`` its own: list scheduling ends between ``C_j`` and ``C_j + (W - 1) c_j`` (Graham 1966), and this is
the middle; and never sooner than ``c_j`` alone takes. A price is feasible when every image that waits is
finished by the time it is due, if all of them take their widths at that price.

The plan is an exact sum over the queue, made anew when a sixteenth of the queue has changed: its cost per
image does not grow with the queue. In between, what has been added is counted, and what has been done
is taken to be worth the time that has passed. A few images are summed in plain Python, where numpy's calls
would take longer than the sums; many with numpy. Both do the same operations in the same order on 64 bits, so
that the price does not depend on which of them ran.

Shapes: N images that wait, P prices, L ladder length, W workers.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from service.latency import Costs, Delay
from service.request import Window
from service.sums import F64, ROOM, Few, Many, Sums, lowest

HEADROOM = 0.2
"""Share of the workers' time until images are due that prices plan; what is kept back meets clumps of requests."""
FEW_IMAGES = 40
"""Up to here plain Python is faster than numpy."""
STALE_SHARE = 16
LAZY_IMAGES = STALE_SHARE - 1
"""Plans of fewer images are made anew at every change, so what they are not asked need not be summed."""
STALE_S, STALE_S_PER_IMAGE = 0.02, 5e-5
RATE_MEMORY_S, RATE_MEMORY_IMAGES = 1.0, 50
"""Of the arrival rate, the longer of both: longer than a clump of requests, shorter than a spike in traffic."""
ROUNDING_SHARE = 1e-5
CALM_SHARE = 0.25
"""Of the headroom: below it the rate of arrivals is no reason to narrow. Callers that wait for one answer before they
send the next come as fast as they are served; their rate says nothing of what they would bear."""
TYPICAL_FRESH = 1.0 - 0.995
"""Share of the newest in the widths that images take at each price: the last few hundred that the gate has seen."""


@dataclass(slots=True)
class _Plan:
    """Sums of one moment.

    first_free_s, free_sum_s: when workers are done with what they have, the first of them and the sum over all.
    price    the lowest that is feasible.
    is_calm  what waits is so little, even at no price, that it does not matter how much comes.
    sums     what the next three are to be made of, None once they are there.
    due_s    of every image that waits, ascending; used_s: work due no later, at the top price.
    room_s   worker seconds that may come before this image without making it or one behind it late.
    added_*  what has come since, in the order in which it is due; added_sum_s: all of it.
    """

    made_s: float = -math.inf
    first_free_s: float = 0.0
    free_sum_s: float = 0.0
    price: int = 0
    is_calm: bool = True
    sums: Sums | None = None
    due_s: Sequence[float] = ()
    used_s: Sequence[float] = ()
    room_s: Sequence[float] = ()
    changes: int = 0
    added_due_s: list[float] = field(default_factory=list)
    added_s: list[float] = field(default_factory=list)
    added_sum_s: float = 0.0


class Backlog:
    """Told of every image that comes, is seen and goes. Not thread-safe.

    Books are by slot; ``_slots`` and ``_slots_due_s`` are in the order in which images are due, equal ones in that
    of arrival. They are arrays of the standard library: one value is written in a tenth of the time that
    numpy takes, and numpy reads them as they are.

    costs     may be replaced when a better estimate is at hand.
    unasked   likewise: at every price the width of images that the gate is not asked about, None where it is asked;
              look_P: what asking costs more.
    door      how long requests wait before anybody looks at them.
    headroom  share of the workers' time that prices may plan; the rest meets what nobody foresaw.
    is_priced  whether ``price`` will be asked: it takes most of what a plan takes.
    """

    def __init__(self, costs: Costs, prices: int, workers: int, headroom: float, *, is_priced: bool = True) -> None:
        self.costs, self._prices, self._workers, self._headroom = costs, prices, workers, headroom
        self._is_priced = is_priced
        self.unasked: Sequence[int | None] = (*(None,) * (prices - 1), 0)
        self.look_P: Sequence[float] = (0.0,) * prices
        self._due_s, self._hard, self._seen, self._needs_trunk = array("d"), bytearray(), bytearray(), bytearray()
        self._may_ask = bytearray()  # neither seen nor forced
        self._lo, self._hi = bytearray(), bytearray()
        self._widths = bytearray()  # at every price, within lo..hi: [slot * prices + price]
        self._least_s, self._least_sum_s = array("d"), 0.0  # trunk and narrowest body, as they were expected to cost
        self._unused: list[int] = []
        self._slots, self._slots_due_s = array("i"), array("d")
        self._typical_P = [costs.body_s[0]] * prices  # until images were seen, hope for the best
        self._rate, self._rate_at_s, self.door = 0.0, 0.0, Delay()
        self._memory_s = max(RATE_MEMORY_S, RATE_MEMORY_IMAGES * self._own_s(0) / workers)
        self._plan = _Plan()

    def __len__(self) -> int:
        return len(self._slots)

    def arrived(self, now_s: float) -> None:
        """Count one image more, for the rate."""
        self._rate, self._rate_at_s = self.rate(now_s) + 1.0 / self._memory_s, now_s

    def rate(self, now_s: float) -> float:
        """Images per second, exponentially smoothed."""
        return self._rate * math.exp(min(0.0, self._rate_at_s - now_s) / self._memory_s)

    def add(self, due_s: float, hard: bool, window: Window) -> int:
        """One image more that waits for its trunk; returns its slot. hard: late is no use to its caller."""
        if not self._unused:
            self._grow()
        slot = self._unused.pop()
        lo, hi = (window.lo, window.hi) if window.forced is None else (window.forced, window.forced)
        self._due_s[slot], self._hard[slot], self._seen[slot], self._needs_trunk[slot] = due_s, hard, False, True
        self._lo[slot], self._hi[slot], self._may_ask[slot] = lo, hi, window.forced is None
        at = bisect_right(self._slots_due_s, due_s)
        self._slots.insert(at, slot)
        self._slots_due_s.insert(at, due_s)
        own_s = self._least_s[slot] = self._own_s(lo)
        self._least_sum_s += own_s
        self._note(due_s, own_s)
        return slot

    def see(self, slot: int, widths_P: Sequence[int]) -> None:
        """The gate has seen the image, which waits for its body: its width at every price."""
        lo, hi, body_s, at = self._lo[slot], self._hi[slot], self.costs.body_s, slot * self._prices
        if self._is_priced:
            typical = zip(self._typical_P, widths_P, strict=True)
            self._typical_P = [s + TYPICAL_FRESH * (body_s[width] - s) for s, width in typical]
        if lo > 0 or hi < len(body_s) - 1:
            widths_P = [min(max(width, lo), hi) for width in widths_P]
        self._widths[at : at + self._prices] = bytes(widths_P)
        self._seen[slot], self._needs_trunk[slot], self._may_ask[slot] = True, False, False
        self._plan.changes += 1

    def begin(self, *slots: int) -> None:
        """A worker has taken these images for their trunks; their bodies are still to come."""
        for slot in slots:  # what asking costs is being spent, too
            self._needs_trunk[slot] = self._may_ask[slot] = False
        self._plan.changes += len(slots)

    def remove(self, *slots: int) -> None:
        """These images wait no more."""
        images, at = len(slots), self._place_of(slots[0])
        if images == 1 or self._slots[at : at + images].tolist() == [*slots]:  # one move of all that are behind
            del self._slots[at : at + images], self._slots_due_s[at : at + images]
        else:
            for slot in slots:
                at = self._place_of(slot)
                del self._slots[at], self._slots_due_s[at]
        gone_s = sum([self._least_s[slot] for slot in slots])
        self._least_sum_s = self._least_sum_s - gone_s if self._slots else 0.0
        self._unused.extend(slots)
        self._plan.changes += images

    def _place_of(self, slot: int) -> int:
        return self._slots.index(slot, bisect_left(self._slots_due_s, self._due_s[slot]))

    def price(self, now_s: float, busy_until_s: Sequence[float]) -> int:
        """The lowest price at which what waits is in time and what is expected can be kept up with."""
        plan = self._current_plan(now_s, busy_until_s)
        top = self._prices - 1
        if plan.is_calm or plan.price == top:
            return plan.price
        rate, trunk_s, workers = self.rate(now_s), self.costs.trunk_s, self._workers

        def lasts(price: int) -> bool:
            return rate * (trunk_s + sum(self._unseen_s(price))) <= workers

        if lasts(plan.price):
            return plan.price  # whatever lasts below it
        return max(plan.price, next(filter(lasts, range(top)), top))

    def is_ample(self, now_s: float, due_s: float, lo: int, busy_until_s: Sequence[float]) -> bool:
        """Whether one worker alone could do all that waits, and one image more, before the first of it is due.

        Then ``missing`` is 0 or less: an answer without a plan, for most of the day.
        """
        first_s = min(due_s, self._slots_due_s[0]) if self._slots else due_s
        if now_s + self._least_sum_s > first_s:
            return False  # whatever workers still have to do
        return max([now_s, *busy_until_s]) + self._least_sum_s + self._own_s(lo) <= first_s

    def finish_s(self, now_s: float, due_s: float, lo: int, busy_until_s: Sequence[float]) -> float:
        """When an image that is due then and comes now would be finished, everything at its narrowest width."""
        plan = self._full_plan(now_s, busy_until_s)
        return self._finish_s(plan, bisect_right(plan.due_s, due_s), due_s, self._own_s(lo))

    def missing(self, now_s: float, due_s: float, lo: int, busy_until_s: Sequence[float]) -> tuple[float, float]:
        """What keeps one more image from being in time, or would make another late that was promised to be in time.

        Worker seconds of work that would have to go, 0 or less when there is room; and by when that work is due.
        """
        plan, own_s = self._full_plan(now_s, busy_until_s), self._own_s(lo)
        if plan.first_free_s + own_s > due_s:
            return math.inf, due_s  # late even alone
        at = bisect_right(plan.due_s, due_s)
        late_s = self._workers * (self._finish_s(plan, at, due_s, own_s) - due_s)
        if at == len(plan.room_s):
            return late_s, due_s
        over_s = plan.added_sum_s + own_s - plan.room_s[at]
        if late_s > 0 or over_s <= 0:
            return max(late_s, over_s), due_s
        spoilt = bisect_right(plan.room_s, plan.room_s[at], lo=at) - 1
        return over_s, plan.due_s[spoilt]

    def _finish_s(self, plan: _Plan, at: int, due_s: float, own_s: float) -> float:
        """As ``finish_s``; at: how many of the planned images are due no later."""
        used_s = plan.used_s[at - 1] if at else 0.0
        before = bisect_right(plan.added_due_s, due_s)
        if 2 * before < len(plan.added_s):  # whichever is the shorter sum
            used_s += sum(plan.added_s[:before])
        else:
            used_s += plan.added_sum_s - sum(plan.added_s[before:])
        behind_all_s = (plan.free_sum_s + used_s + (self._workers + 1) / 2 * own_s) / self._workers
        return max(behind_all_s, plan.first_free_s + own_s)  # no image is split between workers

    def still_s(self, slot: int) -> float:
        """Worker seconds that an image still needs at its narrowest width."""
        return self._front_s(ROOM) * self._needs_trunk[slot] + self.costs.body_s[self._lo[slot]]

    def _unseen_s(self, price: int) -> tuple[float, float]:
        """What an image that nothing is known of will need behind its trunk: for its body, and for asking."""
        width = self.unasked[price]
        return (self._typical_P[price], self.look_P[price]) if width is None else (self.costs.body_s[width], 0.0)

    def renew(self, costs: Costs, unasked: Sequence[int | None], look_P: Sequence[float]) -> None:
        """Better estimates; a plan keeps those that it was made with."""
        if not self._plan.changes:  # else it is used no more, or was completed when it was made
            self._complete(self._plan)
        self.costs, self.unasked, self.look_P = costs, unasked, look_P

    def _own_s(self, lo: int) -> float:
        return self._front_s(ROOM) + self.costs.body_s[lo]

    def _front_s(self, price: int) -> float:
        """What an image needs before its body: the trunk; where room is looked for, all that is beside batches, too."""
        return self.costs.trunk_s + (self.costs.overhead_s if price == ROOM else 0.0)

    def _current_plan(self, now_s: float, busy_until_s: Sequence[float]) -> _Plan:
        plan = self._plan
        images = len(self._slots)
        if plan.changes * STALE_SHARE > images or now_s - plan.made_s > STALE_S + STALE_S_PER_IMAGE * images:
            self._plan = plan = self._make_plan(now_s, busy_until_s)
            if images >= LAZY_IMAGES:
                self._complete(plan)
        return plan

    def _full_plan(self, now_s: float, busy_until_s: Sequence[float]) -> _Plan:
        plan = self._current_plan(now_s, busy_until_s)
        if plan.sums is not None:
            self._complete(plan)
        return plan

    def _complete(self, plan: _Plan) -> None:
        """Sum up what a plan was not asked yet; nothing may have changed since it was made."""
        if plan.sums is not None:
            plan.due_s, (plan.used_s, plan.room_s), plan.sums = self._slots_due_s[:], plan.sums.narrowest(), None

    def _make_plan(self, now_s: float, busy_until_s: Sequence[float]) -> _Plan:
        free_s = [busy_s if busy_s > now_s else now_s for busy_s in busy_until_s]
        free_s += [now_s] * (self._workers - len(free_s))
        first_free_s, free_sum_s = min(free_s), sum(free_s)
        if not self._slots:
            return _Plan(now_s, first_free_s, free_sum_s)
        busy_s = sorted([free - now_s for free in free_s])
        sums: Sums = (self._few if len(self._slots) <= FEW_IMAGES else self._many)(now_s, busy_s)
        price, is_calm = self._priced(sums, now_s) if self._is_priced else (0, True)
        return _Plan(now_s, first_free_s, free_sum_s, price, is_calm, sums)

    def _priced(self, sums: Sums, now_s: float) -> tuple[int, bool]:
        """The lowest price that is feasible, and whether what waits is too little to look at what comes."""
        unseen = self.rate(now_s) * self.door.expected_s(now_s)  # Little's law
        door_s = unseen * (self.costs.trunk_s + self.costs.body_s[0])
        share, load, price = self._headroom * (1 + ROUNDING_SHARE), sums.load(0, door_s), 0
        if load > share:
            price = lowest(self._prices - 1, max(1, self._plan.price), lambda price: sums.load(price, door_s) <= share)
        return price, load <= CALM_SHARE * share

    def _few(self, now_s: float, busy_s: list[float]) -> Few:
        spent_s = [0.0, *accumulate(busy_s)]
        capacity_s = []
        for due_s in self._slots_due_s:
            left_s = due_s - now_s
            free = bisect_left(busy_s, left_s)  # workers, in time to do anything
            capacity_s.append(max(0.0, free * left_s - spent_s[free]))
        return Few(self._few_costs, capacity_s, self._hard, self._slots, self._workers)

    def _few_costs(self, price: int) -> list[float]:
        """Worker seconds that each image still needs at a price."""
        front_s, body_s, (typical_s, look_s) = self._front_s(price), self.costs.body_s, self._unseen_s(price)
        seen, prices, costs_s = self._seen, self._prices, []
        column = price % prices
        for slot in self._slots:
            if seen[slot]:
                cost_s = body_s[self._widths[slot * prices + column]]
            else:
                cost_s = min(max(typical_s, body_s[self._lo[slot]]), body_s[self._hi[slot]])
            costs_s.append(cost_s + front_s * self._needs_trunk[slot] + look_s * self._may_ask[slot])
        return costs_s

    def _many(self, now_s: float, busy_s: list[float]) -> Many:
        slots_N, left_N = np.array(self._slots, np.intp), np.array(self._slots_due_s) - now_s
        begins = np.searchsorted(left_N, busy_s, side="right")  # the first image that each worker can do anything for
        free_N = np.repeat(np.arange(self._workers + 1), np.diff(begins, prepend=0, append=len(left_N)))
        capacity_N = np.maximum(0.0, free_N * left_N - np.array([0.0, *accumulate(busy_s)]).take(free_N))
        hard_N, seen_N, needs_trunk_N, may_ask_N, lo_N, hi_N = (
            np.frombuffer(book, np.uint8).take(slots_N)
            for book in (self._hard, self._seen, self._needs_trunk, self._may_ask, self._lo, self._hi)
        )
        body_L = np.array(self.costs.body_s)
        least_N, most_N = body_L.take(lo_N), body_L.take(hi_N)
        seen = np.flatnonzero(seen_N)
        rows = slots_N[seen] * self._prices

        def costs(price: int) -> F64:
            typical_s, look_s = self._unseen_s(price)
            cost_N: F64 = np.minimum(np.maximum(typical_s, least_N), most_N)
            cost_N[seen] = body_L.take(np.frombuffer(self._widths, np.uint8).take(rows + price % self._prices))
            cost_N += self._front_s(price) * needs_trunk_N
            return cost_N + look_s * may_ask_N if look_s else cost_N

        return Many(costs, capacity_N, hard_N.astype(bool), self._workers)

    def _note(self, due_s: float, cost_s: float) -> None:
        """Count what was added since the plan was made."""
        plan = self._plan
        plan.changes += 1
        at = bisect_right(plan.added_due_s, due_s)
        plan.added_due_s.insert(at, due_s)
        plan.added_s.insert(at, cost_s)
        plan.added_sum_s += cost_s

    def _grow(self) -> None:
        size = len(self._due_s)
        more = max(size, 64)
        self._unused = list(range(size + more - 1, size - 1, -1))
        for times in (self._due_s, self._least_s):
            times.frombytes(bytes(8 * more))
        for book in (self._hard, self._seen, self._needs_trunk, self._may_ask, self._lo, self._hi):
            book.extend(bytes(more))
        self._widths.extend(bytes(more * self._prices))
