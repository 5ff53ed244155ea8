"""What tests of scheduling have in common."""

import math
from dataclasses import dataclass, replace

from service.latency import LatencyTable, LiveTimes
from service.policies import FREE, TOP, Gate, GateSlack
from service.request import Entry, Look, Window
from service.scheduler import Scheduler

WIDTHS = 3


def table(trunk_s=1.0, bodies_s=(1.0, 2.0, 4.0), batch=2):
    """Seconds grow with the images, but those beyond the first cost a tenth less, up to ``batch``."""
    seconds = {}
    for width, one_s in ((None, trunk_s), *enumerate(bodies_s)):
        for images in {1, batch}:
            seconds[width, images] = one_s * (1 + 0.9 * (images - 1))
    return LatencyTable(seconds)


def times(**kwargs):
    return LiveTimes(table(**kwargs))


@dataclass
class Caller:
    """A promise that a test can abandon."""

    gone: bool = False

    def done(self) -> bool:
        return self.gone


def look(wish, widths=None, best=None):
    """The gate's wish, kept at every price but the top one, or these widths: at no price, and at all others."""
    free, pressed = widths or (wish, wish)
    return Look(wish, (free, *(pressed,) * (TOP - 1), 0), wish if best is None else best)


def push(scheduler: Scheduler, now_s=0.0, **fields) -> Entry:
    """Expect and push an image; one with a look goes through its trunk on the way."""
    entry = make_entry(**fields)
    place = scheduler.expect(now_s, entry.due_s, entry.deadline_s < math.inf, entry.window)
    entry = replace(entry, place=place)
    scheduler.push(entry)
    return entry


def make_entry(due_s=100.0, deadline_s=math.inf, window=None, caller=None, **fields):
    """look: what the gate made of it, for an image that waits for its body."""
    window = window or Window(0, WIDTHS - 1)
    return Entry(
        caller or Caller(), fields.pop("name", None), window, 0.0, min(due_s, deadline_s), 0.0, deadline_s, **fields
    )


def scheduler(policy=None, workers=1, headroom=1.0, has_exit=False, **table):
    live = times(**table)
    return Scheduler((policy or (lambda _: Gate()))(live), live, workers, headroom, has_exit=has_exit)


def slack(live):
    return GateSlack((0, 1, 2), live, None, FREE)
