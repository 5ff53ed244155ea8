"""Which images run next, together, at which width. PURE: time is an argument, nothing is computed.

One bucket before the trunk, one per width after it, and one per width for images whose width is known
before their trunk runs. Inside a bucket the earliest due entry goes first; among buckets, the one whose
head is due earliest. A worker that is free asks for the next
batch, so no timer is needed while workers are busy, and an idle worker takes what is there at once.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

from service.request import BEFORE_TRUNK, Batch, Bucket, Entry


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

    batch_limits  most entries per batch, per bucket. Its keys are the buckets that exist.
    """

    def __init__(self, batch_limits: Mapping[Bucket, int]) -> None:
        bad = {bucket: limit for bucket, limit in batch_limits.items() if limit < 1}
        if bad or BEFORE_TRUNK not in batch_limits:
            raise ValueError(
                f"batch limits need the trunk's bucket and limits of at least 1 image, got {dict(batch_limits)}"
            )
        self._limits = dict(batch_limits)
        self._queues: dict[Bucket, list[tuple[float, int, Entry]]] = {bucket: [] for bucket in batch_limits}
        self._arrivals = count()

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def waiting(self) -> dict[int | None, int]:
        """Entries per width, None for those before the trunk; callers who have gone count until they are dropped."""
        counts: Counter[int | None] = Counter()
        for bucket, queue in self._queues.items():
            counts[bucket.width] += len(queue)
        return dict(counts)

    def push(self, entry: Entry) -> None:
        """Queue an entry in its bucket."""
        heapq.heappush(self._queues[entry.bucket], (entry.due_s, next(self._arrivals), entry))

    def next_batch(self, now_s: float) -> Selection:
        """Take the most urgent batch and drop what nobody can use any more on the way."""
        cancelled: list[Entry] = []
        expired: list[Entry] = []
        taken: list[Entry] = []
        for queue in self._queues.values():
            self._drop_dead_heads(queue, now_s, cancelled, expired)
        heads = [(queue[0][:2], bucket) for bucket, queue in self._queues.items() if queue]
        if not heads:
            return Selection(None, tuple(cancelled), tuple(expired))
        _, bucket = min(heads, key=lambda head: head[0])
        queue = self._queues[bucket]
        while queue and len(taken) < self._limits[bucket]:
            taken.append(heapq.heappop(queue)[2])
            self._drop_dead_heads(queue, now_s, cancelled, expired)
        return Selection(Batch(bucket, tuple(taken)), tuple(cancelled), tuple(expired))

    def prune(self, now_s: float) -> Selection:
        """Drop every dead entry wherever it stands; called when the queue looks full."""
        cancelled: list[Entry] = []
        expired: list[Entry] = []
        for bucket, queue in self._queues.items():
            alive = []
            for item in queue:
                if not self._sort_out(item[2], now_s, cancelled, expired):
                    alive.append(item)
            heapq.heapify(alive)
            self._queues[bucket] = alive
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
