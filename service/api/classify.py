"""POST /v1/classify and /v1/classify/batch: bytes and headers in, predictions and headers out."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

import orjson
import structlog
from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError

from service import errors
from service.api.access import GuardedRoute, admit, bypasses_cache, counting_refusals, granted
from service.api.bodies import arrived_s, image_parts, one_image, read_body
from service.api.budget_headers import header_parameters, parse_budget
from service.api.departure import while_connected
from service.api.problems import QUOTA_HEADERS, describe, header, responses
from service.api.schemas import BatchResponse, ClassifyResponse, answer_headers, image_answer, log_fields, timings_ms
from service.api.state import Lease, ServiceState, state_of
from service.hosting import HostedModel
from service.images import MEDIA_TYPES
from service.pipeline import ImageRequest, check_top_k
from service.request import Budget, Prediction, Window

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_ENCODING = {"encoding": {"image": {"contentType": ", ".join(MEDIA_TYPES)}}}
_PARTS = {
    "schema": {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {"type": "string", "format": "binary"}},
    }
} | _ENCODING
_MANY_PARTS = {
    "schema": {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}},
    }
} | _ENCODING
_JSON = {
    "schema": {
        "type": "object",
        "required": ["image"],
        "additionalProperties": False,
        "properties": {"image": {"type": "string", "format": "byte", "contentEncoding": "base64"}},
    }
}
_SPENT = {
    "Compute-MAdds": header("multiply-adds spent, summed over the images; 0 from the cache", "integer", required=True),
    **QUOTA_HEADERS,
}
_SERVED = {
    "Slice-Width": header("ladder index that was served", "integer", required=True),
    "Slice-Gate-Width": header("what the gate wished; none when a forced width skipped it", required=True),
    "Slice-Reason": header("why this slice", required=True),
    "Server-Timing": header("milliseconds of decode, queue, trunk and body", required=True),
}
_ERRORS = responses(400, 401, 404, 413, 415, 422, 429, 503, 504)


def _body_doc(content: dict[str, Any]) -> dict[str, Any]:
    return {"parameters": header_parameters(), "requestBody": {"required": True, "content": content}}


class ClassifyQuery(BaseModel):
    """The query parameters of a classification."""

    model: str | None = Field(None, description="a hosted model; the first one when absent")
    version: str | None = Field(None, description="its version, an integer; the served one when absent")
    top_k: int | None = Field(None, description="classes to answer with, 1..classes; 5 when absent", ge=1)


_NO_QUERY = ClassifyQuery()


class QueryRoute(GuardedRoute):
    """Calls its endpoint with the request and the validated query, without resolving dependencies anew for each.

    FastAPI documents the endpoint as ever; its general way costs about a tenth of what the event loop spends
    on a request. https://fastapi.tiangolo.com/how-to/custom-request-and-route/
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            answer: Response = await endpoint(request, _query(request))
            return answer

        return self.guarded(handle)


def _query(request: Request) -> ClassifyQuery:
    if not request.scope["query_string"]:
        return _NO_QUERY
    try:
        return ClassifyQuery.model_validate(dict(request.query_params))
    except ValidationError as error:
        faults = [{**fault, "loc": ("query", *fault["loc"])} for fault in error.errors()]
        raise RequestValidationError(faults) from error


router = APIRouter(prefix="/v1", tags=["classification"], route_class=QueryRoute)


@dataclass(frozen=True, slots=True)
class _Received:
    """What every classification starts from: headers and query, parsed, and when the whole body was there."""

    model: HostedModel
    budget: Budget
    allowed: Window
    top_k: int
    arrived_s: float
    bypasses_cache: bool
    spend: Callable[[int], None] | None

    def image(self, data: bytes) -> ImageRequest:
        return ImageRequest(
            data, self.budget, self.allowed, self.top_k, self.arrived_s, self.bypasses_cache, self.spend
        )


async def _receive(request: Request, lease: Lease, query: ClassifyQuery, limit_bytes: int) -> tuple[_Received, bytes]:
    """Refuse what can be refused before the body is read, then read it; last, the body."""
    state = state_of(request)
    budget = granted(request, parse_budget(request.scope["headers"]))
    with counting_refusals(request, budget):
        model = state.find(query.model, query.version)
    top_k = check_top_k(query.top_k, len(model.manifest.classes))
    allowed = state.pipeline.precheck(model, budget)
    with counting_refusals(request, budget):
        spend = await admit(request)
        body = await read_body(request, lease, limit_bytes, state.settings.body_timeout_s)
    at_s = arrived_s(request)
    model.begun(at_s, time.monotonic())
    return _Received(model, budget, allowed, top_k, at_s, bypasses_cache(request), spend), body


@router.post(
    "/classify",
    response_model=ClassifyResponse,
    responses={200: {"headers": _SPENT | _SERVED}, **_ERRORS},
    openapi_extra=_body_doc(
        {**{kind: _BINARY for kind in MEDIA_TYPES}, "multipart/form-data": _PARTS, "application/json": _JSON}
    ),
)
async def classify(request: Request, query: Annotated[ClassifyQuery, Query()]) -> Response:
    """Classify one image with just the slice of the network that it needs."""
    state = state_of(request)
    await state.answers_first()
    with state.working() as lease:
        received, body = await _receive(request, lease, query, state.settings.body_limit_bytes)
        hosted = received.model
        image = received.image(await one_image(request, body))
        del body  # the image is a copy, unless it is the body
        prediction = await while_connected(request, state.pipeline.classify(hosted, image))
    times_ms = timings_ms(prediction.timings)
    structlog.contextvars.bind_contextvars(**log_fields(prediction, times_ms))
    began_s = time.perf_counter()
    answer = _answer(request, hosted, image_answer(hosted, prediction, times_ms))
    headers = answer_headers(prediction, times_ms)
    response = Response(orjson.dumps(answer), headers=headers, media_type="application/json")
    hosted.telemetry.encoded(time.perf_counter() - began_s)
    return response


@router.post(
    "/classify/batch",
    response_model=BatchResponse,
    responses={200: {"headers": _SPENT}, **_ERRORS},
    openapi_extra=_body_doc({"multipart/form-data": _MANY_PARTS}),
)
async def classify_batch(request: Request, query: Annotated[ClassifyQuery, Query()]) -> Response:
    """Classify several images; each is routed on its own, and one bad image fails that item only."""
    state = state_of(request)
    await state.answers_first()
    with state.working() as lease:
        received, parts = await _receive(request, lease, query, state.settings.batch_body_limit_bytes)
        hosted = received.model
        images = await image_parts(request, parts, state.settings.batch_limit_images)
        del parts  # the images are copies
        if not images:
            raise errors.BadRequestError("multipart body has no part 'image'; allowed: at least 1")
        work = [received.image(image) for image in images]
        results = await while_connected(request, state.pipeline.classify_many(hosted, work))
    began_s = time.perf_counter()
    answers = [
        image_answer(hosted, r, timings_ms(r.timings)) if isinstance(r, Prediction) else _image_problem(state, r)
        for r in results
    ]
    spent = sum(result.spent_madds for result in results if isinstance(result, Prediction))
    body = orjson.dumps(_answer(request, hosted, {"results": answers}))
    hosted.telemetry.encoded(time.perf_counter() - began_s)
    return Response(body, headers={"compute-madds": str(spent)}, media_type="application/json")


def _answer(request: Request, model: HostedModel, content: dict[str, Any]) -> dict[str, Any]:
    about = {"model": model.manifest.name, "version": str(model.manifest.version)}
    return about | content | {"request_id": request.scope["request_id"]}


def _image_problem(state: ServiceState, error: errors.SlicewiseError) -> dict[str, Any]:
    status, error_type = describe(error)
    state.telemetry.rejections.labels(error_type).inc()
    return {"error": str(error), "error_type": error_type, "status": status}


def plain_routes() -> list[QueryRoute]:
    """The routes of this module, none of which has path parameters."""
    return [route for route in router.routes if isinstance(route, QueryRoute)]
