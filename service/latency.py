"""How long a batch takes. PURE: a measured table, read by routing, admission and batch formation."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

PAYS_RATIO = 0.97
"""A larger batch makes its first images wait; it must save at least 3 % per image."""


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Measured seconds per batch. Raises ValueError unless every time is finite and above 0.

    seconds_by_batch  (queue, images in the batch) -> seconds, in which a queue is a ladder index for
                      the body at that width, or None for the trunk with its gate. The trunk and at
                      least one body are there, each with batch size 1. Copied, read-only.
    """

    seconds_by_batch: Mapping[tuple[int | None, int], float]

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
        sizes = self._sizes(width)
        above = bisect_left(sizes, batch)
        below = sizes[above - 1]
        below_s = self.seconds_by_batch[width, below]
        if above == len(sizes):
            return below_s / below * batch
        above_s = self.seconds_by_batch[width, sizes[above]]
        return below_s + (above_s - below_s) * (batch - below) / (sizes[above] - below)

    def best_batch(self, width: int | None) -> int:
        """The smallest measured batch size within ``PAYS_RATIO`` of the least seconds per image."""
        return _smallest_that_pays({size: self.seconds(width, size) for size in self._sizes(width)})

    def best_whole_batch(self, width: int) -> int:
        """The same for a trunk and the body at ``width`` behind it, run as one."""
        sizes = sorted({*self._sizes(None), *self._sizes(width)})
        return _smallest_that_pays({size: self.seconds(None, size) + self.seconds(width, size) for size in sizes})

    def image_seconds(self, width: int) -> float:
        """Seconds of one image alone: the trunk, then the body at ``width``."""
        return self.seconds_by_batch[None, 1] + self.seconds_by_batch[width, 1]

    def _sizes(self, width: int | None) -> list[int]:
        """The measured batch sizes of a queue, ascending."""
        sizes = sorted(batch for key, batch in self.seconds_by_batch if key == width)
        if not sizes:
            raise KeyError(width)
        return sizes


def _smallest_that_pays(seconds_by_size: Mapping[int, float]) -> int:
    per_image_s = {size: seconds / size for size, seconds in seconds_by_size.items()}
    least_s = min(per_image_s.values())
    return next(size for size, seconds in per_image_s.items() if seconds * PAYS_RATIO <= least_s)


def _queue(width: int | None) -> str:
    return "the trunk" if width is None else f"the body at width {width}"
