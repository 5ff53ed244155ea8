"""How long a batch takes. PURE: a measured table, and what it is corrected by while batches run."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Costs:
    """Worker seconds per image. trunk_s: trunk and gate. body_s: at every width, in ladder order.

    overhead_s  of the process beside its batches. Admission counts it, prices do not (docs/adr/0021).
    """

    trunk_s: float
    body_s: tuple[float, ...]
    overhead_s: float = 0.0


PAYS_RATIO = 0.95
"""A batch of twice the size makes its first images wait twice as long; it must save at least 5 % per image."""
HANDOVER_S = 5e-5
"""Of a batch beside the engine's time, when sizes are compared. Small networks are decided by it: without, a hundredth
more or less in what was measured halves their batches, for as long as the profile is kept. docs/adr/0019."""


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Measured seconds per batch. Raises ValueError unless every time is finite and above 0.

    seconds_by_batch  (queue, images in the batch) -> seconds, in which a queue is a ladder index for
                      the body at that width, or None for the trunk with its gate. The trunk and at
                      least one body are there, each with batch size 1. Copied, read-only.
    """

    seconds_by_batch: Mapping[tuple[int | None, int], float]
    _sizes_by_queue: Mapping[int | None, tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for (width, batch), seconds in self.seconds_by_batch.items():
            if batch < 1 or not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(
                    f"{_queue(width)} takes {seconds} s at {batch} images; allowed: finite seconds above 0, "
                    "batches of at least 1 image"
                )
        widths = {width for width, _ in self.seconds_by_batch}
        if None not in widths or len(widths) == 1:
            raise ValueError("a latency table needs the trunk and at least one body")
        for width in widths:
            if (width, 1) not in self.seconds_by_batch:
                raise ValueError(f"{_queue(width)} is not measured at a batch of 1 image")
        object.__setattr__(self, "seconds_by_batch", MappingProxyType(dict(self.seconds_by_batch)))
        sizes = {width: tuple(sorted(n for key, n in self.seconds_by_batch if key == width)) for width in widths}
        object.__setattr__(self, "_sizes_by_queue", MappingProxyType(sizes))

    def seconds(self, width: int | None, batch: int) -> float:
        """Seconds of one batch of at least 1 image; KeyError for a queue that was not measured.

        Between two measured sizes the time is interpolated linearly; beyond the largest, each image
        costs what it costs there.
        """
        if batch < 1:
            raise ValueError(f"a batch of {batch} images; allowed: at least 1")
        exact = self.seconds_by_batch.get((width, batch))
        if exact is not None:
            return exact
        sizes = self._sizes_by_queue[width]
        above = bisect_left(sizes, batch)
        below = sizes[above - 1]
        below_s = self.seconds_by_batch[width, below]
        if above == len(sizes):
            return below_s / below * batch
        above_s = self.seconds_by_batch[width, sizes[above]]
        return below_s + (above_s - below_s) * (batch - below) / (sizes[above] - below)

    def best_batch(self, width: int | None) -> int:
        """The largest measured batch size, up from 1, that saves enough per image over the one before."""
        return _largest_that_pays({size: self.seconds(width, size) for size in self._sizes_by_queue[width]})

    def best_whole_batch(self, width: int) -> int:
        """The same for a trunk and the body at ``width`` behind it, run as one."""
        sizes = sorted({*self._sizes_by_queue[None], *self._sizes_by_queue[width]})
        return _largest_that_pays({size: self.seconds(None, size) + self.seconds(width, size) for size in sizes})

    @property
    def widths(self) -> tuple[int, ...]:
        """The bodies that were measured, ascending."""
        return tuple(sorted({width for width, _ in self.seconds_by_batch if width is not None}))

    def image_seconds(self, width: int) -> float:
        """Seconds of one image alone: the trunk, then the body at ``width``."""
        return self.seconds_by_batch[None, 1] + self.seconds_by_batch[width, 1]


MEMORY_BATCHES = 50.0
"""A correction follows about so many of the last batches of its queue."""
MEMORY_S = 20.0
"""And forgets them after about so long, so that a bad moment cannot keep images away for ever."""
PRIOR_BATCHES = 2.0
"""How many batches the table is worth."""
LEAST_SHARE, MOST_SHARE = 0.25, 8.0
"""Of the table's time: no batch that was measured counts for less or more, whatever stopped the machine."""


@dataclass(slots=True)
class _Correction:
    """Least squares of ``a n + b`` for what one queue's batches took beyond the table, forgetting exponentially.

    scale  largest usual n; the fit works with n / scale. Sums are those of weight, n, n^2, excess, n * excess.
    """

    scale: float
    at_s: float = 0.0
    weight: float = 0.0
    n: float = 0.0
    nn: float = 0.0
    excess: float = 0.0
    n_excess: float = 0.0
    squares: float = 0.0
    a: float = 0.0
    b: float = 0.0

    def learn(self, images: int, excess_s: float, now_s: float) -> None:
        n, error_s = images / self.scale, excess_s - self.of(images)
        self._fade((1.0 - 1.0 / MEMORY_BATCHES) * math.exp(min(0.0, self.at_s - now_s) / MEMORY_S))
        self.at_s = now_s
        self.weight += 1.0
        self.n += n
        self.nn += n * n
        self.excess += excess_s
        self.n_excess += n * excess_s
        self.squares += error_s * error_s
        self.solve()

    def of(self, images: int) -> float:
        return self.a * images / self.scale + self.b

    def age(self, now_s: float) -> None:
        """Fall back towards the table while nothing is learnt."""
        if now_s - self.at_s > 1.0 and self.weight:
            self._fade(math.exp((self.at_s - now_s) / MEMORY_S))
            self.at_s = now_s
            self.solve()

    def _fade(self, share: float) -> None:
        self.weight *= share
        self.n *= share
        self.nn *= share
        self.excess *= share
        self.n_excess *= share
        self.squares *= share

    def solve(self) -> None:
        nn, ones = self.nn + PRIOR_BATCHES, self.weight + PRIOR_BATCHES
        determinant = nn * ones - self.n * self.n
        self.a = (self.n_excess * ones - self.n * self.excess) / determinant
        self.b = (nn * self.excess - self.n * self.n_excess) / determinant


class LiveTimes:
    """The table, corrected per queue by ``a n + b`` from the batches that ran. Not thread-safe.

    Plans ask far more often than batches end, so answers are kept until their queue learns or ages.

    overhead  of images on the workers' cores; None where it takes nothing from the workers.
    """

    def __init__(self, table: LatencyTable, overhead: Overhead | None = None) -> None:
        self.table, self._overhead, self._overhead_s = table, overhead, 0.0
        queues = {width for width, _ in table.seconds_by_batch}
        self._widths, self._best_batches = table.widths, {queue: table.best_batch(queue) for queue in queues}
        self._corrections = {queue: _Correction(float(images)) for queue, images in self._best_batches.items()}
        self._table_s: dict[int | None, dict[int, float]] = {queue: {} for queue in queues}
        self._seconds: dict[int | None, dict[int, float]] = {queue: {} for queue in queues}
        self._alone_s: dict[int | None, float] = {}

    def learn(self, width: int | None, images: int, seconds: float, now_s: float) -> None:
        """A batch of a queue has taken so long. Batches that failed are not to be told."""
        expected_s = self._measured_s(width, images)
        seconds = min(max(seconds, LEAST_SHARE * expected_s), MOST_SHARE * expected_s)
        self._corrections[width].learn(images, seconds - expected_s, now_s)
        self._forget(width)

    def age(self, now_s: float) -> None:
        """Let old batches fade, and look up the overhead; to be called now and then, also when nothing runs."""
        self._overhead_s = 0.0 if self._overhead is None else self._overhead.per_image_s(now_s)
        for queue, correction in self._corrections.items():
            correction.age(now_s)
            self._forget(queue)

    def seconds(self, width: int | None, batch: int) -> float:
        """Of one batch of so many images, expected; never below ``LEAST_SHARE`` of the table's."""
        known = self._seconds[width]
        seconds = known.get(batch)
        if seconds is None:
            measured_s = self._measured_s(width, batch)
            seconds = max(measured_s + self._corrections[width].of(batch), LEAST_SHARE * measured_s)
            known[batch] = seconds
        return seconds

    def _measured_s(self, width: int | None, batch: int) -> float:
        """Of the table, which stays as it is."""
        known = self._table_s[width]
        seconds = known.get(batch)
        if seconds is None:
            seconds = known[batch] = self.table.seconds(width, batch)
        return seconds

    def alone_s(self, width: int) -> float:
        """Seconds in which one image's body is as good as surely done: those expected, and their spread."""
        alone_s = self._alone_s.get(width)
        if alone_s is None:
            alone_s = self._alone_s[width] = self.seconds(width, 1) + self.spread_s(width)
        return alone_s

    def spread_s(self, width: int | None) -> float:
        """Root mean square of what recent batches were off."""
        correction = self._corrections[width]
        return math.sqrt(correction.squares / (correction.weight + PRIOR_BATCHES))

    def costs(self) -> Costs:
        """Seconds per image where batches are as large as pays."""
        trunk = self._best_batches[None]
        trunk_s = self.seconds(None, trunk) / trunk
        batches = [(width, self._best_batches[width]) for width in self._widths]
        body_s = tuple([self.seconds(width, images) / images for width, images in batches])
        return Costs(trunk_s, body_s, min(self._overhead_s, trunk_s + body_s[-1]))

    def _forget(self, queue: int | None) -> None:
        self._seconds[queue].clear()
        self._alone_s.pop(queue, None)


OVERHEAD_WINDOW_S, OVERHEAD_IMAGES = 0.25, 20
"""How long is counted for one figure, and how many images it takes: among fewer, work that has nothing to do with them
would be shared out."""
OVERHEAD_SHARE = 0.25
"""Of the newest figure in the estimate."""
OVERHEAD_MEMORY_S = 1.0
"""Without a figure it is forgotten, so that a bad moment cannot keep images away for ever."""


@dataclass(slots=True)
class Overhead:
    """What images cost this process beside their batches: HTTP, decoding, hand-overs. One for all its models.

    Where workers have every core, that time is taken from theirs: partly from batches, which take longer for it and
    are learnt as they are, partly between them. It is counted in full all the same (docs/adr/0014).
    Not counted is what other processes take. Who is turned away has a share in it, too: else a few answers would bear
    what many refusals cost, and would be refused for it.
    """

    _per_image_s: float = 0.0  # now and then below 0: a batch counts when it ends
    _began_s: float = -math.inf
    _began_cpu_s: float = 0.0
    _batches_cpu_s: float = 0.0
    _images: int = 0

    def worked(self, cpu_s: float, images: int) -> None:
        """A batch has kept a worker busy so long, and was the last one of so many images."""
        self._batches_cpu_s += cpu_s
        self._images += images

    def turned_away(self) -> None:
        """An image was refused or dropped: no batch counts it."""
        self._images += 1

    def learn(self, now_s: float, process_cpu_s: float) -> None:
        """process_cpu_s: CPU time of all threads since the process began."""
        window_s = now_s - self._began_s
        if window_s < OVERHEAD_WINDOW_S:
            return
        if self._images >= OVERHEAD_IMAGES and window_s < OVERHEAD_MEMORY_S:
            newest_s = (process_cpu_s - self._began_cpu_s - self._batches_cpu_s) / self._images
            self._per_image_s += OVERHEAD_SHARE * (newest_s - self._per_image_s)
        else:
            self._per_image_s = 0.0
        self._began_s, self._began_cpu_s = now_s, process_cpu_s
        self._batches_cpu_s, self._images = 0.0, 0

    def per_image_s(self, now_s: float) -> float:
        """CPU seconds, smoothed; 0 where little happens."""
        return max(0.0, self._per_image_s) if now_s - self._began_s < OVERHEAD_MEMORY_S else 0.0


DELAY_MEMORY = 64.0
"""A delay follows about so many of the last."""
DELAY_DEVIATIONS = 2.0
DELAY_MEMORY_S = 0.5
"""And forgets them after about so long, so that a bad moment cannot keep images away for ever: who is refused teaches
nothing."""


@dataclass(slots=True)
class Delay:
    """How long the event loop keeps something waiting, which has others to serve as well.

    Mean and mean deviation, smoothed as TCP does for its round trips (RFC 6298 section 2); one after a pause counts for
    more.
    """

    mean_s: float = 0.0
    deviation_s: float = 0.0
    at_s: float = math.inf  # that of the last; none yet

    def learn(self, delay_s: float, now_s: float) -> None:
        fresh = 1.0 - (1.0 - 1.0 / DELAY_MEMORY) * self._fade(now_s)
        self.mean_s += fresh * (delay_s - self.mean_s)
        self.deviation_s += fresh * (abs(delay_s - self.mean_s) - self.deviation_s)
        self.at_s = now_s

    def expected_s(self, now_s: float) -> float:
        """What the next is expected to wait."""
        return self._fade(now_s) * self.mean_s

    def allowance_s(self, now_s: float) -> float:
        """What to keep free for it, so that few wait longer."""
        return self._fade(now_s) * (self.mean_s + DELAY_DEVIATIONS * self.deviation_s)

    def _fade(self, now_s: float) -> float:
        return math.exp(min(0.0, self.at_s - now_s) / DELAY_MEMORY_S)


def per_image_s(seconds: float, images: int) -> float:
    """Of a batch that keeps the engine so long, to compare sizes by."""
    return (seconds + HANDOVER_S) / images


def _largest_that_pays(seconds_by_size: Mapping[int, float]) -> int:
    best, *larger = sorted(seconds_by_size)
    for size in larger:
        if per_image_s(seconds_by_size[size], size) > PAYS_RATIO * per_image_s(seconds_by_size[best], best):
            break
        best = size
    return best


def _queue(width: int | None) -> str:
    return "the trunk" if width is None else f"the body at width {width}"
