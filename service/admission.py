"""May this image enter? PURE: the words of a refusal, and when to come back.

Whether it would be in time is the scheduler's to say; it prices what waits at the narrowest slices, the
least that it can cost, so that an image is refused only when nothing could save it.
"""

from __future__ import annotations

from typing import NoReturn

from service.errors import DeadlineExceededError, QueueFullError
from service.request import Window

MIN_RETRY_AFTER_S = 1.0
"""Retry-After is whole seconds on the wire, so nothing shorter can be said."""


def check_room(queued_images: int, capacity_images: int, arriving: int, retry_s: float) -> None:
    """Return when ``arriving`` more images fit beside those admitted; they enter together or not at all.

    Raises QueueFullError, which tells the client to come back after ``retry_s`` seconds.
    """
    if queued_images + arriving > capacity_images:
        raise QueueFullError(
            f"{queued_images} images are in work and {arriving} arrive; allowed: {capacity_images} images at once",
            retry_s,
        )


def retry_after_s(queued: int, narrowest_s: float, workers: int) -> float:
    """Seconds until ``queued`` images are done if none is wider than the narrowest slice; at least 1.

    narrowest_s  seconds of one image through trunk and narrowest body, alone.
    """
    return max(MIN_RETRY_AFTER_S, queued * narrowest_s / workers)


def refuse_deadline(now_s: float, deadline_s: float, finish_s: float, window: Window, waiting: int) -> NoReturn:
    """Raise DeadlineExceededError with the outcome ``refused``.

    finish_s  the predicted end at the narrowest slice that the request allows; before the deadline, when the
              image could only be in time by making others late.
    """
    left_ms, finish_ms = max(0.0, deadline_s - now_s) * 1e3, (finish_s - now_s) * 1e3
    width = window.lo if window.forced is None else window.forced
    raise DeadlineExceededError(
        f"{left_ms:.1f} ms are left of the latency budget; predicted: {finish_ms:.1f} ms at slice {width} with "
        f"{waiting} images waiting" + (", some of them promised to be in time" if finish_s <= deadline_s else ""),
        "refused",
    )
