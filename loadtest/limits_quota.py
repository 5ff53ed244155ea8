"""Quotas, measured: replicas that share a store, a limited client, and another beside it."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.arms import BenchError
from loadtest.comparisons import Network, slicewise_server
from loadtest.limits_record import (
    QuotaRecord,
    Spent,
    first_refusal_s,
    madds_between,
    service_between,
    statuses_between,
)
from loadtest.open_loop import Limits, Playback, Post, play_all
from loadtest.outcomes import Exchange
from loadtest.redis_process import RedisProcess
from loadtest.rehearsal import Corpus
from loadtest.victim import Victim

REPLICAS = 2
BURST_S = 10
QUOTA_SHARE, OFFERED_SHARE, OTHER_SHARE = 0.15, 0.3, 0.3
"""Of the capacity: what the limited client may, what it tries, and what the other sends."""
_DRAIN_S = 2.5 * BURST_S
"""Until the burst is drained, and some more: it takes burst x quota / (offered - quota)."""
_SETTLE_S = 2.0
"""From the first refusal to the window."""
_MADDS = "slicewise_madds_total"


@dataclass(frozen=True, slots=True)
class Client:
    """Its secret, sent with every request."""

    name: str
    secret: str
    quota: str

    def toml(self) -> str:
        digest = hashlib.sha256(self.secret.encode()).hexdigest()
        return f'[keys.{self.name}]\nsha256 = "{digest}"\nquota = "{self.quota}"\n'


@dataclass(frozen=True, slots=True)
class Reading:
    """What the ledgers of all replicas held together, at an instant of ``time.perf_counter``."""

    at_s: float
    madds: float


@dataclass(frozen=True, slots=True)
class Study:
    """What is measured: capacity in images/s, mean cost of an image in MAdds, and for how long."""

    network: Network
    corpus: Corpus
    capacity_per_s: float
    mean_madds: float
    seconds: float
    work: Path

    @property
    def quota_madds_per_s(self) -> int:
        return round(self.capacity_per_s * QUOTA_SHARE * self.mean_madds)


def measure_quota(study: Study) -> QuotaRecord:
    """Three loads: the limited client alone, the other alone, and both. Raises BenchError and ServerError."""
    limited = Client("limited", secrets.token_hex(32), str(study.quota_madds_per_s))
    other = Client("other", secrets.token_hex(32), "none")
    keys = study.work / "keys.toml"
    keys.write_text(limited.toml() + other.toml(), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(RedisProcess())
        flags = (
            "--redis-url", redis.url, "--keys-file", str(keys), "--quota-burst-s", str(BURST_S), "--workers", "1",
            "--decode-threads", "1",
        )  # fmt: skip
        spec = slicewise_server(study.network, flags)
        servers = [
            stack.enter_context(Victim(spec, study.work / f"replica-{place}.log")) for place in range(REPLICAS)
        ]  # fmt: skip
        _load(servers, study, [(other, study.capacity_per_s * OTHER_SHARE, 3.0)])  # to warm up
        asking = (limited, study.capacity_per_s * OFFERED_SHARE, study.seconds + _DRAIN_S)
        beside = (other, study.capacity_per_s * OTHER_SHARE, study.seconds + _DRAIN_S)
        alone = _load(servers, study, [asking])
        other_alone = _load(servers, study, [(other, study.capacity_per_s * OTHER_SHARE, study.seconds)])
        both = _load(servers, study, [asking, beside])
        failures = sum(server.metrics().total("slicewise_store_failures_total") for server in servers)
    from_s, to_s = window(both, study.seconds)
    return QuotaRecord(
        REPLICAS, study.quota_madds_per_s, BURST_S, asking[1], beside[1], spent(alone, study.seconds),
        spent(both, study.seconds), service_between(_together(other_alone.by_client[0]), 0.0, study.seconds),
        service_between(_together(both.by_client[1]), from_s, to_s), round(failures),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Loaded:
    """What several clients sent at once: their exchanges by client and replica, and the ledgers' readings.

    Readings by the loads' own time.
    """

    by_client: list[list[Sequence[Exchange]]]
    readings: list[Reading]


def _load(servers: Sequence[Victim], study: Study, clients: Sequence[tuple[Client, float, float]]) -> Loaded:
    """Each client with its rate and duration, to each server in turn."""
    loads: list[tuple[str, list[Post]]] = []
    for seed, (client, rate_per_s, seconds) in enumerate(clients):
        posts = [
            Post(each.at_s, each.image.data, {"Content-Type": each.image.media_type, "X-API-Key": client.secret})
            for each in study.corpus.requests(rate_per_s, seconds, seed)
        ]
        loads += [(s.url + study.corpus.path, posts[place :: len(servers)]) for place, s in enumerate(servers)]
    with _ledgers(servers) as readings:
        playbacks = play_all(loads, Limits())
    began_s = min(playback.began_s for playback in playbacks)
    placed = [_shifted(playback, began_s) for playback in playbacks]
    by_client = [placed[start : start + len(servers)] for start in range(0, len(placed), len(servers))]
    return Loaded(by_client, [Reading(reading.at_s - began_s, reading.madds) for reading in readings])


def _shifted(playback: Playback, began_s: float) -> Sequence[Exchange]:
    """They begin together but for a moment, by which nothing that is counted here would change."""
    if playback.began_s - began_s > 1.0:
        raise BenchError(f"loads began {playback.began_s - began_s:.2f} s apart; this machine is too busy")
    return playback.exchanges


@contextlib.contextmanager
def _ledgers(servers: Sequence[Victim]) -> Iterator[list[Reading]]:
    """The servers' ledgers together, read about once a second while the context is open, and once after."""
    readings: list[Reading] = []
    stop = threading.Event()

    def read() -> None:
        at_s = time.perf_counter()
        readings.append(Reading(at_s, sum(server.metrics().total(_MADDS) for server in servers)))

    def watch() -> None:
        while not stop.wait(1.0):
            read()

    thread = threading.Thread(target=watch, name="ledgers", daemon=True)
    thread.start()
    try:
        yield readings
    finally:
        stop.set()
        thread.join()
    read()


def _together(exchanges: Sequence[Sequence[Exchange]]) -> list[Exchange]:
    return [exchange for one in exchanges for exchange in one]


def window(loaded: Loaded, seconds: float) -> tuple[float, float]:
    """From the first reading behind the first refusal, to the first one so many seconds later. Raises BenchError."""
    refused_s = first_refusal_s(_together(loaded.by_client[0]))
    if refused_s is None:
        raise BenchError("the limited client was never refused: what it offers is below its quota")
    starts = [each.at_s for each in loaded.readings if each.at_s >= refused_s + _SETTLE_S]
    ends = [at_s for at_s in starts if at_s >= starts[0] + seconds]
    last_s = max(each.at_s for each in _together(loaded.by_client[0]))
    if not ends or ends[0] > last_s + 1.0:
        raise BenchError(f"refused first after {refused_s:.1f} s: {seconds:g} s more do not fit into the load")
    return starts[0], ends[0]


def spent(loaded: Loaded, seconds: float) -> Spent:
    """Of the first client; what the ledgers hold of the others is what their answers say."""
    from_s, to_s = window(loaded, seconds)
    ledger = {reading.at_s: reading.madds for reading in loaded.readings}
    first, *others = loaded.by_client
    others_madds = sum(madds_between(_together(client), from_s, to_s) for client in others)
    return Spent(
        to_s - from_s,
        ledger[to_s] - ledger[from_s] - others_madds,
        madds_between(_together(first), from_s, to_s),
        tuple(statuses_between(one, 200, from_s, to_s) for one in first),
        tuple(statuses_between(one, 429, from_s, to_s) for one in first),
    )
