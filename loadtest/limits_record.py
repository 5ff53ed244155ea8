"""PURE: what the quotas and the answer cache were measured to do, the bars they are held to, and the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from loadtest.checks import Check, Setting, at_least, at_most, check_table, equal, within
from loadtest.figures import percentile
from loadtest.outcomes import Exchange
from loadtest.tables import table

QUOTA_SHARE = 0.05
"""Most by which the compute spent over the window may differ from the quota."""
UNAFFECTED_SHARE = 0.05
"""The same of another client's throughput, with and without the limited one."""
HIT_MS = 1.0


@dataclass(frozen=True, slots=True)
class Spent:
    """A client's compute over a window of so many seconds, in MAdds: by the replicas' ledgers, and by its answers.

    answered, refused  its requests within the window, by replica.
    """

    seconds: float
    ledger_madds: float
    answers_madds: float
    answered: tuple[int, ...]
    refused: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Service:
    """What a client got in a window. failed: requests without a 200."""

    seconds: float
    sent_per_s: float
    answered_per_s: float
    failed: int
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class QuotaRecord:
    """Replicas that share one store, a limited client and another without a limit.

    quota_madds_per_s   of the limited client; burst_s: seconds of it that it may save up.
    offered_per_s       requests/s that it sends; other_per_s: the other.
    alone, beside       what it spent while nobody else asked, and while the other did.
    other_alone, other_beside  what the other got without it and with it.
    store_failures      calls to the store that failed meanwhile: such requests enter without a quota. No bar, as it is
                        what the service promises; what it costs is within the bars of the compute spent.
    """

    replicas: int
    quota_madds_per_s: int
    burst_s: int
    offered_per_s: float
    other_per_s: float
    alone: Spent
    beside: Spent
    other_alone: Service
    other_beside: Service
    store_failures: int

    def checks(self) -> list[Check]:
        found = []
        for when, spent in (("alone", self.alone), ("beside the other", self.beside)):
            wanted = self.quota_madds_per_s * spent.seconds / 1e6
            about = f"{when}, {spent.seconds:.1f} s, M"
            found += [
                within(f"MAdds spent {about}, by the ledgers", spent.ledger_madds / 1e6, wanted, QUOTA_SHARE),
                within(f"MAdds spent {about}, by its answers", spent.answers_madds / 1e6, wanted, QUOTA_SHARE),
                at_least(f"replicas that answered and refused it {when}", _shared(spent), self.replicas),
            ]
        found += [
            equal("requests of the other that were not answered, without the limited one", self.other_alone.failed, 0),
            equal("the same with it", self.other_beside.failed, 0),
            within(
                "images/s of the other with the limited one, of those without",
                self.other_beside.answered_per_s / self.other_beside.sent_per_s,
                self.other_alone.answered_per_s / self.other_alone.sent_per_s,
                UNAFFECTED_SHARE,
            ),
        ]
        return found


def _shared(spent: Spent) -> int:
    return sum(bool(answered and refused) for answered, refused in zip(spent.answered, spent.refused, strict=True))


@dataclass(frozen=True, slots=True)
class Tail:
    """Median and 99th percentile, ms."""

    p50_ms: float
    p99_ms: float

    @staticmethod
    def of(values_ms: Sequence[float]) -> Tail:
        return Tail(percentile(values_ms, 50), percentile(values_ms, 99))


@dataclass(frozen=True, slots=True)
class CacheRecord:
    """Hits of one client, one after the other, each beside a request for /healthz.

    hits, others         answers from the cache, and others.
    ledger_madds         by which the ledger grew meanwhile.
    service              ``timings_ms.total``: from the last byte of the request to the answer, in the service.
    client, baseline     latency of hits and of /healthz, as the client sees it.
    excess               of a hit over the /healthz beside it.
    """

    store: str
    hits: int
    others: int
    ledger_madds: float
    service: Tail
    client: Tail
    baseline: Tail
    excess: Tail

    def checks(self) -> list[Check]:
        return [
            equal(f"{self.store}: answers that were not from the cache", self.others, 0),
            equal(f"{self.store}: MAdds added to the ledger", self.ledger_madds, 0),
            at_most(f"{self.store}: a hit in the service, median", round(self.service.p50_ms, 3), HIT_MS, " ms"),
            at_most(f"{self.store}: a hit in the service, p99", round(self.service.p99_ms, 3), HIT_MS, " ms"),
            at_most(
                f"{self.store}: a hit beyond /healthz for the client, median", round(self.excess.p50_ms, 3), HIT_MS,
                " ms",
            ),
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class LimitsRecord:
    """A whole run. capacity_per_s: images/s of a closed loop; images: how many different ones."""

    setting: Setting
    model: str
    capacity_per_s: float
    images: int
    quota: QuotaRecord
    caches: tuple[CacheRecord, ...]

    def checks(self) -> list[Check]:
        return [*self.quota.checks(), *(check for cache in self.caches for check in cache.checks())]

    @property
    def held(self) -> bool:
        return all(check.held for check in self.checks())

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        draft = path.with_suffix(".partial")
        draft.write_bytes(_ADAPTER.dump_json(self, indent=1) + b"\n")
        draft.replace(path)

    @staticmethod
    def load(path: Path) -> LimitsRecord:
        """Read what ``save`` wrote; ValueError names the file and what is wrong with it."""
        try:
            return _ADAPTER.validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{path}: not a result of slicewise-load limits: {error}") from error


_ADAPTER = TypeAdapter(LimitsRecord)


def madds_between(answers: Iterable[Exchange], from_s: float, to_s: float) -> int:
    """Compute-MAdds of the answers that came in [from_s, to_s)."""
    return sum(
        int({name.lower(): value for name, value in each.headers.items()}.get("compute-madds", "0"))
        for each in answers
        if each.status == 200 and from_s <= _came_s(each) < to_s
    )


def statuses_between(answers: Iterable[Exchange], status: int, from_s: float, to_s: float) -> int:
    """Answers with the status that came in [from_s, to_s)."""
    return sum(each.status == status and from_s <= _came_s(each) < to_s for each in answers)


def first_refusal_s(answers: Iterable[Exchange]) -> float | None:
    """When the first 429 came; None without one."""
    return min((_came_s(each) for each in answers if each.status == 429), default=None)


def _came_s(exchange: Exchange) -> float:
    return exchange.at_s + (exchange.latency_s or 0.0)


def service_between(answers: Iterable[Exchange], from_s: float, to_s: float) -> Service:
    """What became of the requests that were due in [from_s, to_s). Raises ValueError when none was answered."""
    due = [each for each in answers if from_s <= each.at_s < to_s]
    latencies_ms = [each.latency_s * 1e3 for each in due if each.status == 200 and each.latency_s is not None]
    seconds = to_s - from_s
    return Service(
        seconds, len(due) / seconds, len(latencies_ms) / seconds, len(due) - len(latencies_ms),
        percentile(latencies_ms, 50), percentile(latencies_ms, 99),
    )  # fmt: skip


def markdown(record: LimitsRecord) -> str:
    """The report; every number comes from the record."""
    lines = ["# Limits: quotas and the answer cache", "", *record.setting.lines(), ""]
    lines += [
        f"{record.model}, {record.images} images, capacity of one server in a closed loop "
        f"{record.capacity_per_s:.0f} images/s; service, Redis and clients on the same machine.", "",
        "## Bars", "", *check_table(record.checks()), "", "## Quotas", "", *_quota(record.quota), "",
        "## Hits of the cache", "", *_caches(record.caches), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _quota(quota: QuotaRecord) -> list[str]:
    spent_heads = ["limited client", "s", "M MAdds by the ledgers", "by its answers", "quota", "answered", "refused"]
    spent_rows = [
        [
            name, f"{spent.seconds:.1f}", f"{spent.ledger_madds / 1e6:,.0f}", f"{spent.answers_madds / 1e6:,.0f}",
            f"{quota.quota_madds_per_s * spent.seconds / 1e6:,.0f}", _each(spent.answered), _each(spent.refused),
        ]
        for name, spent in (("alone", quota.alone), ("beside the other", quota.beside))
    ]  # fmt: skip
    other_heads = ["other client", "s", "sent/s", "answered/s", "not answered", "p50 ms", "p99 ms"]
    other_rows = [
        [
            name, f"{got.seconds:.1f}", f"{got.sent_per_s:.1f}", f"{got.answered_per_s:.1f}", str(got.failed),
            f"{got.p50_ms:.2f}", f"{got.p99_ms:.2f}",
        ]
        for name, got in (("without the limited one", quota.other_alone), ("with it", quota.other_beside))
    ]  # fmt: skip
    return [
        f"{quota.replicas} replicas share one Redis. The limited client has {quota.quota_madds_per_s / 1e6:,.0f} M "
        f"MAdds per second and may save up {quota.burst_s} s of it; it sends {quota.offered_per_s:.0f} requests/s, to "
        f"each replica in turn. A window begins after the burst is drained, at a reading of the ledgers behind the "
        f"first refusal. The other client has no quota and sends {quota.other_per_s:.0f} requests/s. Beside it, the "
        f"limited one's part of the ledgers is what the other's answers leave. Requests by replica. Calls to "
        f"the store that failed or took too long, whose requests entered without a quota or were not charged: "
        f"{quota.store_failures}.", "",
        *table(spent_heads, spent_rows), "", *table(other_heads, other_rows),
    ]  # fmt: skip


def _each(numbers: Iterable[int]) -> str:
    return " + ".join(f"{number:,}" for number in numbers)


def _caches(caches: Iterable[CacheRecord]) -> list[str]:
    heads = ["store", "hits", "MAdds", "in the service", "client", "/healthz", "hit beyond /healthz"]
    rows = [
        [
            each.store, f"{each.hits:,}", f"{each.ledger_madds:,.0f}", _tail(each.service), _tail(each.client),
            _tail(each.baseline), _tail(each.excess),
        ]
        for each in caches
    ]  # fmt: skip
    return ["Median and p99, in ms, of one client that asks one thing after the other.", "", *table(heads, rows)]


def _tail(tail: Tail) -> str:
    return f"{tail.p50_ms:.3f}, {tail.p99_ms:.3f}"
