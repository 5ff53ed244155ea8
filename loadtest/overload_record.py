"""PURE: ten times the load that a server can bear, for minutes: what it answered, and what it held on to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.figures import percentile
from loadtest.server_state import Sample
from loadtest.tables import table

LOAD_RATIO = 10.0
GROWTH_SHARE = 0.05
"""Memory may move so much from the second fifth of the load to the last: what grows with time does not stop there."""
LEAST_SHARE = 0.5
"""Of the capacity, what is to be answered all the same; the load takes the same cores."""
_FIFTHS = 5
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Overload:
    """One load, in parts with short pauses between them. Rates in images/s.

    seconds       from the first request to the end of the last part; load_s: of them, those under load.
    queue_images  that the server admits at most; samples: of the server, about one a second.
    statuses      requests by HTTP status; 0 without an answer.
    """

    model: str
    capacity_per_s: float
    rate_per_s: float
    seconds: float
    load_s: float
    queue_images: int
    statuses: dict[int, int]
    late_sends: int
    samples: tuple[Sample, ...]

    @property
    def sent(self) -> int:
        return sum(self.statuses.values())

    def memory_bytes(self, fifth: int) -> float:
        """Median over one fifth of the load, counted from 0."""
        length_s = self.seconds / _FIFTHS
        within = [s.resident_bytes for s in self.samples if fifth * length_s <= s.at_s < (fifth + 1) * length_s]
        return percentile(within, 50)

    @property
    def growth(self) -> float:
        return self.memory_bytes(_FIFTHS - 1) / self.memory_bytes(1) - 1

    @property
    def held(self) -> bool:
        """Whether memory stayed, it was an overload, and what could be answered was."""
        answered_per_s = self.statuses.get(200, 0) / self.load_s
        is_overload = self.statuses.get(503, 0) + self.statuses.get(504, 0) > 0
        is_served = answered_per_s >= LEAST_SHARE * self.capacity_per_s
        return self.growth <= GROWTH_SHARE and set(self.statuses) <= {200, 503, 504} and is_overload and is_served


def overload_lines(found: Overload) -> list[str]:
    """What a report says of it."""
    largest = max(sample.resident_bytes for sample in found.samples)
    shown = [*_statuses(found.statuses), f"{found.late_sends:,}"]
    return [
        f"{found.model} at its widest slice on one worker answers {found.capacity_per_s:.0f} images/s. For "
        f"{found.load_s:.0f} s, within {found.seconds:.0f}, it was sent {found.sent / found.load_s:.0f} images/s, "
        f"{found.rate_per_s:.0f} intended, at equal gaps; {found.queue_images} places in its queue.",
        "",
        *table([*(_name(status) for status in sorted(found.statuses)), "sent over 1 ms late"], [shown]),
        "",
        *table(
            ["resident memory, MiB", *(f"fifth {fifth + 1}" for fifth in range(_FIFTHS)), "most"],
            [["median", *(f"{found.memory_bytes(f) / _MIB:.0f}" for f in range(_FIFTHS)), f"{largest / _MIB:.0f}"]],
        ),
        "",
        f"From the second fifth to the last {found.growth:+.2%}; at most {GROWTH_SHARE:+.0%}, no answer but 200, "
        f"503 and 504, refusals among them, and at least {LEAST_SHARE:.0%} of the capacity answered: "
        f"{'met' if found.held else '**missed**'}.",
    ]


def _statuses(statuses: dict[int, int]) -> Sequence[str]:
    return [f"{statuses[status]:,}" for status in sorted(statuses)]


def _name(status: int) -> str:
    return str(status) if status else "no answer"
