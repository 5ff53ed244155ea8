"""What one hosted version of a model has done since it was loaded, in sums. PURE."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.request import Timings


@dataclass(slots=True)
class Sum:
    """How often something happened, and the seconds that it took altogether."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds


@dataclass(slots=True)
class Tally:
    """Sums per image, except ``encode`` (per answer) and ``bodies`` (per batch, by its number of images).

    cache_hit      lookups that gave the answer, which is a success as well. cache_miss: those that did not.
    success, fail  from the last byte's arrival to the answer; callers who left are in neither.
    last_unix_s    wall clock of the last answer by computing; 0 before the first.
    """

    success: Sum = field(default_factory=Sum)
    fail: Sum = field(default_factory=Sum)
    queue: Sum = field(default_factory=Sum)
    decode: Sum = field(default_factory=Sum)
    infer: Sum = field(default_factory=Sum)
    encode: Sum = field(default_factory=Sum)
    cache_hit: Sum = field(default_factory=Sum)
    cache_miss: Sum = field(default_factory=Sum)
    bodies: dict[int, Sum] = field(default_factory=dict)
    last_unix_s: float = 0.0

    def answered(self, timings: Timings, unix_s: float) -> None:
        """Count one image that was answered by computing."""
        self.success.add(timings.total_s)
        self.queue.add(timings.queue_s)
        self.decode.add(timings.decode_s)
        self.infer.add(timings.trunk_s + timings.body_s)
        self.last_unix_s = unix_s

    def remembered(self, total_s: float, lookup_s: float) -> None:
        """Count one image that was answered from the cache."""
        self.success.add(total_s)
        self.cache_hit.add(lookup_s)

    def body_done(self, rows: int, seconds: float) -> None:
        """Count one batch whose body ran on ``rows`` images."""
        self.bodies.setdefault(rows, Sum()).add(seconds)
