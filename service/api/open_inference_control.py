"""Open Inference Protocol v2, model repository extension: index, load and unload.

A version is swapped in between two requests: the new one is warmed beside the old one, takes its name in
one step of the event loop, and the old one is closed when the last request that had found it is answered.
So no request is lost, and each is computed wholly by the version that its answer names.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import structlog
from fastapi import APIRouter, Request, Response

from models.checkpoint import Checkpoint, CheckpointError, load, models_in, read_manifest, resolve, versions
from service import heap
from service.api.access import AdminRoute
from service.api.bodies import read_body
from service.api.open_inference_documents import INDEX, LOAD, UNLOAD, json_body
from service.api.open_inference_schemas import IndexEntry
from service.api.open_inference_wire import parse_object
from service.api.problems import responses
from service.api.state import Lease, ServiceState, state_of
from service.errors import BadRequestError, DrainingError, ForbiddenError, NotBuiltError, NotFoundError
from service.hosting import HostedModel, WarmEngine, check_policy, gate_decision, warm_up
from service.settings import SettingError, Settings

router = APIRouter(prefix="/v2/repository", tags=["open inference"], route_class=AdminRoute)
log = structlog.get_logger()

BODY_LIMIT_BYTES = 65_536
"""Of a request to this extension; its longest honest one is a version policy."""
RETIRE_POLL_S = 0.02

_ERRORS = responses(400, 401, 403, 404, 413, 501, 503)


@router.post(
    "/index",
    response_model=list[IndexEntry],
    response_model_exclude_unset=True,
    responses=responses(400, 401, 403, 413, 503),
    openapi_extra=json_body(INDEX),
)
async def index(request: Request) -> Response:
    """Every model of the repository, and which version of it is served."""
    wanted = await _document(request)
    ready = wanted.get("ready", False)
    if not isinstance(ready, bool):
        raise BadRequestError(f"ready is {str(ready)[:64]!r}; allowed: true or false")
    state = state_of(request)
    there = await asyncio.to_thread(models_in, state.settings.repository)
    entries = [_entry(state, name) for name in sorted({*there, *state.models})]
    return _json([entry for entry in entries if not ready or entry.get("state") == "READY"])


@router.post("/models/{model}/load", response_class=Response, responses=_ERRORS, openapi_extra=json_body(LOAD))
async def load_model(request: Request, model: str) -> Response:
    """Serve a model, or another version of one; answers when requests reach it."""
    state = _controlled(request)
    version = _version(_load_parameters(await _document(request)))
    async with state.changing:
        state.check_ready()
        await _load(state, model, version)
    return Response()


@router.post(
    "/models/{model}/unload",
    response_class=Response,
    responses=_ERRORS,
    openapi_extra=json_body(UNLOAD),
)
async def unload_model(request: Request, model: str) -> Response:
    """Serve a model no more; requests that have found it are still answered."""
    state = _controlled(request)
    await _document(request)
    async with state.changing:
        hosted = state.find(model, None)
        hosted.telemetry.withdraw()
        del state.models[model]
        state.served.remove(model)
        retire(state, hosted)
    log.info("model_unloaded", model=model, version=hosted.manifest.version)
    return Response()


def swap(state: ServiceState, checkpoint: Checkpoint, warm: WarmEngine) -> None:
    """Put a warm model in the place of the one of its name, or beside the others. One step of the event loop."""
    name = checkpoint.manifest.name
    old = state.models.get(name)
    if old is not None:  # gauges that know no version pass from one to the other
        old.telemetry.withdraw()
    state.models[name] = HostedModel(checkpoint.manifest, warm, state.settings, state.telemetry, state.overhead)
    if name not in state.served:
        state.served.append(name)
    if old is not None:
        retire(state, old)


def retire(state: ServiceState, model: HostedModel) -> None:
    """Close a model that no new request can find, once those that have found it are answered."""
    found_it = set(state.leases)
    task = asyncio.create_task(_close_after(state, model, found_it))
    state.retiring[model] = task
    task.add_done_callback(lambda _: state.retiring.pop(model))


async def _close_after(state: ServiceState, model: HostedModel, found_it: set[Lease]) -> None:
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + state.settings.drain_limit_s
    while found_it & state.leases and loop.time() < give_up_s:  # noqa: ASYNC110  # only after a swap
        await asyncio.sleep(RETIRE_POLL_S)
    await model.batcher.close(0)
    heap.settle()  # what is left of it refers to itself


async def _load(state: ServiceState, name: str, version: int | None) -> None:
    """Warm one version and swap it in; nothing to do when it is served already, unchanged.

    Raises NotFoundError for what is not in the repository, BadRequestError for a checkpoint that is damaged
    or does not fit the settings.
    """
    cancelled = threading.Event()
    pool = ThreadPoolExecutor(1, thread_name_prefix="load")
    loop = asyncio.get_running_loop()
    try:
        folder = await loop.run_in_executor(pool, _folder, state.settings.repository, name, version)
        digest = (await loop.run_in_executor(pool, read_manifest, folder)).digest
        hosted = state.models.get(name)
        if hosted and (hosted.manifest.version, hosted.manifest.digest) == (int(folder.name), digest):
            return
        checkpoint = await loop.run_in_executor(pool, _checked, folder, state.settings)
        warm = await loop.run_in_executor(pool, warm_up, checkpoint, state.settings, cancelled)
    except (CheckpointError, SettingError) as error:
        raise BadRequestError(f"model {name:.100} cannot be loaded: {error}") from error
    finally:
        cancelled.set()
        pool.shutdown(wait=False, cancel_futures=True)
    if state.draining:
        raise DrainingError("the service is draining and loads nothing", 1.0)
    swap(state, checkpoint, warm)
    heap.settle()
    log.info("model_ready", model=name, version=checkpoint.manifest.version)


def _folder(root: Path, name: str, version: int | None) -> Path:
    try:
        return resolve(root, name, version)
    except CheckpointError as error:
        raise NotFoundError(str(error)) from error


def _checked(folder: Path, settings: Settings) -> Checkpoint:
    checkpoint = load(folder)
    gate_decision(checkpoint.manifest, settings)
    check_policy(checkpoint.manifest, settings)
    return checkpoint


def _controlled(request: Request) -> ServiceState:
    state = state_of(request)
    if state.settings.model_control != "explicit":
        raise ForbiddenError("setting model_control is none, so models are neither loaded nor unloaded")
    return state


async def _document(request: Request) -> dict[str, Any]:
    """The JSON object of a request; an empty body stands for an empty one."""
    state = state_of(request)
    lease = Lease(state)  # not one of state.working(): a retiring model does not wait for those who replace it
    try:
        body = await read_body(request, lease, BODY_LIMIT_BYTES, state.settings.body_timeout_s)
    finally:
        state.body_bytes -= lease.body_bytes
    return parse_object(body, "request") if body else {}


def _load_parameters(document: dict[str, Any]) -> dict[str, Any]:
    parameters = document.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise BadRequestError(f"parameters is {str(parameters)[:64]!r}; allowed: an object")
    files = [key for key in parameters if key.startswith("file:")]
    if files:
        raise NotBuiltError(f"parameter {files[0][:64]}: files are not taken; allowed: a model of the repository")
    config = parameters.get("config")
    if config is None:
        return {}
    if not isinstance(config, str):
        raise BadRequestError(f"parameter config is {str(config)[:64]!r}; allowed: JSON in a string")
    return parse_object(config.encode(), "parameter config")


def _version(config: dict[str, Any]) -> int | None:
    """The version that a model configuration asks for; None = the highest. Nothing else can be configured."""
    others = config.keys() - {"name", "version_policy"}
    if others:
        raise BadRequestError(f"config has {', '.join(sorted(others))[:100]}; allowed: version_policy")
    policy = config.get("version_policy", {"latest": {}})
    if policy in ({"latest": {}}, {"latest": {"num_versions": 1}}):
        return None
    match policy:
        case {"specific": {"versions": [version]}} if type(version) is int and len(policy) == 1:
            return version
    raise BadRequestError(
        f"version_policy is {str(policy)[:100]}; allowed, as one version is served at a time: "
        '{"latest": {"num_versions": 1}} or {"specific": {"versions": [V]}}'
    )


def _entry(state: ServiceState, name: str) -> dict[str, str]:
    hosted = state.models.get(name)
    if hosted is not None:
        return {"name": name, "version": str(hosted.manifest.version), "state": "READY", "reason": ""}
    if name in state.served:
        there = versions(state.settings.repository, name)
        return {"name": name, "version": str(there[-1]), "state": "LOADING", "reason": ""}
    leaving = [model.manifest.version for model in state.retiring if model.manifest.name == name]
    if leaving:
        return {"name": name, "version": str(leaving[-1]), "state": "UNLOADING", "reason": ""}
    return {"name": name, "state": "UNAVAILABLE", "reason": "not loaded"}


def _json(data: object) -> Response:
    return Response(orjson.dumps(data), media_type="application/json")
