"""Images that wait against what workers can do until they are due: few in plain Python, many with numpy. PURE.

Both do the same operations in the same order on 64 bits: what they say does not depend on which of them ran.

Shapes: N images that wait, in the order in which they are due.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
ROOM = -1
"""In place of a price: everything at its narrowest width, and all that admission counts."""


class Sums(Protocol):
    """The images that wait, in the order in which they are due, against what workers can do until then."""

    def load(self, price: int, first_s: float = 0.0) -> float:
        """The share of the workers' time that would have to be spent at this price for all to be in time.

        first_s  worker seconds that go before.
        """

    def narrowest(self) -> tuple[Sequence[float], Sequence[float]]:
        """Where room is looked for: ``used_s`` and ``room_s`` of a plan."""


class Few:
    """In plain Python.

    costs       worker seconds of every image at a price, or for ``ROOM``.
    capacity_s  what workers can do until each is due.
    is_hard     of every slot; slots: those of the images.
    """

    def __init__(
        self,
        costs: Callable[[int], list[float]],
        capacity_s: list[float],
        is_hard: bytearray,
        slots: Sequence[int],
        workers: int,
    ) -> None:
        self._costs, self._capacity_s, self._workers = costs, capacity_s, workers
        self._is_hard, self._slots = is_hard, slots

    def load(self, price: int, first_s: float = 0.0) -> float:
        used_s, load, others, workers = first_s, 0.0, (self._workers - 1) / 2, self._workers
        for cost_s, capacity_s in zip(self._costs(price), self._capacity_s, strict=True):
            if not capacity_s:
                return math.inf
            used_s += cost_s
            share = max(used_s + others * cost_s, workers * cost_s) / capacity_s
            load = max(load, share)
        return load

    def narrowest(self) -> tuple[Sequence[float], Sequence[float]]:
        cost_s = self._costs(ROOM)
        used_s = list(accumulate(cost_s))
        others, workers, least_s, room_s = (self._workers - 1) / 2, self._workers, math.inf, []
        for at in range(len(cost_s) - 1, -1, -1):
            if self._is_hard[self._slots[at]]:
                need_s = max(used_s[at] + others * cost_s[at], workers * cost_s[at])
                least_s = min(least_s, self._capacity_s[at] - need_s)
            room_s.append(least_s)
        return used_s, room_s[::-1]


class Many:
    """With numpy; everything as in ``Few``."""

    def __init__(
        self, costs: Callable[[int], F64], capacity_N: F64, is_hard_N: NDArray[np.bool_], workers: int
    ) -> None:
        self._costs, self._capacity_N, self._is_hard_N, self._workers = costs, capacity_N, is_hard_N, workers

    def load(self, price: int, first_s: float = 0.0) -> float:
        cost_N = self._costs(price)
        used_N = cost_N.copy()
        used_N[0] += first_s
        np.cumsum(used_N, out=used_N)
        with np.errstate(divide="ignore", over="ignore"):  # no time, or next to none, is a load without end
            return float((self._need(used_N, cost_N) / self._capacity_N).max())

    def narrowest(self) -> tuple[Sequence[float], Sequence[float]]:
        cost_N = self._costs(ROOM)
        used_N = np.cumsum(cost_N)
        room_N = np.where(self._is_hard_N, self._capacity_N - self._need(used_N, cost_N), math.inf)
        room_N = np.minimum.accumulate(room_N[::-1])[::-1]
        return array("d", used_N.tobytes()), array("d", room_N.tobytes())

    def _need(self, used_N: F64, cost_N: F64) -> F64:
        return np.maximum(used_N + (self._workers - 1) / 2 * cost_N, self._workers * cost_N)


def lowest(top: int, guess: int, fits: Callable[[int], bool]) -> int:
    """The lowest price from 1 on that fits, given that no image takes longer at a higher one; ``top`` is not asked.

    guess  what it was a moment ago: then it is asked of two prices instead of five.
    """
    if guess < top and not fits(guess):
        return bisect_left(range(top), True, lo=guess + 1, key=fits)
    if guess == 1 or not fits(guess - 1):
        return guess
    return bisect_left(range(guess - 1), True, lo=1, key=fits)
