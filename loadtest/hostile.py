"""Clients that behave badly: some vanish, some send a byte a second, some send thousands of header fields."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from loadtest.corpus import EncodedImage
from loadtest.servers import HOST

VANISH_EVERY_S = 0.05
FLOOD_EVERY_S, FLOOD_FIELDS = 1.0, 10_000
SLOW_CLIENTS = 10
BYTE_EVERY_S = 1.0
ANSWER_LIMIT_S = 20.0
"""For headers too many; the run fails beyond it."""
NONE = "no answer"
T = TypeVar("T")
_STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")


@dataclass(frozen=True, slots=True)
class Sent:
    """What they did and got: vanished by where they did; others by the status of their answer."""

    vanished: Counter[str] = field(default_factory=Counter)
    slow_headers: Counter[str] = field(default_factory=Counter)
    slow_bodies: Counter[str] = field(default_factory=Counter)
    floods: Counter[str] = field(default_factory=Counter)


class Hostiles:
    """All of them together against one server, for so long."""

    def __init__(self, port: int, path: str, image: EncodedImage, seconds: float) -> None:
        self._port, self._image, self._seconds = port, image, seconds
        self._head = (
            f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: {image.media_type}\r\n"
            f"Content-Length: {len(image.data)}\r\n\r\n"
        ).encode()
        self.sent = Sent()

    def run(self) -> None:
        """Everything they do, in an event loop of its own."""
        asyncio.run(self._all())

    async def _all(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._vanish())
            group.create_task(self._flood())
            for _ in range(SLOW_CLIENTS):
                group.create_task(self._slow(self._head, b"", self.sent.slow_headers))
                group.create_task(self._slow(self._image.data, self._head, self.sent.slow_bodies))

    async def _vanish(self) -> None:
        head, data = self._head, self._image.data
        parts = {
            "within the headers": head[: len(head) // 2], "after the headers": head,
            "within the body": head + data[: len(data) // 2], "before the answer": head + data,
        }  # fmt: skip
        for where in _for(self._seconds, VANISH_EVERY_S, itertools.cycle(parts)):
            _, writer = await asyncio.open_connection(HOST, self._port)
            writer.write(parts[where])
            await writer.drain()
            await asyncio.sleep(VANISH_EVERY_S / 5)  # so that the server has seen it
            writer.transport.abort()
            self.sent.vanished[where] += 1
            await asyncio.sleep(VANISH_EVERY_S * 4 / 5)

    async def _flood(self) -> None:
        lines = b"".join(b"X-Field-%d: %d\r\n" % (k, k) for k in range(FLOOD_FIELDS))
        request = self._head[:-2] + lines + b"\r\n" + self._image.data
        for _ in _for(self._seconds, FLOOD_EVERY_S, itertools.repeat("")):
            reader, writer = await asyncio.open_connection(HOST, self._port)
            with contextlib.suppress(OSError):  # it need not read all of it
                writer.write(request)
                await writer.drain()
            self.sent.floods[await asyncio.wait_for(_status(reader), ANSWER_LIMIT_S)] += 1
            writer.close()
            await asyncio.sleep(FLOOD_EVERY_S)

    async def _slow(self, data: bytes, first: bytes, statuses: Counter[str]) -> None:
        """``first`` at once, then ``data`` a byte at a time, until there is an answer or the time is over."""
        reader, writer = await asyncio.open_connection(HOST, self._port)
        answer = asyncio.create_task(_status(reader))
        with contextlib.suppress(OSError):
            writer.write(first)
            for byte in _for(self._seconds, BYTE_EVERY_S, iter(data)):
                if answer.done():
                    break
                writer.write(bytes((byte,)))
                await asyncio.wait([answer], timeout=BYTE_EVERY_S)
        statuses[answer.result() if answer.done() else NONE] += 1
        answer.cancel()
        writer.transport.abort()


def _for(seconds: float, every_s: float, values: Iterator[T]) -> Iterator[T]:
    """As many of the values as there is time for."""
    return itertools.islice(values, max(1, int(seconds / every_s)))


async def _status(reader: asyncio.StreamReader) -> str:
    """Status of the answer; ``NONE`` when the connection ends without one."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        found = _STATUS.match(await reader.readuntil(b"\r\n"))
        return found[1].decode() if found else NONE
    return NONE
