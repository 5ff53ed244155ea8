"""Models, health, metrics and the offline documentation page."""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
import orjson
from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.api.access import GuardedRoute
from service.api.problems import responses
from service.api.schemas import ModelInfo, ModelList, Status, model_info
from service.api.state import state_of
from service.errors import NotFoundError

router = APIRouter(route_class=GuardedRoute)

_STATIC = Path(fastapi_offline.__file__).parent / "static"
_ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")


def _json(data: object) -> Response:
    return Response(orjson.dumps(data), media_type="application/json")


@router.get("/v1/models", response_model=ModelList, responses=responses(401, 503), tags=["models"])
async def list_models(request: Request) -> Response:
    """Every hosted model, the default one first."""
    state = state_of(request)
    return _json({"models": [model_info(state.find(name, None)) for name in state.served]})


@router.get("/v1/models/{model}", response_model=ModelInfo, responses=responses(401, 404, 503), tags=["models"])
async def get_model(request: Request, model: str) -> Response:
    """One hosted model: per slice its cost, parameters, accuracy and measured latency."""
    return _json(model_info(state_of(request).find(model, None)))


@router.get("/healthz", response_model=Status, responses=responses(), tags=["operations"])
async def healthz() -> Response:
    """Alive: the event loop turns."""
    return _json({"status": "alive"})


@router.get("/readyz", response_model=Status, responses=responses(503), tags=["operations"])
async def readyz(request: Request) -> Response:
    """Ready: every model is warm and the service is not draining."""
    state_of(request).check_ready()
    return _json({"status": "ready"})


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **responses()},
    tags=["operations"],
)
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    return Response(generate_latest(state_of(request).telemetry.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """The API, browsable without any other host."""
    root = request.scope.get("root_path", "").rstrip("/")
    script, style, icon = (f"{root}/docs/assets/{name}" for name in _ASSETS)
    return get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title="Slicewise",
        swagger_js_url=script,
        swagger_css_url=style,
        swagger_favicon_url=icon,
    )


@router.get("/docs/assets/{name}", include_in_schema=False)
async def docs_asset(name: str) -> Response:
    """The files of that page."""
    if name not in _ASSETS:
        raise NotFoundError(f"no such file: {name:.100}; there: {', '.join(_ASSETS)}")
    return FileResponse(_STATIC / name)
