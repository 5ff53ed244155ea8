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
    """Of the client of one connection, which is answered one request after the other. tell: who is to be told."""

    __slots__ = ("has_happened", "tell")

    def __init__(self) -> None:
        self.has_happened = False
        self.tell: Callable[[], object] | None = None

    def happen(self) -> None:
        """The client has left."""
        self.has_happened = True
        if self.tell is not None:
            self.tell()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do ``work`` and cancel it when the client leaves; raises ClientDisconnect then."""
    worker, has_left = asyncio.current_task(), False
    assert worker is not None, "a request is answered by a task: this is a bug"

    def leave() -> None:
        nonlocal has_left
        has_left = True
        worker.cancel()

    stop = _tell(request, leave)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and worker.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        stop()


def _tell(request: Request, leave: Callable[[], object]) -> Callable[[], object]:
    """Have ``leave`` called when the client has left, until what is returned is called."""
    departure: Departure | None = request.scope.get(DEPARTURE)
    if departure is None:
        return asyncio.create_task(_wait(request, leave)).cancel
    if departure.has_happened:
        leave()
    departure.tell = leave

    def stop() -> None:
        departure.tell = None

    return stop


async def _wait(request: Request, leave: Callable[[], object]) -> None:
    """As any ASGI server tells, for the price of a task."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    leave()
