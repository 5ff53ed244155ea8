"""Open Inference Protocol v2: health, metadata, inference and statistics.

An inference request is read as raw bytes, whatever its Content-Type: clients send none with binary data.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from importlib.metadata import version as distribution_version
from typing import Any

import orjson
import structlog
from fastapi import APIRouter, Request, Response

from service import errors
from service.api import budget_headers
from service.api.access import GuardedRoute, admit, bypasses_cache, counting_refusals, granted
from service.api.bodies import arrived_s, read_body
from service.api.departure import while_connected
from service.api.open_inference_documents import INFER, json_body
from service.api.open_inference_outputs import answer_parameters, output_tensors
from service.api.open_inference_request import InputShape, images_of, merged_budget, wanted_outputs
from service.api.open_inference_schemas import (
    InferResponse,
    Live,
    ModelConfig,
    ModelMetadata,
    ModelReady,
    Ready,
    ServerMetadata,
    Statistics,
    model_config,
    model_metadata,
    model_stats,
)
from service.api.open_inference_wire import F32, MOST_LENGTH, Call, Wanted, inflate, json_length, parse_call, render
from service.api.problems import QUOTA_HEADERS, header, responses
from service.api.schemas import answer_headers, log_fields, timings_ms
from service.api.state import Lease, state_of
from service.hosting import HostedModel
from service.pipeline import ImageRequest, before
from service.request import Prediction

router = APIRouter(prefix="/v2", tags=["open inference"], route_class=GuardedRoute)

Answer = Callable[[Request, str, str | None], Coroutine[Any, Any, Response]]
"""What serves one of a model's routes: the request, the model's name, the version if one is named."""

EXTENSIONS = (
    "classification", "binary_tensor_data", "parameters", "schedule_policy", "statistics", "model_configuration",
)  # fmt: skip
LENGTH_HEADER = "Inference-Header-Content-Length"
INLINE_BYTES = 256 * 1024
"""Larger requests are parsed on a thread: they take milliseconds, in which the event loop serves others."""

_NOT_BUILT = (
    "/systemsharedmemory/{rest:path}", "/cudasharedmemory/{rest:path}", "/models/{model}/trace/setting",
    "/trace/setting", "/logging", "/models/{model}/generate", "/models/{model}/generate_stream",
)  # fmt: skip
"""Known paths of extensions that this service does not have: 501 says more than 404."""

_LENGTH = {LENGTH_HEADER: header("bytes of JSON in front of the binary tensors; absent when all is JSON", "integer")}
_MODEL_ERRORS = responses(401, 404, 503)
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_PARAMETERS = [
    *budget_headers.header_parameters(),
    {
        "name": LENGTH_HEADER,
        "in": "header",
        "required": False,
        "description": "bytes of JSON at the start of the body; absent when all of it is JSON",
        "schema": {"type": "integer", "minimum": 0, "maximum": MOST_LENGTH},
    },
]


def _infer_body() -> dict[str, Any]:
    document = json_body(INFER, required=True, parameters=_PARAMETERS)
    document["requestBody"]["content"].update(_BINARY)
    return document


def _json(data: object) -> Response:
    return Response(orjson.dumps(data), media_type="application/json")


@router.get("", response_model=ServerMetadata, responses=responses(401))
async def server_metadata(request: Request) -> Response:
    """What this server is, and the extensions that work."""
    control = ["model_repository"] if state_of(request).settings.model_control == "explicit" else []
    name = "slicewise"
    return _json({"name": name, "version": distribution_version(name), "extensions": [*EXTENSIONS, *control]})


@router.get("/health/live", response_model=Live, responses=responses())
async def live() -> Response:
    """Alive: the event loop turns."""
    return _json({"live": True})


@router.get("/health/ready", response_model=Ready, responses=responses(503))
async def ready(request: Request) -> Response:
    """Ready: every model is warm and the service is not draining."""
    state_of(request).check_ready()
    return _json({"ready": True})


@router.get("/models/stats", response_model=Statistics, responses=responses(401, 503))
async def all_statistics(request: Request) -> Response:
    """What every served model has done since it was loaded."""
    state = state_of(request)
    return _json({"model_stats": [model_stats(state.find(name, None)) for name in state.served]})


async def metadata(request: Request, model: str, version: str | None) -> Response:
    """The tensors that a model takes and gives."""
    return _json(model_metadata(state_of(request).find(model, version)))


async def model_ready(request: Request, model: str, version: str | None) -> Response:
    """Whether a model takes requests."""
    hosted = state_of(request).find(model, version)
    return _json({"name": hosted.manifest.name, "ready": True})


async def config(request: Request, model: str, version: str | None) -> Response:
    """A model's configuration."""
    state = state_of(request)
    return _json(model_config(state.find(model, version), state.settings.batch_limit_images))


async def statistics(request: Request, model: str, version: str | None) -> Response:
    """What a model has done since it was loaded."""
    return _json({"model_stats": [model_stats(state_of(request).find(model, version))]})


async def infer(request: Request, model: str, version: str | None) -> Response:
    """Classify images, each with just the slice of the network that it needs; one that fails fails the call."""
    state = state_of(request)
    await state.answers_first()
    with state.working() as lease:
        received = await _receive(request, lease, model, version)
        hosted = received.model
        predictions = await while_connected(request, state.pipeline.classify_all(hosted, received.images))
    if len(predictions) == 1:
        structlog.contextvars.bind_contextvars(**log_fields(predictions[0], timings_ms(predictions[0].timings)))
    began_s = time.perf_counter()
    response = _answer(request, received, predictions)
    hosted.telemetry.encoded(time.perf_counter() - began_s)
    return response


@dataclass(frozen=True, slots=True)
class _Received:
    """An inference request, understood and not begun. id: as the client gave it."""

    model: HostedModel
    id: str | None
    images: list[ImageRequest]
    outputs: tuple[Wanted, ...]


async def _receive(request: Request, lease: Lease, name: str, version: str | None) -> _Received:
    """Refuse what can be refused before the body is read, then read and parse it."""
    state, settings = state_of(request), state_of(request).settings
    stated = budget_headers.parse_budget(request.scope["headers"])
    counted = granted(request, stated)  # of the key's defaults none binds before the parameters are known
    with counting_refusals(request, counted):
        model = state.find(name, version)
    state.pipeline.precheck(model, stated, counted)
    json_bytes = json_length(_raw(request, LENGTH_HEADER))
    limit = settings.body_limit_bytes if json_bytes is None else settings.batch_body_limit_bytes
    with counting_refusals(request, counted):
        spend = await admit(request)
        body = await read_body(request, lease, limit, settings.body_timeout_s)
    at_s = arrived_s(request)
    model.begun(at_s, time.monotonic())
    spec = model.manifest.input
    allowed = InputShape(spec.height, spec.width, settings.batch_limit_images)
    try:
        with counting_refusals(request, counted):
            parsing = _parsed(request, lease, body, json_bytes, allowed)
            call, images = await before(stated.deadline_s(at_s), "parsed", parsing)
    except errors.DeadlineExceededError:
        state.telemetry.count_budgets(counted, "expired")
        raise
    budget = granted(request, merged_budget(stated, call.parameters, len(model.slices) - 1))
    outputs = wanted_outputs(call, budget.forced is not None)
    window = state.pipeline.precheck(model, budget)
    bypasses = bypasses_cache(request)
    requests = [ImageRequest(image, budget, window, 1, at_s, bypasses, spend) for image in images]
    return _Received(model, call.id, requests, outputs)


def _raw(request: Request, name: str) -> list[bytes]:
    """Every value of a header as it arrived."""
    wanted = name.lower().encode()
    return [value for header_name, value in request.scope["headers"] if header_name == wanted]


async def _parsed(
    request: Request, lease: Lease, body: bytes, json_bytes: int | None, allowed: InputShape
) -> tuple[Call, list[bytes] | list[F32]]:
    """The request in ``body`` and its images; on a thread where it takes long."""
    state, loop = state_of(request), asyncio.get_running_loop()
    settings = state.settings
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        body = await loop.run_in_executor(state.parser, inflate, body, encoding, settings.batch_body_limit_bytes)
        lease.grow(len(body))

    def parse() -> tuple[Call, list[bytes] | list[F32]]:
        call = parse_call(body, json_bytes, settings.body_limit_bytes)
        return call, images_of(call, allowed)

    return parse() if len(body) <= INLINE_BYTES else await loop.run_in_executor(state.parser, parse)


def _answer(request: Request, received: _Received, predictions: Sequence[Prediction]) -> Response:
    """The answer, with what the response headers say repeated among its parameters."""
    manifest = received.model.manifest
    if len(predictions) == 1:
        headers = answer_headers(predictions[0], timings_ms(predictions[0].timings))
    else:
        headers = {"compute-madds": str(sum(prediction.spent_madds for prediction in predictions))}
    about: dict[str, Any] = {"model_name": manifest.name, "model_version": str(manifest.version)}
    if received.id:
        about["id"] = received.id
    about["parameters"] = answer_parameters({**headers, "x-request-id": request.scope["request_id"]})
    body, json_bytes = render(about, output_tensors(received.outputs, predictions, manifest.classes))
    if json_bytes is None:
        return Response(body, headers=headers, media_type="application/json")
    headers[LENGTH_HEADER.lower()] = str(json_bytes)
    return Response(body, headers=headers, media_type="application/octet-stream")


def _serve(verb: str, suffix: str, answer: Answer, declared: dict[str, Any]) -> None:
    """Route ``answer`` for a model's served version, and for a version that is named."""

    async def of_model(request: Request, model: str) -> Response:
        return await answer(request, model, None)

    async def of_version(request: Request, model: str, version: str) -> Response:
        return await answer(request, model, version)

    for path, endpoint in (("/models/{model}", of_model), ("/models/{model}/versions/{version}", of_version)):
        router.add_api_route(
            path + suffix, endpoint, methods=[verb], name=answer.__name__, description=answer.__doc__, **declared
        )


async def not_built(request: Request) -> Response:
    """An extension of the protocol that is not built."""
    raise errors.NotBuiltError(f"{request.url.path:.200} is not built; allowed: the extensions that GET /v2 lists")


_INFER: dict[str, Any] = {
    "response_model": InferResponse,
    "responses": {
        200: {
            "content": _BINARY,
            "headers": {
                "Compute-MAdds": header(
                    "multiply-adds spent, summed over the images; 0 from the cache", "integer", required=True
                ),
                **QUOTA_HEADERS,
                **_LENGTH,
            },
        },
        **responses(400, 401, 404, 413, 415, 422, 429, 501, 503, 504),
    },
    "openapi_extra": _infer_body(),
}


_serve("GET", "", metadata, {"response_model": ModelMetadata, "responses": _MODEL_ERRORS})
_serve("GET", "/ready", model_ready, {"response_model": ModelReady, "responses": _MODEL_ERRORS})
_serve("GET", "/config", config, {"response_model": ModelConfig, "responses": _MODEL_ERRORS})
_serve("GET", "/stats", statistics, {"response_model": Statistics, "responses": _MODEL_ERRORS})
_serve("POST", "/infer", infer, _INFER)
for _path in _NOT_BUILT:
    router.add_api_route(_path, not_built, methods=["GET", "POST"], include_in_schema=False)
