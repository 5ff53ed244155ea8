"""HTTP/1.1 on the socket: plain requests are parsed in C, all others by h11 (docs/adr/0011).

Parsing in C (httptools) costs less per request, but by itself it drops the body of a request that offers
an upgrade, takes trailers for headers and bounds nothing. So a head is collected here first, within
bounds, and only what is plain goes to httptools: GET or POST, HTTP/1.1, at most one Content-Length, no
Transfer-Encoding, no upgrade, no expectation. At the first other request the connection goes over to
uvicorn's h11 protocol and stays there. Requests are answered one after the other, pipelined or not.

What a client owes is bounded in time as well (docs/adr/0013): the rest of a head that it has begun, and the
rest of a body whose answer is out. A body that is read has a limit of its own (``service/api/bodies.py``).
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import h11
import httptools
import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.bodies import ARRIVED
from service.api.departure import DEPARTURE, Departure
from service.api.problems import problem_bytes
from service.settings import Settings

log = structlog.get_logger()

HEADER_LIMIT_BYTES = 65_536
HEADER_LIMIT_FIELDS = 256
LINGER_S = 1.0
"""How long the rest of a refused request is read and dropped: closing on unread bytes would reset the
connection before the client has read why."""

_PHRASES = {408: "Request Timeout", 431: "Request Header Fields Too Large"}
_END = b"\r\n\r\n"
_START = re.compile(rb"(?:GET|POST) [!-~]+ HTTP/1\.1\r\n")
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]{1,15}) *\r\n")
# obs-fold and a field without a name are among what the last two stand for.
_NOT_PLAIN = (b"\r\ntransfer-encoding", b"\r\nupgrade", b"\r\nexpect", b"\r\n ", b"\r\n\t")


def body_length(head: bytes) -> int | None:
    """Bytes of body behind a plain head, which ends with an empty line; None for a head that is not plain."""
    lower = head.lower()
    if not _START.match(head) or any(token in lower for token in _NOT_PLAIN):
        return None
    if head.count(b"\n") != head.count(b"\r\n") or head.count(b"\r") != head.count(b"\r\n"):
        return None
    lengths = _LENGTH.findall(lower)
    if lower.count(b"\r\ncontent-length") != len(lengths) or len(lengths) > 1:
        return None
    return int(lengths[0]) if lengths else 0


Owed = Literal["", "head", "body"]


class Patience:
    """What the protocols share: the refusal of what is too large, or too slow."""

    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    timeout_keep_alive: int
    timeout_keep_alive_task: asyncio.TimerHandle | None
    timeout_keep_alive_handler: Callable[[], None]
    cycle: Any

    def __init__(self, *args: Any, head_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timeout_s = head_timeout_s
        self._is_refused = False
        self._watched: Owed = ""
        self._timer: asyncio.TimerHandle | None = None

    def _watch(self, owed: Owed) -> None:
        """Give the client time for what it owes from now on; none is spent on requests that arrive whole."""
        if owed == self._watched:
            return
        self._watched = owed
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self._head_timeout_s, self._give_up) if owed else None

    def _stay(self) -> None:
        """After bytes, with which uvicorn ends the wait for the next request: go on waiting where they began none.

        So it is with the rest of a body whose answer was out before it had ended.
        """
        is_waiting = self._is_idle() and not self._watched and not self._is_refused
        if is_waiting and self.timeout_keep_alive_task is None:
            let_go = self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, let_go)

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _give_up(self) -> None:
        if self.transport.is_closing():
            return
        if self._watched == "body":  # its answer is out
            self.transport.close()
            return
        given, allowed = "the header fields did not end", f"{self._head_timeout_s:g} s from the first byte"
        self._refuse(408, "timeout", f"{given} in time; allowed: {allowed}")

    def _refuse(self, status: int, error_type: str, message: str) -> None:
        """Answer and close, soon."""
        self._is_refused = True
        self._watch("")
        identity = os.urandom(16).hex()
        log.debug(error_type, message=message, request_id=identity)
        body = problem_bytes(message, error_type, identity)
        head = (
            f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: {identity}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _refuse_large(self, given: str) -> None:
        allowed = f"allowed: {HEADER_LIMIT_BYTES} bytes in {HEADER_LIMIT_FIELDS} fields"
        self._refuse(431, "headers_too_large", f"{given}; {allowed}")


class _HeadWithBody:
    """The transport of one answer: its head leaves with the beginning of its body, in one write.

    uvicorn writes them one after the other, each at once: the client is woken for a head that it can do nothing with.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None  # b"" when it has left

    def write(self, data: bytes) -> None:
        if self._head is None:
            self._head = data
            return
        self._transport.write(self._head + data if self._head else data)
        self._head = b""

    def close(self) -> None:
        if self._head:  # a body was to come and will not
            self._transport.write(self._head)
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class AnyHttpProtocol(Patience, H11Protocol):
    """One connection from its first request that is not plain."""

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        super().data_received(data)
        self._watch(self._owed())
        self._stay()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch(self._owed())

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch("")
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Called where h11 gives up, in the handler of its error."""
        error = sys.exception()
        if self._watched == "body":  # its answer is out, and there is none to the rest
            self._is_refused = True
            self.transport.close()
        elif self._is_idle() and isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self._refuse_large(f"more than {HEADER_LIMIT_BYTES} bytes of header fields")
        else:
            self._is_refused = True
            super().send_400_response(msg)

    def _owed(self) -> Owed:
        if self._is_refused or self.transport.is_closing() or not self._is_idle():
            return ""
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        # The bytes that wait are copied to be looked at: once for each head.
        is_begun = self._watched == "head" or bool(self.conn.trailing_data[0])
        return "head" if self.conn.their_state is h11.IDLE and is_begun else ""


class HttpProtocol(Patience, HttpToolsProtocol):
    """One connection, as long as its requests are plain."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting = bytearray()  # a head, as far as it is here, or what was pipelined
        self._body_left = 0
        self._departure = Departure()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Who has not asked anything yet is as idle as who was answered.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_keepalive_if_required()
        self._watch("")
        super().connection_lost(exc)
        self._departure.happen()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._is_refused:
            return
        if self._body_left and not self._waiting:  # the common case of a large body, without a copy
            part, data = data[: self._body_left], data[self._body_left :]
            self._feed(part)
        self._waiting += data
        self._advance()
        self._watch(self._owed())
        self._stay()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.cycle is not None:  # no task has run yet, which might write
            self.cycle.transport = cast(asyncio.Transport, _HeadWithBody(self.transport))
            cast(dict[str, Any], self.scope)[DEPARTURE] = self._departure

    def on_message_complete(self) -> None:
        cast(dict[str, Any], self.scope)[ARRIVED] = time.monotonic()  # its task may wait for its turn
        super().on_message_complete()
        self.flow.resume_reading()  # else nobody would see the client leave; what it pipelines has a bound of its own

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._advance()
            self._watch(self._owed())

    def _owed(self) -> Owed:
        if self._is_refused or not self._is_idle():
            return ""
        if self._body_left:
            return "body"
        return "head" if self._waiting else ""

    def _advance(self) -> None:
        """Parse what waits, up to and including the body of the first request that is not answered yet."""
        while self._waiting and not self.transport.is_closing():
            if self._body_left:
                part = bytes(self._waiting[: self._body_left])
                del self._waiting[: len(part)]
                self._feed(part)
                continue
            if not self._is_idle():
                if len(self._waiting) > HEADER_LIMIT_BYTES:
                    self.flow.pause_reading()
                return
            end = self._waiting.find(_END)
            if end < 0 and len(self._waiting) <= HEADER_LIMIT_BYTES:
                return
            if not self._begin(bytes(self._waiting[: end + len(_END)]) if end >= 0 else b""):
                return

    def _begin(self, head: bytes) -> bool:
        """Parse a head, empty where it has no end, and say whether the next bytes are ours as well."""
        if not head or len(head) > HEADER_LIMIT_BYTES:
            self._refuse_large(f"more than {HEADER_LIMIT_BYTES} bytes of header fields")
            return False
        if head.count(b"\r\n") > HEADER_LIMIT_FIELDS + 2:
            self._refuse_large(f"more than {HEADER_LIMIT_FIELDS} header fields")
            return False
        length = body_length(head)
        if length is None:
            self._hand_over()
            return False
        self._unset_keepalive_if_required()
        first = bytes(self._waiting[: len(head) + length])  # with the body, as far as it is here
        del self._waiting[: len(first)]
        self._body_left = length - (len(first) - len(head))
        return self._parse(first)

    def _feed(self, body: bytes) -> None:
        self._body_left -= len(body)
        self._parse(body)

    def _parse(self, data: bytes) -> bool:
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._is_refused = True
            self.send_400_response("Invalid HTTP request received.")
            return False
        return True

    def _hand_over(self) -> None:
        """The connection and what it has sent go to h11."""
        protocol = AnyHttpProtocol(
            self.config, self.server_state, self.app_state, self.loop, head_timeout_s=self._head_timeout_s
        )
        self._watch("")
        self._is_refused = True  # by this protocol: what comes is the other one's
        self.connections.discard(self)
        protocol.connection_made(self.transport)
        self.transport.set_protocol(protocol)
        protocol.data_received(bytes(self._waiting))
        self._waiting.clear()


def server_config(app: FastAPI, settings: Settings, flush_s: int) -> uvicorn.Config:
    """How uvicorn serves ``app``; ``flush_s``: how long answers may take to leave after the drain."""
    protocol = cast(type[asyncio.Protocol], partial(HttpProtocol, head_timeout_s=settings.head_timeout_s))
    return uvicorn.Config(
        app, http=protocol, ws="none", host=settings.host, port=settings.port, log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=int(settings.keep_alive_s), timeout_graceful_shutdown=flush_s,
    )  # fmt: skip
