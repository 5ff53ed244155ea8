"""Who asks, what they may, and what they spend: keys and quotas at the routes."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Scope

from service import quota
from service.api.keys import Key, Role, shown_key
from service.api.problems import PROBES
from service.api.state import state_of
from service.errors import ForbiddenError, OverloadError, QuotaError, StoreError, UnauthorizedError
from service.quota import Limit
from service.request import Budget
from service.store import Quotas

OPEN = (*PROBES, "/docs", "/docs/assets/{name}")
"""Routes of routers with keys that ask for none: machines probe them, and the documentation holds no secret."""
_KEY = "slicewise.key"
_ALLOWANCE = "slicewise.allowance"

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class GuardedRoute(APIRoute):
    """Asks for a key where the settings name a key file."""

    role: Role = "user"

    def get_route_handler(self) -> Handler:
        return self.guarded(super().get_route_handler())

    def guarded(self, handle: Handler) -> Handler:
        """``handle`` behind the check of keys."""

        async def guard(request: Request) -> Response:
            if request.scope["route"].path not in OPEN:
                authenticate(request, self.role)
            return await handle(request)

        return guard


class AdminRoute(GuardedRoute):
    """Asks for a key with the role admin."""

    role: Role = "admin"


class Allowance:
    """What one request's client may spend, and what the request has spent of it."""

    def __init__(self, quotas: Quotas, client: str, limit: Limit) -> None:
        self._quotas, self._client, self._limit = quotas, client, limit
        self._left_madds: float | None = None

    async def admit(self) -> None:
        """Let the request in while there is a token; raises QuotaError. A store that is away lets it in as well."""
        try:
            self._left_madds = await self._quotas.tokens_madds(self._client, self._limit)
        except StoreError:
            return
        if not quota.admits(self._left_madds):
            raise QuotaError(
                f"the quota of {self._limit.madds_per_s} MAdds per second is spent, with "
                f"{self._limit.capacity_madds} MAdds saved up at most; see Retry-After",
                quota.retry_after_s(self._left_madds, self._limit),
            )

    def spend(self, madds: int) -> None:
        """Charge what was computed for the request, whenever it is known, also after its answer."""
        self._quotas.charge(self._client, self._limit, madds)
        if self._left_madds is not None:
            self._left_madds -= madds

    def fields(self) -> list[tuple[bytes, bytes]]:
        """RateLimit-Policy, and RateLimit unless the store was away."""
        found = [(b"ratelimit-policy", quota.policy_field(self._limit).encode())]
        if self._left_madds is not None:
            found.append((b"ratelimit", quota.limit_field(self._left_madds, self._limit).encode()))
        return found


def authenticate(request: Request, role: Role) -> None:
    """Find the request's key. Raises UnauthorizedError without a known one, ForbiddenError without the role."""
    keys = state_of(request).keys
    if keys is None:
        return
    secret = shown_key(request.scope["headers"])
    key = None if secret is None else keys.keyring.find(secret)
    if key is None:
        given = "no key, or two that differ" if secret is None else "a key that is not known"
        raise UnauthorizedError(
            f"{given}; allowed: a key of this service, as Authorization: Bearer KEY or X-API-Key: KEY"
        )
    request.scope[_KEY] = key
    structlog.contextvars.bind_contextvars(client=key.name)
    if role == "admin" and key.role != "admin":
        raise ForbiddenError(f"the key has the role {key.role}; allowed: admin")


def granted(request: Request, stated: Budget) -> Budget:
    """The budget that counts: what the request states, with the defaults and the urgency of its key."""
    key: Key | None = request.scope.get(_KEY)
    return stated if key is None else key.grant(stated)


@contextmanager
def counting_refusals(request: Request, budget: Budget) -> Iterator[None]:
    """Count the budget as refused where the service wants no more work."""
    try:
        yield
    except OverloadError:
        state_of(request).telemetry.count_budgets(budget, "refused")
        raise


async def admit(request: Request) -> Callable[[int], None] | None:
    """Let a request in that will compute, within its client's quota; returns what charges it, None without a quota.

    Raises QuotaError.
    """
    state = state_of(request)
    key: Key | None = request.scope.get(_KEY)
    limit = state.limit if key is None else key.limit
    if limit is None or state.quotas is None:
        return None
    client = f"key:{key.name}" if key is not None else f"address:{_network(request)}"
    allowance = request.scope[_ALLOWANCE] = Allowance(state.quotas, client, limit)
    await allowance.admit()
    return allowance.spend


def rate_limit_fields(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The response fields that tell of the client's quota; none where it has none."""
    allowance: Allowance | None = scope.get(_ALLOWANCE)
    return [] if allowance is None else allowance.fields()


def bypasses_cache(request: Request) -> bool:
    """Whether Cache-Control asks for an answer that is computed: no-cache or no-store."""
    values = [value for name, value in request.scope["headers"] if name == b"cache-control"]
    directives = {part.strip().lower() for value in values for part in value.split(b",")}
    return not directives.isdisjoint((b"no-cache", b"no-store"))


def _network(request: Request) -> str:
    """The client's address; of IPv6 the network of 64 bits, within which one client has as many as it likes."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    if address.ipv4_mapped is not None:  # of which all together are one network
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
