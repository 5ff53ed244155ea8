"""The answer cache and the clients' quotas: what they promise, in Redis or in this process.

Both fail open: while the store is away images are computed and requests enter, and every failure is counted. The
twins in memory have the same rules for one process alone. Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import OrderedDict
from typing import Protocol

import structlog

from service import caching, quota
from service.caching import Answer
from service.errors import StoreError
from service.quota import Bucket, Limit
from service.redis_client import RedisClient
from service.request import Window

log = structlog.get_logger()

ANSWER_PREFIX = "slicewise:answer:"
"""A hash per model and image: slice -> encoded answer."""
QUOTA_PREFIX = "slicewise:quota:"
"""A hash per client: tokens and when they were counted. The client is hashed: stores are read by many."""
PENDING_ANSWERS = 256
"""Answers on their way to the store; beyond it they are not kept, because the store is slower than the service."""
ENTRY_BYTES = 400
"""What an answer in memory holds beside its bytes: key, dictionary entries, objects. Measured, rounded up."""
MOST_CLIENTS = 100_000
"""Buckets in memory, of which the one not used for longest is forgotten, which at worst fills it early; and clients
whose charges are on their way to Redis, beyond which others are forgiven."""


class Cache(Protocol):
    """Answers by image."""

    async def find(self, key: str, window: Window, classes: int, limit_s: float | None) -> Answer | None:
        """An answer that serves the window, within ``limit_s`` seconds if given. Raises StoreError."""

    def keep(self, key: str, answer: Answer) -> None:
        """Keep a storable answer; never waits, and what fails is counted."""

    async def close(self) -> None:
        """Let go of what is held; the cache is not used afterwards."""


class Quotas(Protocol):
    """Token buckets by client."""

    async def tokens_madds(self, client: str, limit: Limit) -> float:
        """What is left to the client now. Raises StoreError."""

    def charge(self, client: str, limit: Limit, madds: int) -> None:
        """Take what was spent; never waits, and what fails is counted."""

    async def close(self) -> None:
        """Send what is to be charged still; the quotas are not used afterwards."""


class MemoryCache:
    """Answers in this process; the least recently used go first. limit_bytes bounds all of them together."""

    def __init__(self, limit_bytes: int, ttl_s: int) -> None:
        self._limit_bytes, self._ttl_s = limit_bytes, ttl_s
        self._held: OrderedDict[tuple[str, int], tuple[bytes, float]] = OrderedDict()
        self.held_bytes = 0

    async def find(self, key: str, window: Window, classes: int, limit_s: float | None) -> Answer | None:
        """An answer that serves the window; memory needs no limit and raises nothing."""
        found = {width: data for width in caching.widths(window) if (data := self._get(key, width))}
        return caching.best({width: caching.decode(data, width, classes) for width, data in found.items()}, window)

    def keep(self, key: str, answer: Answer) -> None:
        data, place = caching.encode(answer), (key, answer.route.width)
        self._drop(place)
        if len(data) + ENTRY_BYTES > self._limit_bytes:
            return
        self._held[place] = (data, time.monotonic() + self._ttl_s)
        self.held_bytes += len(data) + ENTRY_BYTES
        while self.held_bytes > self._limit_bytes:
            self._drop(next(iter(self._held)))

    async def close(self) -> None:
        self._held.clear()
        self.held_bytes = 0

    def _get(self, key: str, width: int) -> bytes | None:
        data, expires_s = self._held.get((key, width), (None, 0.0))
        if data is None:
            return None
        if expires_s <= time.monotonic():
            self._drop((key, width))
            return None
        self._held.move_to_end((key, width))
        return data

    def _drop(self, place: tuple[str, int]) -> None:
        data, _ = self._held.pop(place, (None, 0.0))
        if data is not None:
            self.held_bytes -= len(data) + ENTRY_BYTES


class RedisCache:
    """Answers that replicas share."""

    def __init__(self, client: RedisClient, ttl_s: int) -> None:
        self._client, self._ttl_s = client, ttl_s
        self._pending: set[asyncio.Task[None]] = set()

    async def find(self, key: str, window: Window, classes: int, limit_s: float | None) -> Answer | None:
        """An answer that serves the window. StoreError as well for one that is damaged: it is not trusted."""
        names = caching.widths(window)
        try:
            async with asyncio.timeout(limit_s):
                values = await self._client.fields(ANSWER_PREFIX + key, names)
        except TimeoutError as error:
            raise StoreError("the deadline left no time") from error
        try:
            found = {w: caching.decode(data, w, classes) for w, data in zip(names, values, strict=True) if data}
        except ValueError as error:
            log.warning("kept_answer_damaged", error=str(error))
            raise StoreError("a kept answer is damaged") from error
        return caching.best(found, window)

    def keep(self, key: str, answer: Answer) -> None:
        if len(self._pending) >= PENDING_ANSWERS:
            return
        task = asyncio.create_task(self._keep(key, answer))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def close(self) -> None:
        await asyncio.gather(*self._pending)

    async def _keep(self, key: str, answer: Answer) -> None:
        values = {answer.route.width: caching.encode(answer)}
        with contextlib.suppress(StoreError):  # counted where it fails; the answer has been given
            await self._client.set_fields(ANSWER_PREFIX + key, values, self._ttl_s)


class MemoryQuotas:
    """Buckets of this process alone: behind several replicas a client has one in each."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    async def tokens_madds(self, client: str, limit: Limit) -> float:
        now_s = time.monotonic()
        bucket = self._buckets.get(client, quota.full(limit, now_s))
        return quota.after(bucket, limit, now_s).tokens_madds

    def charge(self, client: str, limit: Limit, madds: int) -> None:
        now_s = time.monotonic()
        bucket = self._buckets.pop(client, quota.full(limit, now_s))
        self._buckets[client] = quota.after(bucket, limit, now_s, madds)
        if len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)

    async def close(self) -> None:
        self._buckets.clear()


class RedisQuotas:
    """Buckets that replicas share. Charges are summed per client while one is on its way."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._due: dict[tuple[str, Limit], int] = {}
        self._sender: asyncio.Task[None] | None = None

    async def tokens_madds(self, client: str, limit: Limit) -> float:
        """What is left, less what this process has not charged yet. Raises StoreError."""
        tokens = await self._run("admit", client, limit, 0)
        return tokens - self._due.get((client, limit), 0)

    def charge(self, client: str, limit: Limit, madds: int) -> None:
        if len(self._due) >= MOST_CLIENTS and (client, limit) not in self._due:
            return  # forgiven: the store is slower than clients come
        self._due[client, limit] = self._due.get((client, limit), 0) + madds
        if self._sender is None:
            self._sender = asyncio.create_task(self._send())

    async def close(self) -> None:
        if self._sender is not None:
            await self._sender

    async def _send(self) -> None:
        try:
            while self._due:
                (client, limit), madds = next(iter(self._due.items()))
                # Counted where it fails; what was spent while the store is away is forgiven.
                with contextlib.suppress(StoreError):
                    await self._run("charge", client, limit, madds)
                left = self._due.pop((client, limit)) - madds
                if left:
                    self._due[client, limit] = left
        finally:
            self._sender = None

    async def _run(self, kind: str, client: str, limit: Limit, madds: int) -> float:
        name = hashlib.blake2b(client.encode(), digest_size=16).hexdigest()
        arguments = (limit.madds_per_s, limit.capacity_madds, madds)
        return float(await self._client.run_script(kind, quota.REDIS_SCRIPT, QUOTA_PREFIX + name, arguments))
