"""Composition root: settings in, application out. The lifespan warms the models and drains them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version

import structlog
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from models.checkpoint import Checkpoint, load, resolve
from service import heap
from service.api import classify, open_inference, open_inference_control, openapi, ops, page
from service.api.key_file import KeyFile
from service.api.middleware import LastWord, RequestEnvelope
from service.api.problems import Problems
from service.api.shortcut import Shortcut
from service.api.state import ServiceState
from service.hosting import HostedModel, check_policy, chosen_device, gate_decision, warm_up
from service.images import ImageDecoder
from service.latency import LatencyTable
from service.pipeline import Pipeline
from service.quota import Limit
from service.redis_client import RedisClient
from service.settings import SettingError, Settings
from service.store import Cache, MemoryCache, MemoryQuotas, Quotas, RedisCache, RedisQuotas
from service.telemetry import Telemetry

log = structlog.get_logger()

EXPOSED_HEADERS = [
    "Slice-Width", "Slice-Gate-Width", "Slice-Reason", "Compute-MAdds", "Server-Timing", "X-Request-ID", "Retry-After",
    "RateLimit", "RateLimit-Policy",
    "Inference-Header-Content-Length",
]  # fmt: skip
DRAIN_POLL_S = 0.02


def load_checkpoints(settings: Settings) -> dict[str, Checkpoint]:
    """Read and verify every model that the settings name.

    Raises CheckpointError, which says which is bad, and why; SettingError when one lacks the operating point,
    or the device is not there.
    """
    chosen_device(settings)
    checkpoints = {name: load(resolve(settings.repository, name, None)) for name in settings.model}
    for checkpoint in checkpoints.values():
        gate_decision(checkpoint.manifest, settings)
        check_policy(checkpoint.manifest, settings)
    return checkpoints


def create_app(settings: Settings, checkpoints: Mapping[str, Checkpoint]) -> FastAPI:
    """The application; models warm up in the background once it runs, and /readyz says when they are."""
    telemetry = Telemetry()
    telemetry.build_info.labels(version("slicewise")).set(1)
    is_idle = settings.worker_priority == "idle"
    decoder = ImageDecoder(settings.decoder_threads, settings.image_limit_pixels, are_idle=is_idle)
    stores = Stores(settings, telemetry)
    limit = default_limit(settings)
    keys = None if settings.keys_file is None else KeyFile(settings.keys_file, limit, settings.quota_burst_s)
    has_quotas = keys is not None or limit is not None
    state = ServiceState(
        settings,
        telemetry,
        Pipeline(decoder, telemetry, stores.cache),
        keys,
        stores.quotas if has_quotas else None,
        limit,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(_warm_all(state, checkpoints))
        try:
            yield
        finally:
            warming.cancel()
            await asyncio.gather(warming, return_exceptions=True)
            state.draining = True
            await wait_until_idle(state, settings.drain_limit_s)
            await refuse_the_rest(state)
            decoder.close()
            state.parser.shutdown(wait=False)
            await stores.close()

    app = FastAPI(
        title="Slicewise",
        version=version("slicewise"),
        summary="Serves each image with just the slice of the network that it needs.",
        lifespan=lifespan,
        root_path=settings.root_path,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = state
    openapi.install(app, asks_for_keys=keys is not None)
    for module in (classify, ops, open_inference, open_inference_control, page):
        app.include_router(module.router)
    _surround(app, settings, telemetry)
    return app


def _surround(app: FastAPI, settings: Settings, telemetry: Telemetry) -> None:
    """What stands around the routes, from the innermost to the outermost."""
    problems = Problems(telemetry)
    problems.install(app)
    app.add_middleware(Shortcut, routes=classify.plain_routes(), problems=problems)
    app.add_middleware(LastWord, telemetry=telemetry)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )  # fmt: skip
    app.add_middleware(RequestEnvelope, telemetry=telemetry)


def default_limit(settings: Settings) -> Limit | None:
    """The quota of clients for whom no key names another; SettingError when it is too large to count with."""
    if not settings.quota_madds_per_s:
        return None
    try:
        return Limit(settings.quota_madds_per_s, settings.quota_burst_s)
    except ValueError as error:
        raise SettingError(f"settings quota_madds_per_s and quota_burst_s: {error}") from error


class Stores:
    """What outlives a request and is no model: cached answers and quotas, in Redis or in memory."""

    def __init__(self, settings: Settings, telemetry: Telemetry) -> None:
        self._redis: RedisClient | None = None
        self.cache: Cache | None = None
        self.quotas: Quotas = MemoryQuotas()
        if settings.redis_url is not None:
            timeout_s, url = settings.redis_timeout_ms / 1e3, settings.redis_url.get_secret_value()
            self._redis = RedisClient(url, timeout_s, settings.redis_retry_s, telemetry)
            self.quotas = RedisQuotas(self._redis)
        if settings.cache_enabled and self._redis is not None:
            self.cache = RedisCache(self._redis, settings.cache_ttl_s)
        elif settings.cache_enabled:
            self.cache = MemoryCache(settings.cache_limit_bytes, settings.cache_ttl_s)

    async def close(self) -> None:
        """Send what is on its way, within the bounds of the calls, and close the connections."""
        await self.quotas.close()
        if self.cache is not None:
            await self.cache.close()
        if self._redis is not None:
            await self._redis.close()


async def _warm_all(state: ServiceState, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Build and measure one model after the other on a thread; a failure is logged and stops the service."""
    loop, cancelled = asyncio.get_running_loop(), threading.Event()
    pool = ThreadPoolExecutor(1, thread_name_prefix="warm-up")
    try:
        for name, checkpoint in checkpoints.items():
            warm = await loop.run_in_executor(pool, warm_up, checkpoint, state.settings, cancelled)
            model = HostedModel(checkpoint.manifest, warm, state.settings, state.telemetry, state.overhead)
            heap.settle()
            state.models[name] = model
            log.info(
                "model_ready", model=name, version=model.manifest.version, operating_point=model.operating_point,
                worker_cores=model.worker_cores, latency_ms=_table_ms(warm.table),
            )  # fmt: skip
    except Exception:  # whatever it is, it is logged and ends the service
        log.exception("warm_up_failed")
        state.failed = True
    finally:
        cancelled.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _table_ms(table: LatencyTable) -> dict[str, float]:
    items = table.seconds_by_batch.items()
    return {f"{'trunk' if width is None else width}/{batch}": round(s * 1e3, 2) for (width, batch), s in items}


async def wait_until_idle(state: ServiceState, limit_s: float) -> None:
    """Return when no classification is in work, not even one whose body still arrives, or after ``limit_s``."""
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + limit_s
    while state.active and loop.time() < give_up_s:  # noqa: ASYNC110  # only while draining
        await asyncio.sleep(DRAIN_POLL_S)


async def refuse_the_rest(state: ServiceState) -> None:
    """Answer what is still waiting with 503, and what a worker does not finish with 500. May be repeated."""
    models = (*state.models.values(), *state.retiring)
    await asyncio.gather(*(model.batcher.close(0) for model in models))
