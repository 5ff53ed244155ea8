"""PURE: what became of the requests of a fault scenario, what was expected of them, and the records kept of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from loadtest.checks import Check, Setting, at_most, equal, verdict
from loadtest.corpus import EncodedImage
from loadtest.figures import percentile
from loadtest.known_answers import Ending, Known, ending
from loadtest.outcomes import Exchange
from loadtest.server_state import State

GOOD = "image"
"""Kind of the requests that nothing is wrong with."""
MEMORY_SHARE = 0.05
"""Most by which the memory may lie above its level before the load."""
_SHOWN_UNEXPECTED = 5


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a load, and what is expected of it.

    known     what its image gives; None for an image whose answer is not looked at.
    statuses  that it may be answered with whatever happens; 200 has to be right as well.
    """

    at_s: float
    image: EncodedImage
    known: Known | None
    kind: str = GOOD
    statuses: tuple[int, ...] = (200,)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Allowance:
    """Endings that good requests may have as well when they are due in [from_s, to_s)."""

    endings: frozenset[Ending]
    from_s: float
    to_s: float

    def covers(self, at_s: float, found: Ending) -> bool:
        return self.from_s <= at_s < self.to_s and found in self.endings


@dataclass(frozen=True, slots=True)
class Done:
    """Something that was done to the server: when it began and ended, in s from the start of the load."""

    title: str
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Counts:
    """The requests of one load.

    endings     of the good ones, by ending. kinds: of all, by kind and then by status or ending without one.
    allowed     good ones that failed in a way that was allowed just then.
    unexpected  requests whose ending was not: the first few, in words, and how many.
    slowest_ms  of all answers. p50_ms, p99_ms: of right ones due before, during and after the fault.
    """

    requests: int
    endings: dict[str, int]
    kinds: dict[str, dict[str, int]]
    allowed: int
    unexpected: int
    unexpected_shown: tuple[str, ...]
    slowest_ms: float | None
    p50_ms: tuple[float | None, float | None, float | None]
    p99_ms: tuple[float | None, float | None, float | None]

    def of(self, wanted: Ending) -> int:
        return self.endings.get(wanted.value, 0)


def count(
    requests: Sequence[Request],
    exchanges: Sequence[Exchange],
    allowances: Sequence[Allowance],
    fault_s: tuple[float, float],
) -> Counts:
    """Judge every request. fault_s: from when to when the fault lasted, for the latencies."""
    endings: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    unexpected: list[str] = []
    latencies_ms: tuple[list[float], list[float], list[float]] = ([], [], [])
    allowed, slowest_ms = 0, None
    for request, exchange in zip(requests, exchanges, strict=True):
        found = ending(exchange, request.known)
        kinds[request.kind][str(exchange.status) if exchange.status else found.value] += 1
        if request.kind == GOOD:
            endings[found.value] += 1
        if exchange.latency_s is not None:
            slowest_ms = max(slowest_ms or 0.0, exchange.latency_s * 1e3)
            if found is Ending.RIGHT:
                latencies_ms[_phase(request.at_s, fault_s)].append(exchange.latency_s * 1e3)
        if exchange.status in request.statuses and found is not Ending.WRONG:
            continue
        if request.kind == GOOD and any(each.covers(request.at_s, found) for each in allowances):
            allowed += 1
        else:
            unexpected.append(_told(request, exchange, found))
    return Counts(
        len(requests), dict(sorted(endings.items())), {kind: dict(sorted(c.items())) for kind, c in kinds.items()},
        allowed, len(unexpected), tuple(unexpected[:_SHOWN_UNEXPECTED]), slowest_ms,
        _percentiles(latencies_ms, 50), _percentiles(latencies_ms, 99),
    )  # fmt: skip


def _phase(at_s: float, fault_s: tuple[float, float]) -> int:
    return (at_s >= fault_s[0]) + (at_s >= fault_s[1])


def _percentiles(
    values: tuple[list[float], list[float], list[float]], percent: float
) -> tuple[float | None, float | None, float | None]:
    before, during, after = (percentile(each, percent) if each else None for each in values)
    return before, during, after


def _told(request: Request, exchange: Exchange, found: Ending) -> str:
    how = exchange.failure or f"{exchange.status} {exchange.body[:160].decode(errors='replace')}"
    return f"{request.kind} at {request.at_s:.3f} s: {found.value}, {how}"


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a scenario is judged by. Absent where the server was meant to end.

    before, after  what it held on to, idle, before and after the load; peak_bytes: most memory meanwhile.
    places         images of a request for as many as the queue has places, that were answered right after the load.
    capacity       how many that were.
    injected       images that were made to fail.
    """

    counts: Counts
    before: State
    after: State | None
    peak_bytes: int
    places: int
    capacity: int
    injected: int = 0


def common_checks(evidence: Evidence, limit_s: float) -> list[Check]:
    """The bars of every scenario."""
    counts, before, after = evidence.counts, evidence.before, evidence.after
    checks = [
        equal("wrong answers", counts.of(Ending.WRONG), 0),
        equal(f"requests without an end within {limit_s:g} s", _hung(counts), 0),
        equal("requests with an end that nothing explains", counts.unexpected, 0),
        equal("requests that the generator did not send", counts.of(Ending.NOT_SENT), 0),
        equal("images answered 500, as many as were made to fail", _status(counts, "500"), evidence.injected),
    ]
    if after is not None:
        checks += [
            equal("images in the queues after the load", after.queued, 0),
            equal("requests in flight after the load", after.in_flight, 0),
            equal("places of the queue that are free after it", evidence.places, evidence.capacity),
            at_most("open descriptors after it", after.descriptors, before.descriptors),
            at_most(
                "memory after it, of that before", after.resident_bytes / before.resident_bytes, 1 + MEMORY_SHARE
            ),
        ]  # fmt: skip
    return checks


def _hung(counts: Counts) -> int:
    return sum(found.get(Ending.HUNG.value, 0) for found in counts.kinds.values())


def _status(counts: Counts, status: str) -> int:
    return sum(found.get(status, 0) for found in counts.kinds.values())


@dataclass(frozen=True, slots=True)
class ScenarioRecord:
    """One scenario as it went. facts: what else was seen, by name. done: what was done to the server."""

    name: str
    title: str
    evidence: Evidence
    done: tuple[Done, ...]
    facts: dict[str, str]
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> str:
        return verdict(self.checks)


@dataclass(frozen=True, slots=True)
class FaultsRecord:
    """A whole run. capacity_per_s: images/s of a closed loop; rate_per_s: of the open load; seconds: of each load.

    images: how many different ones, whose answers are known.
    """

    setting: Setting
    model: str
    capacity_per_s: float
    is_measured: bool
    rate_per_s: float
    seconds: float
    limit_s: float
    images: int
    scenarios: tuple[ScenarioRecord, ...]

    @property
    def held(self) -> bool:
        return all(check.held for scenario in self.scenarios for check in scenario.checks)

    def with_scenario(self, record: ScenarioRecord) -> FaultsRecord:
        """These and one more."""
        return replace(self, scenarios=(*self.scenarios, record))

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        draft = path.with_suffix(".partial")
        draft.write_bytes(_ADAPTER.dump_json(self, indent=1) + b"\n")
        draft.replace(path)

    @staticmethod
    def load(path: Path) -> FaultsRecord:
        """Read what ``save`` wrote; ValueError names the file and what is wrong with it."""
        try:
            return _ADAPTER.validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{path}: not a result of slicewise-load faults: {error}") from error


_ADAPTER = TypeAdapter(FaultsRecord)
