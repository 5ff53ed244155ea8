"""What a caller hands to the batcher, gets from it, and waits for in between."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

from service.engine.base import F32, Image
from service.errors import SlicewiseError
from service.request import Entry, Route, Window


@dataclass(frozen=True, slots=True)
class Order:
    """One image to classify, and what routing needs.

    deadline_s  monotonic: when the caller is told that it is too late; inf without one.
    done_by_s   when its batch has to be done for the answer to be in time. due_s orders the queues.
    place       as the scheduler expects it; the batcher sees to it that it is given back.
    spend       is told what was computed for the image, in MAdds, also when that is after its answer.
    """

    image: Image
    window: Window
    arrived_s: float
    due_s: float
    done_by_s: float = math.inf
    deadline_s: float = math.inf
    urgency: int = 3
    place: int = -1
    spend: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the batcher returns: class logits [K], gate logits [G] or None, and where the time went.

    done_s  monotonic, since when it could have left: when its last batch was done, as a rule.
    """

    logits_K: F32
    gate_logits_G: F32 | None
    route: Route
    queue_s: float
    trunk_s: float
    body_s: float
    done_s: float


class Ticket:
    """The promise of one entry: its future, whether a worker holds it now, and who pays for it.

    answered  the entry as it goes on behind an early exit that has answered it; None as long as there is no answer.
    """

    __slots__ = ("answered", "future", "running", "spend")

    def __init__(self, future: asyncio.Future[Outcome], spend: Callable[[int], None] | None) -> None:
        self.future, self.running, self.spend = future, False, spend
        self.answered: Entry | None = None

    def done(self) -> bool:
        return self.future.done()

    def charge(self, madds: int) -> None:
        """Tell who pays what was computed."""
        if madds and self.spend is not None:
            self.spend(madds)

    def keep(self, outcome: Outcome) -> None:
        """Answer, unless that has been done or the caller has gone."""
        if not self.done():
            self.future.set_result(outcome)

    def refuse(self, error: SlicewiseError) -> None:
        """Likewise, with an error."""
        if not self.done():
            self.future.set_exception(error)


def ticket_of(entry: Entry) -> Ticket:
    """The promise of an entry that the batcher has made."""
    assert isinstance(entry.promise, Ticket), "submit makes the tickets: this is a bug"
    return entry.promise
