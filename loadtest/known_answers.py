"""PURE: answers that are known beforehand, so that a wrong one is seen.

Known is what each image gives at each slice, asked for with forced slices. Only images are used whose answers differ
from each other's, at every slice, by far more than the same image's do from batch to batch: an answer that belongs to
another image cannot pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum

from loadtest.outcomes import NOT_SENT, Exchange

Probabilities = Mapping[str, float]
"""Of every class, by its label."""
Known = Mapping[int, Probabilities]
"""What one image gives, by slice."""

TOLERANCE = 1e-3
"""Most by which a probability may differ from the known one: other batches, other order of additions."""
APART = 20 * TOLERANCE
"""Least by which some probability of two images differs, at every slice."""


class Ending(StrEnum):
    """How a request ended. RIGHT and WRONG: 200 with the known answer, or with another. HUNG: no end in time."""

    RIGHT = "right"
    WRONG = "wrong"
    CLIENT_ERROR = "4xx"
    REFUSED = "429 or 503"
    EXPIRED = "504"
    SERVER_ERROR = "500"
    CUT = "cut"
    HUNG = "hung"
    NOT_SENT = "not sent"


_OF_STATUS = {429: Ending.REFUSED, 503: Ending.REFUSED, 504: Ending.EXPIRED}
_OF_FAILURE = {NOT_SENT: Ending.NOT_SENT, "TimeoutError": Ending.HUNG}


def ending(exchange: Exchange, known: Known | None) -> Ending:
    """How it ended. known: of the image that was sent; None for one whose answer, if any, is not looked at."""
    if exchange.status == 200:
        return Ending.RIGHT if known is None or is_right(exchange.body, known) else Ending.WRONG
    if not exchange.status:
        return _OF_FAILURE.get(exchange.failure, Ending.CUT)
    if exchange.status in _OF_STATUS:
        return _OF_STATUS[exchange.status]
    return Ending.CLIENT_ERROR if exchange.status < 500 else Ending.SERVER_ERROR


def is_right(body: bytes, known: Known) -> bool:
    """Whether a one-image answer, of all classes, is the known one at the slice that it names."""
    try:
        return item_is_right(json.loads(body), known)
    except ValueError:
        return False


def item_is_right(said: object, known: Known) -> bool:
    """The same of a parsed answer, or of one item of a batch's."""
    try:
        width, found = said["slice"]["width"], probabilities(said)  # type: ignore[index]
    except (KeyError, TypeError):
        return False
    expected = known.get(width)
    return expected is not None and distance(found, expected) <= TOLERANCE


def probabilities(said: object) -> dict[str, float]:
    """Of every class in an answer. Raises KeyError and TypeError for what is none."""
    return {each["label"]: float(each["probability"]) for each in said["predictions"]}  # type: ignore[index]


def distance(a: Probabilities, b: Probabilities) -> float:
    """Largest difference of a probability; infinite for other classes."""
    if a.keys() != b.keys():
        return float("inf")
    return max((abs(value - b[label]) for label, value in a.items()), default=0.0)


def distinct(answers: Sequence[Known], most: int) -> list[int]:
    """Places of up to ``most`` images whose answers lie ``APART`` from each other's at every slice, in order."""
    chosen: list[int] = []
    for place, candidate in enumerate(answers):
        if len(chosen) == most:
            break
        if all(_apart(candidate, answers[other]) for other in chosen):
            chosen.append(place)
    return chosen


def _apart(a: Known, b: Known) -> bool:
    return all(distance(answer, b[width]) >= APART for width, answer in a.items())
