"""Errors on the wire: the one table from error to status, and the one body they share."""

from __future__ import annotations

import math
from typing import Any, Literal

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service import errors
from service.telemetry import Telemetry

CLIENT_CLOSED_REQUEST = 499
PROBES = ("/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")
"""Asked every few seconds by machines: neither rejections nor worth a log line."""


class Problem(BaseModel):
    """Body of every error that the application answers."""

    error: str = Field(description="what was given and what is allowed, with units")
    error_type: str
    request_id: str
    feasible: dict[str, float | int | None] | None = Field(
        None, description="422 only: the nearest compute_budget (MAdds) and accuracy_floor that could be granted"
    )
    outcome: Literal["refused", "expired", "late"] | None = Field(
        None, description="504 only: refused before it was queued, expired while it waited, or late in computing"
    )


TABLE: dict[type[errors.SlicewiseError], tuple[int, str]] = {
    errors.BadRequestError: (400, "bad_request"),
    errors.BadImageError: (400, "bad_image"),
    errors.UnauthorizedError: (401, "unauthorized"),
    errors.ForbiddenError: (403, "forbidden"),
    errors.NotFoundError: (404, "not_found"),
    errors.RequestTimeoutError: (408, "timeout"),
    errors.TooLargeError: (413, "too_large"),
    errors.UnsupportedMediaTypeError: (415, "unsupported_media_type"),
    errors.InfeasibleBudgetError: (422, "infeasible_budget"),
    errors.QuotaError: (429, "quota"),
    errors.NotBuiltError: (501, "not_implemented"),
    errors.BackendError: (500, "backend"),
    errors.QueueFullError: (503, "queue_full"),
    errors.DrainingError: (503, "draining"),
    errors.LoadingError: (503, "loading"),
    errors.DeadlineExceededError: (504, "deadline_exceeded"),
}

DESCRIPTIONS = {
    400: "Malformed header, query, JSON or image.",
    401: "No key where one is required, or one that is not known.",
    403: "Switched off, or not for this caller.",
    404: "Unknown model, version or path.",
    405: "Wrong verb.",
    408: "The request's bytes did not arrive in time.",
    413: "Body, pixels or number of images over the limit.",
    415: "Not an image.",
    422: "No slice satisfies the budgets.",
    429: "The client's own compute quota is spent; see Retry-After.",
    431: "More than 64 KiB or 256 header fields.",
    500: "The model failed on this batch, or a bug.",
    501: "An extension that is not built.",
    503: "Queue full, draining or loading; see Retry-After.",
    504: "Deadline unreachable or passed.",
}


def header(description: str, kind: str = "string", required: bool = False) -> dict[str, Any]:
    """OpenAPI declaration of one response header. required: every such answer has it."""
    return {"description": description, "schema": {"type": kind}, "required": required}


REQUEST_ID_HEADER = {
    "X-Request-ID": header("the request's id: echoed, or made here", required=True)
    | {"schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"}}
}
QUOTA_HEADERS = {
    "RateLimit-Policy": header("the client's quota in MAdds, where it has one: q in a window of w seconds"),
    "RateLimit": header("MAdds that are left of it (r), and seconds until it is whole again (t)"),
}
ANY_ROUTE = (405, 408, 431, 500)
"""Statuses that need nothing of a route: a wrong verb, header fields that come too slowly or too many, a bug."""
_RETRY_SECONDS = {"schema": {"type": "integer", "minimum": 1}}
_OWN_HEADERS = {
    401: {"WWW-Authenticate": header("Bearer", required=True)},
    405: {"Allow": header("the verb that is served", required=True)},
    429: {
        "Retry-After": header("whole seconds until the quota admits a request", required=True) | _RETRY_SECONDS,
        **QUOTA_HEADERS,
    },
    503: {"Retry-After": header("whole seconds, predicted from the backlog", required=True) | _RETRY_SECONDS},
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI declarations of these error statuses, and of those that any route can answer."""
    return {
        status: {
            "model": Problem,
            "description": DESCRIPTIONS[status],
            "headers": REQUEST_ID_HEADER | _OWN_HEADERS.get(status, {}),
        }
        for status in sorted({*statuses, *ANY_ROUTE})
    }


def describe(error: errors.SlicewiseError) -> tuple[int, str]:
    """(status, error_type) of an error, by the table."""
    return TABLE[type(error)]


def problem_bytes(message: str, error_type: str, request_id: str, more: dict[str, Any] | None = None) -> bytes:
    """The one JSON body of every error. more: what only some have."""
    return orjson.dumps({"error": message, "error_type": error_type, "request_id": request_id, **(more or {})})


def _more(error: errors.SlicewiseError) -> dict[str, Any]:
    """What an error tells beyond its message."""
    if isinstance(error, errors.InfeasibleBudgetError):
        return {"feasible": error.feasible}
    return {"outcome": error.outcome} if isinstance(error, errors.DeadlineExceededError) else {}


class Problems:
    """Renders every error that the application knows; what it does not know is the middleware's."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._handlers = {
            errors.SlicewiseError: self.known,
            ClientDisconnect: self.departed,
            RequestValidationError: self.invalid,
            HTTPException: self.unrouted,
        }

    def install(self, app: FastAPI) -> None:
        """Register one handler per family of errors."""
        for family, handler in self._handlers.items():
            app.add_exception_handler(family, handler)

    async def answer(self, request: Request, error: Exception) -> Response:
        """What the error's handler answers; raises the error when no handler knows it."""
        for family, handler in self._handlers.items():
            if isinstance(error, family):
                return await handler(request, error)
        raise error

    async def departed(self, _: Request, error: Exception) -> Response:
        """Nobody reads this; the status is for logs and counters, as nginx writes it."""
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def known(self, request: Request, error: Exception) -> Response:
        """One of our own errors, by the table."""
        assert isinstance(error, errors.SlicewiseError), "registered for these only: this is a bug"
        status, error_type = describe(error)
        headers = {}
        if isinstance(error, errors.OverloadError):
            headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        # The rest of the body is not read, so the connection cannot be used again; a client of a service that
        # drains is to find another one, which it does when it connects anew.
        if status in (408, 413) or error_type == "draining":
            headers["connection"] = "close"
        return self._respond(request, status, error_type, str(error), headers, _more(error))

    async def invalid(self, request: Request, error: Exception) -> Response:
        """A query parameter that FastAPI refused."""
        assert isinstance(error, RequestValidationError), "registered for these only: this is a bug"
        parts = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, given {e.get('input')!r:.64}" for e in error.errors()]
        return self._respond(request, 400, "bad_request", "; ".join(parts), {})

    async def unrouted(self, request: Request, error: Exception) -> Response:
        """No such path, or not with this verb."""
        assert isinstance(error, HTTPException), "registered for these only: this is a bug"
        headers = dict(error.headers or {})
        if error.status_code == 405:
            message = f"{request.method} {request.url.path}; allowed: {headers.get('Allow', 'another verb')}"
            return self._respond(request, 405, "method_not_allowed", message, headers)
        if error.status_code == 404:
            return self._respond(request, 404, "not_found", f"no such path: {request.url.path:.200}", headers)
        return self._respond(request, error.status_code, "bad_request", str(error.detail), headers)

    def _respond(  # one per part of the answer
        self, request: Request, status: int, error_type: str, message: str, headers: dict[str, str],
        more: dict[str, Any] | None = None,
    ) -> Response:  # fmt: skip
        if request.scope["path"] not in PROBES:
            self._telemetry.rejections.labels(error_type).inc()
        body = problem_bytes(message, error_type, request.scope["request_id"], more)
        return Response(body, status, headers, media_type="application/json")
