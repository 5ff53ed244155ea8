"""The answer cache, measured: what a hit takes, beside a request that does nothing."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from loadtest.arms import BenchError
from loadtest.comparisons import Network, slicewise_server
from loadtest.corpus import EncodedImage
from loadtest.limits_record import CacheRecord, Tail
from loadtest.redis_process import RedisProcess
from loadtest.rehearsal import Corpus
from loadtest.servers import HOST
from loadtest.victim import Victim

MEMORY, REDIS = "memory", "Redis"
STORES = (MEMORY, REDIS)
_ROUNDS_TO_KEEP = 3
"""Each image is asked for so often beforehand: load or a bad moment may keep an answer from being stored."""
_PAUSE_S = 0.02
"""Between these, so that no queue narrows an answer and each has reached the store."""
_TIMEOUT_S = 10.0
_END = b"\r\n\r\n"


class Wire:
    """One connection that is kept, with nothing between the clock and the socket."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((HOST, port), timeout=_TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def exchange(self, request: bytes) -> tuple[bytes, float]:
        """Body of the answer, and seconds from the first byte sent to the last received. Raises BenchError."""
        began_s = time.perf_counter()
        self._socket.sendall(request)
        data = b""
        while _END not in data:
            data += self._more()
        head, _, body = data.partition(_END)
        length = _length(head)
        while len(body) < length:
            body += self._more()
        took_s = time.perf_counter() - began_s
        if not head.startswith(b"HTTP/1.1 200 "):
            raise BenchError(f"answered {head.splitlines()[0].decode()}: {body[:200].decode(errors='replace')}")
        return body, took_s

    def _more(self) -> bytes:
        data = self._socket.recv(65536)
        if not data:
            raise BenchError("the service closed the connection in mid-answer")
        return data

    def close(self) -> None:
        self._socket.close()


def _length(head: bytes) -> int:
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
    return int(fields[b"content-length"])


def _post(path: str, image: EncodedImage) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: {image.media_type}\r\n"
        f"Content-Length: {len(image.data)}\r\n\r\n"
    )
    return head.encode() + image.data


def measure_cache(store: str, network: Network, corpus: Corpus, hits: int, work: Path) -> CacheRecord:
    """So many hits with answers kept in ``store``. Raises BenchError and ServerError."""
    with _server(store, network, work) as server, contextlib.closing(Wire(server.port)) as wire:
        posts = [_post(corpus.path, image) for image in corpus.images]
        for post in posts * _ROUNDS_TO_KEEP:
            wire.exchange(post)
            time.sleep(_PAUSE_S)
        before = server.metrics().total("slicewise_madds_total")
        record = _hits(store, wire, posts, hits)
        ledger = server.metrics().total("slicewise_madds_total") - before
        return CacheRecord(store, *record[:2], ledger, *record[2])


def _hits(store: str, wire: Wire, posts: list[bytes], hits: int) -> tuple[int, int, tuple[Tail, Tail, Tail, Tail]]:
    """Hits and other answers, and the times of hits in the service, of hits, of nothing, and of their difference."""
    nothing = f"GET /healthz HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    service_ms, client_ms, baseline_ms, others = [], [], [], 0
    for place in range(hits):
        body, took_s = wire.exchange(posts[place % len(posts)])
        _, idle_s = wire.exchange(nothing)
        said = json.loads(body)
        if not said["cached"]:
            others += 1
            continue
        service_ms.append(float(said["timings_ms"]["total"]))
        client_ms.append(took_s * 1e3)
        baseline_ms.append(idle_s * 1e3)
    if not service_ms:
        raise BenchError(f"{store}: no answer came from the cache")
    excess_ms = [client - baseline for client, baseline in zip(client_ms, baseline_ms, strict=True)]
    tails = (Tail.of(service_ms), Tail.of(client_ms), Tail.of(baseline_ms), Tail.of(excess_ms))
    return len(service_ms), others, tails


@contextlib.contextmanager
def _server(store: str, network: Network, work: Path) -> Iterator[Victim]:
    with contextlib.ExitStack() as stack:
        flags = ["--cache-enabled", "true"]
        if store == REDIS:
            flags += ["--redis-url", stack.enter_context(RedisProcess()).url]
        spec = slicewise_server(network, tuple(flags))
        yield stack.enter_context(Victim(spec, work / f"cache-{store}.log"))
