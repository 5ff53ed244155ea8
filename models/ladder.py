"""The ladder: the ordered slices of one supernet. The only arithmetic on channels lives here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Slice:
    """One sub-network of a ladder.

    index    position in the ladder, 0 = narrowest.
    extents  one entry per sliceable dimension, in the order the architecture documents: channels
             per stage for a CNN, embedding width for a transformer, a keep ratio for token pruning.
             Only the architecture reads them; everything else passes the index.
    """

    index: int
    extents: tuple[int | float, ...]


Ladder = tuple[Slice, ...]


def make_divisible(value: float, divisor: int = 1, minimum: int | None = None) -> int:
    """Round a channel count to the nearest multiple of ``divisor``, never losing more than 10 %.

    Raises ValueError for a divisor below 1. With the default divisor this is ``int(value + 0.5)``,
    the squeeze-excite hidden size of the published DS-MBNet.
    """
    if divisor < 1:
        raise ValueError(f"divisor is {divisor}; it must be at least 1")
    floor = divisor if minimum is None else minimum
    rounded = max(floor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


def uniform_ladder(stage_widths: Sequence[Sequence[int]], fixed: Sequence[bool]) -> Ladder:
    """Build the "uniform" ladder: one index moves every routed stage at once.

    stage_widths  per stage its allowed channel counts, ascending.
    fixed         per stage: True where every slice uses the first (smallest) count.

    Raises ValueError when a list is not strictly ascending or routed stages differ in length.
    """
    for widths in stage_widths:
        if not widths or any(b <= a for a, b in pairwise(widths)) or widths[0] < 1:
            raise ValueError(f"stage widths {list(widths)} must be positive and strictly ascending")
    lengths = {len(w) for w, is_fixed in zip(stage_widths, fixed, strict=True) if not is_fixed}
    if len(lengths) != 1:
        raise ValueError(f"routed stages must list equally many widths, got lengths {sorted(lengths)}")
    return tuple(
        Slice(k, tuple(w[0] if is_fixed else w[k] for w, is_fixed in zip(stage_widths, fixed, strict=True)))
        for k in range(lengths.pop())
    )
