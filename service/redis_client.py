"""The only module that talks to Redis: every call is bounded in time, counted when it fails, and never raises else.

Used on one event loop. A store that is away costs a few timeouts; then the breaker answers for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import TypeVar, cast

import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from service.breaker import Breaker
from service.errors import StoreError
from service.settings import SettingError
from service.telemetry import Telemetry, child

log = structlog.get_logger()

T = TypeVar("T")

CONNECTIONS = 16
"""A call takes well under a millisecond, so more connections would only hide that the store is slow."""


class RedisClient:
    """A few commands of one Redis.

    timeout_s  bounds every call as a whole: waiting for a connection, making it, asking and reading.
    retry_s    after which a store that is away is tried again.

    Raises SettingError for an address that is none; its text, which may hold a password, is never repeated.
    """

    def __init__(self, url: str, timeout_s: float, retry_s: float, telemetry: Telemetry) -> None:
        try:
            pool = BlockingConnectionPool.from_url(
                url, max_connections=CONNECTIONS, timeout=None, retry=Retry(NoBackoff(), 0),
                socket_connect_timeout=timeout_s, socket_timeout=timeout_s,
            )  # fmt: skip
        except ValueError:
            raise SettingError(
                "setting redis_url is no address of a Redis; allowed: redis://, rediss:// or unix://"
            ) from None
        self._redis = Redis(connection_pool=pool)
        self._timeout_s, self._telemetry = timeout_s, telemetry
        self._breaker = Breaker(retry_s)

    async def fields(self, key: str, names: Sequence[int]) -> list[bytes | None]:
        """The values of these fields of a hash, None for each that is absent. Raises StoreError."""
        call = self._redis.hmget(key, [str(name) for name in names])
        return cast("list[bytes | None]", await self._bounded("find", call))

    async def set_fields(self, key: str, values: Mapping[int, bytes], ttl_s: int) -> None:
        """Set fields of a hash, which then lives for ``ttl_s`` seconds. Raises StoreError."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.hset(key, mapping={str(name): value for name, value in values.items()})
        pipe.expire(key, ttl_s)
        await self._bounded("keep", pipe.execute())

    async def run_script(self, kind: str, script: str, key: str, arguments: Sequence[int]) -> bytes:
        """What a Lua script on one key returns. kind: ``admit`` or ``charge``, for the count. Raises StoreError."""
        # By its text and not by its digest: a Redis that has restarted knows no digests.
        call = self._redis.eval(script, 1, key, *map(str, arguments))
        return cast(bytes, await self._bounded(kind, call))

    async def close(self) -> None:
        """Close every connection."""
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def _bounded(self, kind: str, call: Awaitable[T]) -> T:
        if not self._breaker.admits(time.monotonic()):
            if asyncio.iscoroutine(call):
                call.close()
            raise self._counted(kind, "the store is away")
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await call
        except (RedisError, OSError, TimeoutError) as error:
            if self._breaker.failed(time.monotonic()):
                log.warning("store_away", error=type(error).__name__)  # its text may quote what was sent
            raise self._counted(kind, type(error).__name__) from None
        if self._breaker.succeeded():
            log.info("store_back")
        return result

    def _counted(self, kind: str, reason: str) -> StoreError:
        child(self._telemetry.store_failures, kind).inc()
        return StoreError(reason)
