"""Images that wait for the same step, in the order in which they are due. PURE."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from itertools import islice

from service.request import Entry, Step

SCAN_IMAGES = 128
"""How far behind the first image others are looked for that may run with it."""
URGENCIES = 8
"""Of RFC 9218: 0 to 7."""


class Queue:
    """Entries in the order in which they are due; equal ones in the order of arrival.

    items  due_s, number of arrival, entry. Only read from outside: a list is asked faster than a method.
    """

    def __init__(self, step: Step, arrivals: Iterator[int]) -> None:
        self.step, self._arrivals = step, arrivals
        self.items: list[tuple[float, int, Entry]] = []
        self._due_s = array("d")  # of the items: side by side in memory, places in it are found faster
        self._urgencies = [0] * URGENCIES  # how many entries of each

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Entry]:
        return (entry for _, _, entry in self.items)

    @property
    def first(self) -> Entry:
        return self.items[0][2]

    def has_less_urgent(self, urgency: int) -> bool:
        return any(self._urgencies[urgency + 1 :])

    def push(self, entry: Entry) -> None:
        self._urgencies[entry.urgency] += 1
        at = bisect_right(self._due_s, entry.due_s)
        self._due_s.insert(at, entry.due_s)
        self.items.insert(at, (entry.due_s, next(self._arrivals), entry))

    def pop(self) -> Entry:
        entry = self.items.pop(0)[2]
        del self._due_s[0]
        self._urgencies[entry.urgency] -= 1
        return entry

    def remove(self, entries: Collection[Entry]) -> None:
        if not entries:
            return
        gone = set(map(id, entries))
        self.items = [item for item in self.items if id(item[2]) not in gone]
        self._due_s = array("d", [due_s for due_s, _, _ in self.items])
        self._urgencies = [0] * URGENCIES
        for entry in self:
            self._urgencies[entry.urgency] += 1

    def take(self, limit: int, joins: Callable[[Entry], bool]) -> tuple[Entry, ...]:
        """Remove those of the first entries that somebody waits for and that may join, ``limit`` at most."""
        taken, left = [], []
        for item in islice(self.items, SCAN_IMAGES):
            entry = item[2]
            if joins(entry) and not entry.abandoned():
                self._urgencies[entry.urgency] -= 1
                taken.append(entry)
                if len(taken) == limit:
                    break
            else:
                left.append(item)
        scanned = len(taken) + len(left)
        self.items[:scanned] = left  # one move of all that are behind
        if left:
            self._due_s[:scanned] = array("d", [due_s for due_s, _, _ in left])
        else:
            del self._due_s[:scanned]
        return tuple(taken)
