"""Pure ASGI middleware: request id, access log, request counters, and the last word on bugs."""

from __future__ import annotations

import re
import time
from random import getrandbits

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.access import rate_limit_fields
from service.api.budget_headers import request_id
from service.api.problems import CLIENT_CLOSED_REQUEST, PROBES, problem_bytes
from service.telemetry import Telemetry, child

log = structlog.get_logger("service.access")

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


class RequestEnvelope:
    """Outermost layer: every answer carries X-Request-ID, every request is counted and logged once."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self.app, self.telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began_s = time.perf_counter()
        identity = scope["request_id"] = request_id(scope["headers"]) or f"{getrandbits(128):032x}"  # no secret
        status = CLIENT_CLOSED_REQUEST  # until an answer begins

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                about = [(b"x-request-id", identity.encode()), *rate_limit_fields(scope)]
                message["headers"] = [*message["headers"], *about]
            await send(message)

        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=identity, **_trace(scope))
        self.telemetry.in_flight.inc()
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self.telemetry.in_flight.dec()
            template = getattr(scope.get("route"), "path", "unmatched")
            child(self.telemetry.requests, template, str(status)).inc()
            level = log.debug if template in PROBES else log.info
            level(
                "request", method=scope["method"], route=template, status=status,
                duration_ms=round((time.perf_counter() - began_s) * 1e3, 2),
            )  # fmt: skip


class LastWord:
    """Answers what nobody caught: our bugs, in the same form as every other error. Inside CORS."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self.app, self.telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception:
            if scope["type"] != "http":
                raise
            log.exception("internal_error", path=scope["path"])
            self.telemetry.rejections.labels("internal").inc()
            if begun:
                raise
            await _send_internal_error(scope["request_id"], send)


def _trace(scope: Scope) -> dict[str, str]:
    """W3C trace context for the logs; a malformed one is ignored, as the standard asks."""
    headers = dict(scope["headers"])
    match = _TRACEPARENT.fullmatch(headers.get(b"traceparent", b""))
    if match is None:
        return {}
    fields = {"trace_id": match[1].decode(), "parent_id": match[2].decode()}
    state = headers.get(b"tracestate", b"")
    if state and len(state) <= 512 and state.isascii():
        fields["tracestate"] = state.decode()
    return fields


async def _send_internal_error(identity: str, send: Send) -> None:
    body = problem_bytes("internal error; the request id names it in the logs", "internal", identity)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})
