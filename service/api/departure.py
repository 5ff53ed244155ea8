"""Clients that leave before they are answered: what is done for them is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")

DEPARTURE = "slicewise.departure"
"""In a request's scope: the ``Departure`` of its client, where the protocol tells of it."""


class Departure:
    """Of the client of one connection, which is answered one request after the other."""

    __slots__ = ("_tell", "has_happened")

    def __init__(self) -> None:
        self.has_happened = False
        self._tell: Callable[[], object] | None = None

    def happen(self) -> None:
        """The client has left."""
        self.has_happened = True
        if self._tell is not None:
            self._tell()

    def then(self, tell: Callable[[], object]) -> Callable[[], None]:
        """Have ``tell`` called when it happens, until what is returned is called."""
        self._tell = tell
        return self._forget

    def _forget(self) -> None:
        self._tell = None


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do ``work`` and cancel it when the client leaves; raises ClientDisconnect then."""
    departure: Departure | None = request.scope.get(DEPARTURE)
    if departure is not None and departure.has_happened:
        work.close()
        raise ClientDisconnect
    worker, has_left = asyncio.current_task(), False
    assert worker is not None, "a request is answered by a task: this is a bug"

    def leave() -> None:
        nonlocal has_left
        has_left = True
        worker.cancel()

    stop = asyncio.create_task(_wait(request, leave)).cancel if departure is None else departure.then(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and worker.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        stop()


async def _wait(request: Request, leave: Callable[[], object]) -> None:
    """As any ASGI server tells, for the price of a task."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    leave()
