"""Python's garbage collector, kept away from what a warm service holds for good."""

from __future__ import annotations

import gc


def settle() -> None:
    """Drop what is unreachable, and leave what is in use out of all later rounds of the garbage collector.

    A full round over libraries, graphs and checkpoints, hundreds of thousands of objects, stops every thread for more
    than a tenth of a second, and comes every few ten thousand requests. To be called when a model has come or gone:
    only then is there anything of that kind to collect. Takes as long as such a round itself.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
