"""What the routes share: the hosted models and whether they may take requests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request

from service.api.key_file import KeyFile
from service.errors import DrainingError, LoadingError, NotFoundError, QueueFullError
from service.hosting import HostedModel
from service.latency import Overhead
from service.pipeline import Pipeline
from service.quota import Limit
from service.settings import Settings
from service.store import Quotas
from service.telemetry import Telemetry

LOADING_RETRY_S = 5.0
"""Retry-After while a model warms up: the order of a warm-up."""
BODIES_RETRY_S = 1.0
"""Retry-After when bodies hold all the memory they may: they leave with their answers."""
TURNS = 3
"""How often a new request gives way to answers: no more, or under load none would begin."""
DRAINING_RETRY_S = 1.0
"""Retry-After while draining: another replica can answer at once."""


class Lease:
    """One request in work, and the memory that its body holds."""

    def __init__(self, state: ServiceState) -> None:
        self._state, self.body_bytes = state, 0

    def grow(self, count: int) -> None:
        """Claim ``count`` bytes more; QueueFullError when all bodies together would pass the limit."""
        limit = self._state.settings.bodies_limit_bytes
        if self._state.body_bytes + count > limit:
            raise QueueFullError(
                f"bodies in work hold {self._state.body_bytes} bytes; allowed: {limit} bytes", BODIES_RETRY_S
            )
        self._state.body_bytes += count
        self.body_bytes += count


@dataclass(slots=True)
class ServiceState:
    """One per application; changed on the event loop only.

    served      names of models to host, the default one first; those that are warm are in ``models``.
    active      classification requests in work, from their headers to their answer.
    leases      the same, one each: a model that has been replaced is kept until those that found it are answered.
    retiring    models that have been replaced or unloaded, with what closes them.
    body_bytes  held by their bodies.
    keys        of clients, None where nobody is asked for one.
    quotas      what clients have left, None where nobody has a quota; limit: of clients whose key names none.
    overhead    of images, on the cores of this process.
    parser      one thread for large bodies of JSON: what is made of them takes up to 30 times their size, so one
                at a time, and Python would not parse two at once anyway.
    """

    settings: Settings
    telemetry: Telemetry
    pipeline: Pipeline
    keys: KeyFile | None = None
    quotas: Quotas | None = None
    limit: Limit | None = None
    served: list[str] = field(init=False)
    models: dict[str, HostedModel] = field(default_factory=dict)
    retiring: dict[HostedModel, asyncio.Task[None]] = field(default_factory=dict)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    overhead: Overhead = field(default_factory=Overhead)
    parser: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="parse"))
    draining: bool = False
    failed: bool = False
    active: int = 0
    leases: set[Lease] = field(default_factory=set)
    body_bytes: int = 0

    def __post_init__(self) -> None:
        self.served = list(self.settings.model)

    @contextmanager
    def working(self) -> Iterator[Lease]:
        """Hold a lease; the drain waits for it."""
        lease = Lease(self)
        self.active += 1
        self.leases.add(lease)
        try:
            yield lease
        finally:
            self.active -= 1
            self.leases.discard(lease)
            self.body_bytes -= lease.body_bytes

    async def answers_first(self) -> None:
        """For who begins a new request: give way to answers that are ready.

        Where many requests come at once, the loop's round is long. Answers that waited for its end would look slow,
        and what looks slow is refused.
        """
        for _ in range(TURNS):
            models = (*self.models.values(), *self.retiring)
            if not any([model.batcher.settle_finished() for model in models]):
                return
            await asyncio.sleep(0)

    def check_ready(self) -> None:
        """Raise DrainingError or LoadingError unless every model is warm and requests are welcome."""
        if self.draining:
            raise DrainingError("the service is draining and takes no new requests", DRAINING_RETRY_S)
        loading = [name for name in self.served if name not in self.models]
        if loading:
            raise LoadingError(f"models are warming up: {', '.join(loading)}", LOADING_RETRY_S)

    def find(self, name: str | None, version: str | None) -> HostedModel:
        """The hosted model; NotFoundError lists what is served."""
        wanted = name if name is not None else self.settings.model[0]
        if wanted not in self.served:
            raise NotFoundError(f"no model {wanted!r:.100}; served: {', '.join(self.served) or 'none'}")
        self.check_ready()
        model = self.models[wanted]
        if version is not None and version != str(model.manifest.version):
            raise NotFoundError(f"model {wanted} has no version {version!r:.100}; served: {model.manifest.version}")
        return model


def state_of(request: Request) -> ServiceState:
    """The state that the composition root put on the application."""
    return cast(ServiceState, request.app.state.service)
