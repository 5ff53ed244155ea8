"""HTTP/1.1 POSTs to one URL over connections that are kept, with little Python around each.

A general client takes a fifth of a millisecond of a core for a request, most of it in its own layers, on the cores
that the server under test needs; and whatever waits for it makes answers look late. Here a request's head is made
beforehand; it is written at once, with its body, to a connection that is free, and answered by a callback. Answers are
parsed in C (httptools), and their header fields only when somebody asks for one.

Redirects are not followed, bodies are not decompressed, no cookie is kept and nothing is tried twice.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self, cast
from urllib.parse import SplitResult, unquote, urlsplit

import httptools

PORTS = {"http": 80, "https": 443}
CLOSING_TURNS = 100
"""Of the event loop, within which connections that are aborted have ended."""
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)  # RFC 9110, field names
_VALUE = re.compile(r"[ -~]*", re.ASCII)


class Fields(Mapping[str, str]):
    """Header fields as they came; names in any case, of several of one name the first."""

    def __init__(self, raw: list[tuple[bytes, bytes]]) -> None:
        self._raw = raw

    @cached_property
    def _by_name(self) -> dict[str, str]:
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in reversed(self._raw)}

    def __getitem__(self, name: str) -> str:
        return self._by_name[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer."""

    status: int
    headers: Fields
    body: bytes


Ended = Callable[[Reply | Exception], None]
"""Told once how a request has ended: a reply, or why there is none: OSError (TimeoutError, ConnectionResetError and
others), httptools.HttpParserError for what is no HTTP."""


class Client:
    """Requests to one URL, in the event loop that is running. limit_s: for each, with its connection if it needs one.

    Raises ValueError for a URL that is not http:// or https:// with a host.
    """

    def __init__(self, url: str, limit_s: float) -> None:
        split = urlsplit(url)
        if split.scheme not in PORTS or not split.hostname:
            shown = f"{split.scheme}://{split.netloc.rpartition('@')[2]}{split.path}"  # without a password
            raise ValueError(f"URL is {shown}; allowed: http:// or https:// and a host")
        self._host, self._port = split.hostname, split.port or PORTS[split.scheme]
        self._is_secure, self._limit_s, self._head = split.scheme == "https", limit_s, _head(split)
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Whoever has not been answered is not told."""
        for task in self._connecting:
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        for connection in self._open:
            connection.abort()
        turns = 0
        while self._open and turns < CLOSING_TURNS:
            turns += 1
            await asyncio.sleep(0)

    def head(self, headers: Mapping[str, str], body_bytes: int) -> bytes:
        """What goes before a body of this length. Raises ValueError for a field that would break the request."""
        for name, value in headers.items():
            if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
                raise ValueError(f"header {name!r} is {value!r}; allowed: a token, and printable ASCII")
        fields = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        return f"{self._head}{fields}Content-Length: {body_bytes}\r\n\r\n".encode("ascii")

    def send(self, request: bytes, ended: Ended) -> None:
        """Send head and body now, or as soon as there is a connection. ``ended`` is not called from in here."""
        until_s = self._loop.time() + self._limit_s
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closing:
                connection.send(request, ended, until_s)
                return
        task = self._loop.create_task(self._connect(request, ended, until_s))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def post(self, headers: Mapping[str, str], body: bytes) -> Reply:
        """Send a request and wait for its reply; raises what ``Ended`` may be told."""
        future: asyncio.Future[Reply] = self._loop.create_future()

        def ended(reply: Reply | Exception) -> None:
            if future.done():
                return  # nobody waits any more
            if isinstance(reply, Reply):
                future.set_result(reply)
            else:
                future.set_exception(reply)

        self.send(self.head(headers, len(body)) + body, ended)
        return await future

    async def _connect(self, request: bytes, ended: Ended, until_s: float) -> None:
        try:
            async with asyncio.timeout_at(until_s):
                _, connection = await self._loop.create_connection(
                    lambda: _Connection(self._loop, self._idle, self._open), self._host, self._port,
                    ssl=self._is_secure or None,
                )  # fmt: skip
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be one
            ended(error)
            return
        connection.send(request, ended, until_s)


class _Connection(asyncio.Protocol):
    """One request at a time. idle: where it waits for the next; open_: where it is for as long as it lasts."""

    def __init__(self, loop: asyncio.AbstractEventLoop, idle: list[_Connection], open_: set[_Connection]) -> None:
        self._loop, self._idle, self._open = loop, idle, open_
        self._parser = httptools.HttpResponseParser(self)
        self._fields: list[tuple[bytes, bytes]] = []
        self._chunks: list[bytes] = []
        self._is_whole = self._is_kept = False
        self._ended: Ended | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def abort(self) -> None:
        self._ended = None
        self._stop_timer()
        self._transport.abort()

    def send(self, request: bytes, ended: Ended, until_s: float) -> None:
        self._ended, self._timer = ended, self._loop.call_at(until_s, self._fail, TimeoutError())
        self._fields, self._chunks = [], []
        self._transport.write(request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.discard(self)
        self._fail(exc or ConnectionResetError("closed before the answer was whole"))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(error)
            self._transport.abort()
            return
        if self._is_whole:
            self._end()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value))

    def on_body(self, data: bytes) -> None:
        self._chunks.append(data)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= 200:
            self._is_whole, self._is_kept = True, self._parser.should_keep_alive()
        else:  # an interim response; the answer is still to come
            self._fields, self._chunks = [], []

    def _end(self) -> None:
        ended, self._ended, self._is_whole = self._ended, None, False
        self._stop_timer()
        if self._is_kept and ended is not None:
            self._idle.append(self)
        else:
            self._transport.abort()
        if ended is not None:
            ended(Reply(self._parser.get_status_code(), Fields(self._fields), b"".join(self._chunks)))

    def _fail(self, error: Exception) -> None:
        ended, self._ended = self._ended, None
        self._stop_timer()
        if ended is not None:
            self._transport.abort()  # what may still come would be taken for the answer to the next
            ended(error)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _head(split: SplitResult) -> str:
    target = (split.path or "/") + (f"?{split.query}" if split.query else "")
    head = f"POST {target} HTTP/1.1\r\nHost: {split.netloc.rpartition('@')[2]}\r\nUser-Agent: slicewise-load\r\n"
    if split.username is not None:
        user = f"{unquote(split.username)}:{unquote(split.password or '')}"
        head += f"Authorization: Basic {base64.b64encode(user.encode()).decode('ascii')}\r\n"
    return head
