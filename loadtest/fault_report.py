"""PURE: the report of the fault scenarios. Every number comes from the record; none is written here."""

from __future__ import annotations

from collections.abc import Iterable

from loadtest.checks import check_table
from loadtest.fault_record import GOOD, MEMORY_SHARE, Counts, FaultsRecord, ScenarioRecord
from loadtest.known_answers import TOLERANCE, Ending
from loadtest.tables import table

_MIB = 2**20
_NOTHING = "-"


def markdown(record: FaultsRecord) -> str:
    """The report of one run."""
    lines = ["# Faults", "", *record.setting.lines(), "", *_method(record), ""]
    lines += ["## Requests", "", *_requests(record.scenarios), "", "## The server", "", *_server(record.scenarios), ""]
    for scenario in record.scenarios:
        lines += [f"## {scenario.name}: {scenario.title}", "", *_told(scenario), "", *check_table(scenario.checks), ""]
    return "\n".join(lines)


def _method(record: FaultsRecord) -> list[str]:
    source = "measured in this run with a closed loop" if record.is_measured else "given"
    return [
        f"{record.model}. Each scenario has a server of its own and an open load of {record.rate_per_s:.0f} requests/s "
        f"for {record.seconds:g} s, on the same machine as the load; capacity {record.capacity_per_s:.0f} images/s, "
        f"{source}. {record.images} different images whose answers at every slice were asked for beforehand; an answer "
        f"is right when no probability is more than {TOLERANCE:g} off. A request without an end within "
        f"{record.limit_s:g} s counts as hung. Allowed: what a scenario says of requests that its fault hits, such as "
        f"broken connections while the server is dead; anything else is unexpected. Memory has to come back to at most "
        f"{MEMORY_SHARE:.0%} above its level before the load. The places of the queue are free when one request for as "
        f"many images as it has places is answered in full.",
    ]  # fmt: skip


def _requests(scenarios: Iterable[ScenarioRecord]) -> list[str]:
    heads = [
        "scenario", "requests", "right", "wrong", "500, injected", "500, others", "429, 503", "504", "cut", "hung",
        "bad images refused", "failed as allowed", "unexpected", "p99 ms before, during, after", "slowest ms",
        "verdict",
    ]  # fmt: skip
    return table(heads, map(_request_row, scenarios))


def _request_row(scenario: ScenarioRecord) -> list[str]:
    counts, injected = scenario.evidence.counts, scenario.evidence.injected
    numbers = [
        counts.requests, counts.of(Ending.RIGHT), counts.of(Ending.WRONG), injected,
        counts.of(Ending.SERVER_ERROR) - injected, counts.of(Ending.REFUSED), counts.of(Ending.EXPIRED),
        counts.of(Ending.CUT), counts.of(Ending.HUNG), _refused(counts), counts.allowed, counts.unexpected,
    ]  # fmt: skip
    return [
        scenario.name, *(f"{number:,}" for number in numbers), ", ".join(map(_ms, counts.p99_ms)),
        _ms(counts.slowest_ms), scenario.verdict,
    ]  # fmt: skip


def _refused(counts: Counts) -> int:
    """Answers of 4xx to requests that are not good."""
    bad = (found for kind, found in counts.kinds.items() if kind != GOOD)
    return sum(number for found in bad for status, number in found.items() if status.startswith("4"))


def _server(scenarios: Iterable[ScenarioRecord]) -> list[str]:
    heads = [
        "scenario", "memory before, MiB", "at most during", "after", "descriptors before", "after", "queued after",
        "in flight after", "places free after",
    ]  # fmt: skip
    return table(heads, map(_server_row, scenarios))


def _server_row(scenario: ScenarioRecord) -> list[str]:
    evidence, before, after = scenario.evidence, scenario.evidence.before, scenario.evidence.after
    ended = [_NOTHING] * 5
    return [
        scenario.name, _mib(before.resident_bytes), _mib(evidence.peak_bytes),
        *(
            ended if after is None else [
                _mib(after.resident_bytes), str(before.descriptors), str(after.descriptors), str(after.queued),
                str(after.in_flight),
            ]
        ),
        _NOTHING if after is None else f"{evidence.places} of {evidence.capacity}",
    ]  # fmt: skip


def _told(scenario: ScenarioRecord) -> list[str]:
    """What was done, what else was seen, and what nothing explains."""
    lines = [f"* {each.title}: from {each.began_s:.2f} s to {each.ended_s:.2f} s of the load" for each in scenario.done]
    lines += [f"* {name}: {value}" for name, value in scenario.facts.items()]
    for kind, found in scenario.evidence.counts.kinds.items():
        if kind != GOOD:
            lines.append(f"* {kind}: {', '.join(f'{number} times {status}' for status, number in found.items())}")
    return lines + [f"* unexpected: {text}" for text in scenario.evidence.counts.unexpected_shown]


def _ms(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.1f}"


def _mib(value: int) -> str:
    return f"{value / _MIB:.0f}"
