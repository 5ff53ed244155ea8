"""The only reader of the environment and of flags: frozen, with the unit in every name.

Every field is a flag of ``slicewise serve`` (``--body-limit-bytes``) and an environment variable
(``SLICEWISE_BODY_LIMIT_BYTES``); a flag wins. Descriptions state the trade of each bound.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Literal, Self

import platformdirs
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

import models

ZOO = Path(models.__file__).parent / "zoo"

WorkerPriority = Literal["low", "idle"]
"""Of the threads that compute, see the setting."""


class SettingError(ValueError):
    """A setting that is sound by itself and does not fit the models; the message names it."""


class Settings(BaseSettings):
    """Serve image classification, each image with just the slice of the network that it needs."""

    model_config = SettingsConfigDict(
        env_prefix="SLICEWISE_",
        frozen=True,
        cli_kebab_case=True,
        cli_avoid_json=True,
        nested_model_default_partial_update=False,
    )

    repository: Path = Field(ZOO, description="model repository: NAME/VERSION/{model.safetensors,manifest.json}")
    model: Annotated[list[str], NoDecode] = Field(
        ["ds_resnet_cifar10"],
        min_length=1,
        description="models to serve, repeated or separated by commas; the first answers /v1/classify",
    )
    operating_point: int | None = Field(
        None,
        description="index into the operating points of the served models; the model's default when absent. "
        "A cheaper point gives images narrower slices",
    )
    model_control: Literal["none", "explicit"] = Field(
        "none",
        description="explicit lets every client load and unload models of the repository while the service runs; "
        "none answers 403",
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    root_path: str = Field("", description="path prefix under which a proxy serves this application")
    cors_origins: Annotated[list[str], NoDecode] = Field(
        [], description="origins that browsers may call from; none by default"
    )

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto, cpu, cuda or cuda:N; auto takes a GPU where PyTorch finds one",
    )
    engine: Literal["auto", "onnxruntime", "torch"] = Field(
        "auto", description="auto: ONNX Runtime on the CPU, PyTorch on CUDA"
    )
    workers: int = Field(
        0, ge=0, description="batches that run at once; 0 = one per core, on CUDA 1. More than cores only adds waiting"
    )
    worker_priority: WorkerPriority = Field(
        "low",
        description="of the threads that compute, on Linux: low, below that of the event loop; idle, whatever no other "
        "thread wants, so that the loop never waits for a time slice of theirs; decoding threads likewise. Only where "
        "the service has its cores to itself: whatever else runs there would stop it",
    )
    pin_workers: bool | None = Field(
        None,
        description="whether each worker keeps to a core of its own, on Linux and a CPU; absent: where one model is "
        "served, workers are as many as the cores that the service may use in full, and either an image takes the "
        "narrowest slice at least 1 ms or their priority is idle",
    )
    policy: str = Field(
        "gate_slack",
        description="how widths are chosen: gate_slack (the gate, narrowed under load where it costs least), gate "
        "(never moved by load), fixed:INDEX, fixed:widest, slackfit, maxbatch, maxacc (which never look at the image)",
    )
    queue_capacity_images: int = Field(
        256, ge=1, description="images admitted and not answered; a larger queue refuses less and waits longer"
    )
    default_slo_ms: float = Field(
        1000.0,
        gt=0,
        description="time by which a request without Latency-Budget is to be answered: load narrows images to keep it. "
        "Nothing is refused for it",
    )
    slo_target_ratio: float = Field(
        0.99, gt=0, le=1, description="SLO attainment target, exported for dashboards and alerts"
    )
    profile_limit_s: float = Field(
        20.0,
        gt=0,
        le=20,
        description="time to measure the latency table where no profile of this machine is kept, shared by all "
        "models; longer is steadier, and starts later",
    )
    cache_dir: Path | None = Field(
        None,
        description="folder for profiles and optimised graphs of this machine; the user's cache folder when absent. "
        "Where it cannot be written, every start makes them again",
    )

    keys_file: Path | None = Field(
        None, description="TOML file of clients' keys; without one nobody is asked for a key. Read anew when it changes"
    )
    quota_madds_per_s: int = Field(
        0,
        ge=0,
        description="compute that each client may use in the long run; 0 = no quota. A client is a key, or an address "
        "where no keys are asked for",
    )
    quota_burst_s: int = Field(
        10, ge=1, le=86_400, description="seconds of a quota that a client may save up; longer lets it load the "
        "machine alone for longer"
    )  # fmt: skip
    redis_url: SecretStr | None = Field(
        None,
        description="Redis in which replicas share cached answers and quotas; without one each process has its own. "
        "The service runs on without it when it is away",
    )
    redis_timeout_ms: float = Field(
        20.0, gt=0, le=1000, description="time for one call to Redis; shorter gives up sooner, and misses more answers"
    )
    redis_retry_s: float = Field(
        1.0, gt=0, description="after which a Redis that is away is tried again, by a single request that may wait"
    )
    cache_enabled: bool = Field(
        False, description="answer images that were seen before from a cache of answers, at no compute"
    )
    cache_ttl_s: int = Field(
        3600, ge=1, description="how long an answer is kept; it never becomes wrong, longer only holds more memory"
    )
    cache_limit_bytes: int = Field(
        64 * 2**20, ge=1, description="memory of the cache without redis_url; the answers used longest ago go first"
    )

    body_limit_bytes: int = Field(
        10 * 2**20, ge=1, description="largest body of a one-image request; larger photographs cost memory per request"
    )
    batch_body_limit_bytes: int = Field(64 * 2**20, ge=1, description="largest body of /v1/classify/batch")
    bodies_limit_bytes: int = Field(
        512 * 2**20, ge=1, description="memory that all bodies in work may hold; above it requests are refused with 503"
    )
    batch_limit_images: int = Field(64, ge=1, description="most images in one /v1/classify/batch")
    image_limit_pixels: int = Field(
        40_000_000, ge=1, description="most pixels of one image, checked before decoding; each costs 4 to 16 bytes then"
    )
    body_timeout_s: float = Field(
        10.0, gt=0, description="time for a request's bytes to arrive; shorter frees slow clients' memory sooner"
    )
    head_timeout_s: float = Field(
        10.0,
        gt=0,
        description="time for a request's header fields to arrive, from their first byte; shorter frees connections of "
        "slow clients sooner",
    )
    decode_threads: int = Field(
        0, ge=0, description="threads that decode images; 0 = one per core. More only compete with the network"
    )
    keep_alive_s: int = Field(30, ge=1, description="how long an idle connection is kept open")
    drain_limit_s: float = Field(
        20.0, gt=0, description="time for work in flight at SIGTERM; then it is refused with 503"
    )
    drain_delay_s: float = Field(
        1.0, ge=0, description="time to answer 503 on /readyz after SIGTERM before closing the port, for load balancers"
    )
    log_format: Literal["console", "json"] = Field("console", description="how log lines are written")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is written")

    @field_validator("model", "cors_origins", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, list):
            return given
        return [part.strip() for text in given for part in str(text).split(",") if part.strip()]

    @model_validator(mode="after")
    def _a_batch_fits_the_queue(self) -> Self:
        if self.batch_limit_images > self.queue_capacity_images:
            raise ValueError(
                f"batch_limit_images is {self.batch_limit_images}; allowed: at most queue_capacity_images, "
                f"{self.queue_capacity_images}, because a larger batch could never be admitted"
            )
        return self

    @property
    def cache_folder(self) -> Path:
        """Where profiles and graphs are kept; it need not exist."""
        return self.cache_dir or platformdirs.user_cache_path("slicewise")

    @property
    def worker_slots(self) -> int:
        """Batches that run at once on the CPU."""
        return self.workers or usable_cores()

    @property
    def decoder_threads(self) -> int:
        """Threads that decode images."""
        return self.decode_threads or usable_cores()


CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and no more than its container's CPU quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = quota_cores(CPU_MAX)
    return cores if quota is None else min(cores, max(1, math.ceil(quota)))


def quota_cores(file: Path) -> float | None:
    """Cores that a cgroup (v2) may use, in parts, too; None where it has no quota, or is none.

    file  its cpu.max: microseconds, or ``max``, per period of so many microseconds. Source: Linux, cgroup-v2, "CPU".
    """
    try:
        quota, period = map(int, file.read_text().split())
    except (OSError, ValueError):
        return None
    return quota / period


def unknown_variables() -> list[str]:
    """SLICEWISE_* variables that no setting reads: most often a typing mistake."""
    prefix = "SLICEWISE_"
    known = {prefix + name.upper() for name in Settings.model_fields} | {"SLICEWISE_DATA_DIR"}
    return sorted(name for name in os.environ if name.startswith(prefix) and name not in known)
