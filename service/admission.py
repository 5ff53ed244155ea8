"""May this image enter? PURE: decided from the backlog and the latency table, before anything is queued.

The backlog is priced at the narrowest slice, the least that the images ahead can cost, so an image
is refused only when nothing could save it.
"""

from __future__ import annotations

from service.errors import DeadlineExceededError, QueueFullError
from service.latency import LatencyTable

MIN_RETRY_AFTER_S = 1.0
"""Retry-After is whole seconds on the wire, so nothing shorter can be said."""


def admit(queued_images: int, capacity_images: int, arriving: int, retry_s: float) -> None:
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
    return max(MIN_RETRY_AFTER_S, _backlog_s(queued, narrowest_s, workers))


def predicted_finish_s(now_s: float, queued: int, table: LatencyTable, width: int, workers: int) -> float:
    """The earliest instant at which an image that enters now is answered at ``width``, ``queued`` being ahead."""
    return now_s + _backlog_s(queued, table.image_seconds(0), workers) + table.image_seconds(width)


def check_deadline(now_s: float, deadline_s: float, queued: int, table: LatencyTable, width: int, workers: int) -> None:
    """Return when an image can be answered at ``width`` by ``deadline_s``, an instant on the clock of ``now_s``.

    width    the narrowest slice that the request allows, or the forced one.
    queued   images admitted before it and not answered yet.
    workers  batches that run at once.

    Raises DeadlineExceededError with the outcome ``refused``.
    """
    finish_s = predicted_finish_s(now_s, queued, table, width, workers)
    if finish_s > deadline_s:
        raise DeadlineExceededError(
            f"{max(0.0, deadline_s - now_s) * 1e3:.1f} ms are left of the latency budget; predicted: at least "
            f"{(finish_s - now_s) * 1e3:.1f} ms at slice {width} with {queued} images ahead",
            "refused",
        )


def _backlog_s(queued: int, narrowest_s: float, workers: int) -> float:
    return queued * narrowest_s / workers
