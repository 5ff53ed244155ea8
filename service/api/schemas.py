"""Answers on the wire, as http clients see them; generated into /openapi.json."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from models.checkpoint import Manifest
from service.hosting import HostedModel
from service.request import Prediction, Timings


class ClassProbability(BaseModel):
    """One class of the answer."""

    index: int
    label: str
    probability: float


class ServedSlice(BaseModel):
    """Which slice answered, and why."""

    width: int = Field(description="ladder index that was served, 0 = narrowest")
    gate_width: int | None = Field(description="what the gate wished; null when a forced width skipped it")
    widest: int = Field(description="the widest ladder index of this model")
    reason: str
    madds: int = Field(description="served multiply-adds of an image at this slice")
    accuracy: float | None = Field(description="top-1 of this slice on the test split; null until measured")


class TimingsMs(BaseModel):
    """Milliseconds; queue = wait before the trunk plus wait in the width's bucket."""

    decode: float
    queue: float
    trunk: float
    body: float
    total: float


class ImageAnswer(BaseModel):
    """The answer for one image of a batch."""

    predictions: list[ClassProbability]
    slice: ServedSlice
    cached: bool = Field(description="computed for an earlier request; Compute-MAdds is 0 then")
    timings_ms: TimingsMs


class ClassifyResponse(ImageAnswer):
    """The answer for one image."""

    model: str
    version: str
    request_id: str


class ImageProblem(BaseModel):
    """The error of one image of a batch."""

    error: str
    error_type: str
    status: int


class BatchResponse(BaseModel):
    """Answers and errors in the order of the parts."""

    model: str
    version: str
    results: list[ImageAnswer | ImageProblem]
    request_id: str


class Resize(BaseModel):
    """Shorter side to this many pixels with this filter, then a centre crop."""

    shorter_side: int
    filter: str
    crop: str


class InputInfo(BaseModel):
    """What the network sees. mean and std per RGB channel on the 0..1 scale."""

    height: int
    width: int
    mean: list[float]
    std: list[float]
    resize: Resize


class OperatingPointInfo(BaseModel):
    """One trade of the gate between accuracy and cost, as measured on the hold-out."""

    lambda_: float = Field(
        alias="lambda", description="probability of being right that the widest slice's whole cost must be worth"
    )
    madds: float = Field(description="mean served multiply-adds per image")
    accuracy: float = Field(description="top-1 with every image at the gate's wish")


class GateInfo(BaseModel):
    """Ladder indices the gate chooses among, and its operating points."""

    choices: list[int]
    operating_points: list[OperatingPointInfo]
    operating_point: int | None = Field(description="index of the one in use; null where the greatest logit wins")


class SliceInfo(BaseModel):
    """One rung of the ladder. latency_ms: trunk, gate and body together, per batch size, on this machine."""

    width: int
    madds_published: int
    madds_served: int
    parameters: int
    accuracy: float | None
    latency_ms: dict[str, float]


class ModelInfo(BaseModel):
    """One hosted model."""

    name: str
    version: str
    architecture: str
    classes: list[str]
    input: InputInfo
    gate: GateInfo
    slices: list[SliceInfo]


class ModelList(BaseModel):
    """All hosted models; the first is the default."""

    models: list[ModelInfo]


class Status(BaseModel):
    """Liveness and readiness."""

    status: str


def timings_ms(timings: Timings) -> dict[str, float]:
    """Milliseconds by stage, to the microsecond."""
    return {
        "decode": round(timings.decode_s * 1e3, 3),
        "queue": round(timings.queue_s * 1e3, 3),
        "trunk": round(timings.trunk_s * 1e3, 3),
        "body": round(timings.body_s * 1e3, 3),
        "total": round(timings.total_s * 1e3, 3),
    }


def image_answer(model: HostedModel, prediction: Prediction, times_ms: dict[str, float]) -> dict[str, Any]:
    """``ImageAnswer`` as JSON-ready data. times_ms: the prediction's, from ``timings_ms``, here and below."""
    route = prediction.route
    return {
        "predictions": [
            {"index": index, "label": model.manifest.classes[index], "probability": probability}
            for index, probability in zip(prediction.indices, prediction.probabilities, strict=True)
        ],
        "slice": {
            "width": route.width,
            "gate_width": route.gate_width,
            "widest": len(model.slices) - 1,
            "reason": route.reason.value,
            "madds": prediction.madds,
            "accuracy": model.slices[route.width].accuracy,
        },
        "cached": prediction.cached,
        "timings_ms": times_ms,
    }


def answer_headers(prediction: Prediction, times_ms: dict[str, float]) -> dict[str, str]:
    """The response headers of a one-image answer."""
    route = prediction.route
    return {
        "slice-width": str(route.width),
        "slice-gate-width": "none" if route.gate_width is None else str(route.gate_width),
        "slice-reason": route.reason.value,
        "compute-madds": str(prediction.spent_madds),
        "server-timing": ", ".join([f"{name};dur={ms}" for name, ms in times_ms.items() if name != "total"]),
    }


def log_fields(prediction: Prediction, times_ms: dict[str, float]) -> dict[str, Any]:
    """What the request's log line says of its image."""
    route = prediction.route
    return {
        "width": route.width,
        "gate_width": route.gate_width,
        "reason": route.reason.value,
        "cached": prediction.cached,
        **{f"{name}_ms": ms for name, ms in times_ms.items()},
    }


def model_info(model: HostedModel) -> dict[str, Any]:
    """``ModelInfo`` as JSON-ready data."""
    manifest: Manifest = model.manifest
    batches = [batch for width, batch in model.table.seconds_by_batch if width is None]
    return {
        "name": manifest.name,
        "version": str(manifest.version),
        "architecture": manifest.architecture,
        "classes": list(manifest.classes),
        "input": manifest.input.to_json(),
        "gate": {
            "choices": list(manifest.gate.choices),
            "operating_points": [
                {"lambda": point.lambda_, "madds": point.madds, "accuracy": point.accuracy}
                for point in manifest.gate.operating_points
            ],
            "operating_point": model.operating_point,
        },
        "slices": [
            {
                "width": record.width,
                "madds_published": record.madds_published,
                "madds_served": record.madds_served,
                "parameters": record.parameters,
                "accuracy": record.test_accuracy,
                "latency_ms": {
                    str(batch): round(
                        1e3 * (model.table.seconds(None, batch) + model.table.seconds(record.width, batch)), 3
                    )
                    for batch in batches
                },
            }
            for record in manifest.slices
        ],
    }
