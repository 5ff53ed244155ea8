"""The answers of the Open Inference Protocol v2, as /openapi.json shows them, and what fills them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from service.api.open_inference_request import OUTPUTS
from service.hosting import HostedModel
from service.tally import Sum, Tally

ParameterValue = str | int | float | bool
PLATFORM = "slicewise"


class ServerMetadata(BaseModel):
    """What this server is and which extensions it has."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """Liveness."""

    live: bool


class Ready(BaseModel):
    """Readiness of the server."""

    ready: bool


class ModelReady(BaseModel):
    """Readiness of a model."""

    name: str
    ready: bool


class TensorMetadata(BaseModel):
    """One input or output; -1 stands for the number of images."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """What a model takes, one of its inputs, and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class TensorConfig(BaseModel):
    """One input or output in a model's configuration."""

    name: str
    data_type: str
    dims: list[int]


class InputConfig(TensorConfig):
    """One input; optional, because one of them is enough."""

    optional: bool


class ModelConfig(BaseModel):
    """A model's configuration; max_batch_size 0: dims include the number of images."""

    name: str
    platform: str
    backend: str
    version_policy: dict[str, Any]
    max_batch_size: int
    input: list[InputConfig]
    output: list[TensorConfig]
    parameters: dict[str, dict[str, str]]


class Duration(BaseModel):
    """How often, and the nanoseconds it took altogether."""

    count: int
    ns: int


class InferenceStats(BaseModel):
    """Per image; compute_output per answer. Answers from the cache are among success."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class BatchStats(BaseModel):
    """Batches of one size, whose bodies ran; compute_input and compute_output belong to no batch here."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStats(BaseModel):
    """One served version since it was loaded. last_inference: milliseconds since 1970, 0 before the first."""

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferenceStats
    batch_stats: list[BatchStats]


class Statistics(BaseModel):
    """Of one model or of all."""

    model_stats: list[ModelStats]


class OutputTensor(BaseModel):
    """An output: flat ``data``, or ``binary_data_size`` in its parameters and the bytes behind the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[Any] | None = None


class InferResponse(BaseModel):
    """One answer; parameters repeat the response headers."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, ParameterValue]
    outputs: list[OutputTensor]


class IndexEntry(BaseModel):
    """One model of the repository. state: READY, LOADING, UNLOADING or UNAVAILABLE."""

    name: str
    version: str | None = None
    state: str
    reason: str


def model_metadata(model: HostedModel) -> dict[str, Any]:
    """``ModelMetadata`` as JSON-ready data."""
    shapes = _shapes(model)
    tensors = {name: {"name": name, "datatype": kind, "shape": shape} for name, (kind, shape) in shapes.items()}
    return {
        "name": model.manifest.name,
        "versions": [str(model.manifest.version)],
        "platform": PLATFORM,
        "inputs": [tensors[name] for name in tensors if name not in OUTPUTS],
        "outputs": [tensors[name] for name in OUTPUTS],
    }


def model_config(model: HostedModel, limit_images: int) -> dict[str, Any]:
    """``ModelConfig`` as JSON-ready data."""

    def tensor(about: dict[str, Any]) -> dict[str, Any]:
        kind = "STRING" if about["datatype"] == "BYTES" else about["datatype"]
        return {"name": about["name"], "data_type": f"TYPE_{kind}", "dims": about["shape"]}

    metadata = model_metadata(model)
    return {
        "name": model.manifest.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "version_policy": {"specific": {"versions": [model.manifest.version]}},
        "max_batch_size": 0,
        "input": [{**tensor(about), "optional": True} for about in metadata["inputs"]],
        "output": [tensor(about) for about in metadata["outputs"]],
        "parameters": {
            "limit_images": {"string_value": str(limit_images)},
            "architecture": {"string_value": model.manifest.architecture},
        },
    }


def model_stats(model: HostedModel) -> dict[str, Any]:
    """``ModelStats`` as JSON-ready data."""
    tally: Tally = model.telemetry.tally
    nothing = _duration(Sum())
    return {
        "name": model.manifest.name,
        "version": str(model.manifest.version),
        "last_inference": round(tally.last_unix_s * 1e3),
        "inference_count": tally.success.count - tally.cache_hit.count,
        "execution_count": sum(body.count for body in tally.bodies.values()),
        "inference_stats": {
            "success": _duration(tally.success),
            "fail": _duration(tally.fail),
            "queue": _duration(tally.queue),
            "compute_input": _duration(tally.decode),
            "compute_infer": _duration(tally.infer),
            "compute_output": _duration(tally.encode),
            "cache_hit": _duration(tally.cache_hit),
            "cache_miss": _duration(tally.cache_miss),
        },
        "batch_stats": [
            {"batch_size": rows, "compute_input": nothing, "compute_infer": _duration(body), "compute_output": nothing}
            for rows, body in sorted(tally.bodies.items())
        ],
    }


def _duration(total: Sum) -> dict[str, int]:
    return {"count": total.count, "ns": round(total.seconds * 1e9)}


def _shapes(model: HostedModel) -> dict[str, tuple[str, list[int]]]:
    """Datatype and shape of every tensor."""
    manifest = model.manifest
    axes = {
        "logits": [len(manifest.classes)],
        "probabilities": [len(manifest.classes)],
        "gate_logits": [len(manifest.gate.choices)],
    }
    return {
        "image": ("BYTES", [-1]),
        "pixels": ("FP32", [-1, 3, manifest.input.height, manifest.input.width]),
        **{name: (kind, [-1, *axes.get(name, [])]) for name, kind in OUTPUTS.items()},
    }
