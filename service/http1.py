"""HTTP/1.1 on the socket: uvicorn's parser in C, with two guards that it lacks (docs/adr/0011).

* Header fields are bounded: beyond the bounds the client gets 431 and the connection closes.
* A request that offers an upgrade nobody here speaks (Java's client offers ``h2c`` on every first
  request in clear text) is answered as if it had not: the parser in C would drop its body.
"""

from __future__ import annotations

import os
from typing import Any

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.problems import problem_bytes
from service.settings import Settings

HEADER_LIMIT_BYTES = 65_536
HEADER_LIMIT_FIELDS = 256
_HOP_BY_HOP = (b"upgrade", b"http2-settings", b"connection")


class _HeadersTooLargeError(Exception):
    """Raised inside a callback of the parser, which then stops."""


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = False
        self._head_bytes = self._field_bytes = 0
        self._too_large = ""

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            if self._too_large:
                self._send_431()
            else:
                self.send_400_response("Invalid HTTP request received.")
            return
        if self._in_head:  # fields of which the parser has not told yet: it keeps a long one to itself
            self._head_bytes += len(data)
            if self._head_bytes > HEADER_LIMIT_BYTES:
                self._too_large = f"more than {self._head_bytes} bytes of header fields"
                self._send_431()

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes, self._field_bytes = True, 0, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._field_bytes += len(name) + len(value)
        if self._field_bytes > HEADER_LIMIT_BYTES:
            self._too_large = f"{self._field_bytes} bytes of header fields"
        elif len(self.headers) >= HEADER_LIMIT_FIELDS:
            self._too_large = f"more than {HEADER_LIMIT_FIELDS} header fields"
        if self._too_large:
            raise _HeadersTooLargeError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        """Parse the request once more, as it would have been without its offer, and what follows it."""
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/1.1"]
        lines += [name + b": " + value for name, value in self.headers if name not in _HOP_BY_HOP]
        tokens = [token.strip() for name, value in self.headers if name == b"connection" for token in value.split(b",")]
        if any(token.lower() == b"close" for token in tokens):
            lines.append(b"connection: close")
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(b"\r\n".join([*lines, b"", b""]) + rest)

    def _send_431(self) -> None:
        allowed = f"allowed: {HEADER_LIMIT_BYTES} bytes in {HEADER_LIMIT_FIELDS} fields"
        identity = os.urandom(16).hex()
        body = problem_bytes(f"{self._too_large}; {allowed}", "headers_too_large", identity)
        head = (
            "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: {identity}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def server_config(app: FastAPI, settings: Settings, flush_s: int) -> uvicorn.Config:
    """How uvicorn serves ``app``; ``flush_s``: how long answers may take to leave after the drain."""
    return uvicorn.Config(
        app, http=HttpProtocol, ws="none", host=settings.host, port=settings.port, log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=int(settings.keep_alive_s), timeout_graceful_shutdown=flush_s,
    )  # fmt: skip
