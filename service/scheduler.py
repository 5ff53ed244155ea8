"""Which images run next, together, at which width. PURE: time is an argument, nothing is computed.

One queue before the trunk and one bucket per width after it. Inside a queue the earliest due entry
goes first; among queues, the one whose head is due earliest. A worker that is free asks for the next
batch, so no timer is needed while workers are busy, and an idle worker takes what is there at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count

from service.request import Batch, Entry


@dataclass(frozen=True, slots=True)
class Selection:
    """What ``next_batch`` decided.

    batch      what to run, or None when nothing is waiting.
    cancelled  entries whose caller has gone; never computed.
    expired    entries whose deadline has passed; never computed, their promises must still be broken.
    """

    batch: Batch | None
    cancelled: tuple[Entry, ...] = ()
    expired: tuple[Entry, ...] = ()


class Scheduler:
    """Queues of one model. Not thread-safe: called on the event loop only.

    batch_limits  most entries per batch, per queue: a ladder index, or None for the trunk. Its keys
                  are the queues that exist.
    """

    def __init__(self, batch_limits: Mapping[int | None, int]) -> None:
        bad = {width: limit for width, limit in batch_limits.items() if limit < 1}
        if bad or None not in batch_limits:
            raise ValueError(
                f"batch limits need a trunk queue and limits of at least 1 image, got {dict(batch_limits)}"
            )
        self._limits = dict(batch_limits)
        self._queues: dict[int | None, list[tuple[float, int, Entry]]] = {width: [] for width in batch_limits}
        self._arrivals = count()

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def waiting(self, width: int | None) -> int:
        """Entries in one queue; those whose callers have gone count until they are dropped."""
        return len(self._queues[width])

    @property
    def widths(self) -> Iterable[int | None]:
        return self._queues.keys()

    def push(self, entry: Entry) -> None:
        """Queue an entry: before the trunk while it has no route, then in its width's bucket."""
        width = None if entry.route is None else entry.route.width
        heapq.heappush(self._queues[width], (entry.due_s, next(self._arrivals), entry))

    def next_batch(self, now_s: float) -> Selection:
        """Take the most urgent batch and drop what nobody can use any more on the way."""
        cancelled: list[Entry] = []
        expired: list[Entry] = []
        taken: list[Entry] = []
        for queue in self._queues.values():
            self._drop_dead_heads(queue, now_s, cancelled, expired)
        heads = [(queue[0][:2], width) for width, queue in self._queues.items() if queue]
        if not heads:
            return Selection(None, tuple(cancelled), tuple(expired))
        _, width = min(heads, key=lambda head: head[0])
        queue = self._queues[width]
        while queue and len(taken) < self._limits[width]:
            taken.append(heapq.heappop(queue)[2])
            self._drop_dead_heads(queue, now_s, cancelled, expired)
        return Selection(Batch(width, tuple(taken)), tuple(cancelled), tuple(expired))

    def prune(self, now_s: float) -> Selection:
        """Drop every dead entry wherever it stands; called when the queue looks full."""
        cancelled: list[Entry] = []
        expired: list[Entry] = []
        for width, queue in self._queues.items():
            alive = []
            for item in queue:
                if not self._sort_out(item[2], now_s, cancelled, expired):
                    alive.append(item)
            heapq.heapify(alive)
            self._queues[width] = alive
        return Selection(None, tuple(cancelled), tuple(expired))

    def clear(self) -> tuple[Entry, ...]:
        """Empty every queue and hand back what was waiting, for shutdown."""
        entries = tuple(item[2] for queue in self._queues.values() for item in sorted(queue, key=lambda i: i[:2]))
        for queue in self._queues.values():
            queue.clear()
        return entries

    def _drop_dead_heads(
        self, queue: list[tuple[float, int, Entry]], now_s: float, cancelled: list[Entry], expired: list[Entry]
    ) -> None:
        while queue and self._sort_out(queue[0][2], now_s, cancelled, expired):
            heapq.heappop(queue)

    @staticmethod
    def _sort_out(entry: Entry, now_s: float, cancelled: list[Entry], expired: list[Entry]) -> bool:
        """Put a dead entry on its list and say so; a live one is left alone."""
        if entry.deadline_s <= now_s:  # asked first: the caller has been answered at its deadline already
            expired.append(entry)
        elif entry.abandoned():
            cancelled.append(entry)
        else:
            return False
        return True
