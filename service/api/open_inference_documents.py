"""What requests of the Open Inference Protocol look like, as JSON Schema for /openapi.json.

``open_inference_wire`` and ``open_inference_request`` read them, not these schemas; a contract test sends what they
generate and expects it to be taken. Four promises cannot be said in JSON Schema and are in descriptions instead:
``shape`` counts the elements of ``data``; texts are the base64 of an image that decodes; H, W, the ladder and the
most images in one request are the model's and the service's; and a forced slice may come from a header as well.
"""

from __future__ import annotations

from typing import Any

from service.api.budget_headers import MAX_VALUE_CHARS, PATTERNS
from service.api.open_inference_request import CLASSIFIED, MAX_PIXEL, OUTPUTS

Schema = dict[str, Any]

_MOST = 2**64 - 1
_FLAG = {"type": "boolean"}
_NATURAL = {"type": "integer", "minimum": 0, "maximum": _MOST}
_FREE = {"type": ["object", "null"]}
_PIXEL = {"type": "number", "minimum": -MAX_PIXEL, "maximum": MAX_PIXEL}


def _text_of(header: str) -> Schema:
    return {"type": "string", "maxLength": MAX_VALUE_CHARS, "pattern": PATTERNS[header]}


def _object(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "required": required, "properties": properties}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _lists(depth: int) -> Schema:
    """Pixels in lists up to ``depth`` deep."""
    schema: Schema = {"type": "array", "items": _PIXEL, "minItems": 1}
    for _ in range(depth - 1):
        schema = {"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]}
    return schema


def _size(**bounds: int) -> Schema:
    return {"type": "integer", "minimum": 1, "maximum": _MOST} | bounds


_TENSOR_PARAMETERS = {
    "type": ["object", "null"],
    "properties": {"binary_data_size": False, "shared_memory_region": False},
}
_IMAGE = _object(
    ["name", "datatype", "shape", "data"],
    name={"const": "image"},
    datatype={"const": "BYTES"},
    shape={
        "type": "array", "prefixItems": [_size()], "items": False, "minItems": 1, "maxItems": 1, "description": "[N]",
    },
    parameters=_TENSOR_PARAMETERS,
    data={
        "type": "array",
        "minItems": 1,
        "items": {"type": "string", "format": "byte", "contentEncoding": "base64"},
        "description": "N encoded images as base64",
    },
)  # fmt: skip
_PIXELS = _object(
    ["name", "datatype", "shape", "data"],
    name={"const": "pixels"},
    datatype={"const": "FP32"},
    shape={
        "type": "array",
        "prefixItems": [_size(), {"const": 3}, _size(), _size()],
        "items": False,
        "minItems": 4,
        "maxItems": 4,
        "description": "[N, 3, H, W], of the model's input size",
    },
    parameters=_TENSOR_PARAMETERS,
    data=_lists(4) | {"description": "normalised pixels, flat or nested as the shape"},
)

_PARAMETERS = {
    "type": ["object", "null"],
    "description": "budgets as in the headers of the same name, of two the stricter counts; others are ignored",
    "properties": {
        "compute_budget": {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, _text_of("Compute-Budget")]},
        "latency_budget_ms": {"type": "number", "exclusiveMinimum": 0},
        "accuracy_floor": {
            "anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 1}, _text_of("Accuracy-Floor")]
        },
        "slice_width": {"anyOf": [_NATURAL, _text_of("Slice-Width")]},
        "timeout": _NATURAL | {"description": "microseconds, 0 for none"},
        "priority": _NATURAL | {"description": "0 for the default, 1 for the most urgent"},
        "binary_data_output": _FLAG | {"description": "whether outputs are binary that do not say so themselves"},
        "sequence_id": {"enum": [0, "", False, None], "description": "the sequence extension is not built"},
    },
}


def _output(name: str) -> Schema:
    parameters: Schema = {"binary_data": _FLAG, "shared_memory_region": False, "classification": {"const": 0}}
    if name in CLASSIFIED:
        parameters["classification"] = _NATURAL | {"description": "so many best classes instead of the values"}
    return _object(
        ["name"], name={"const": name}, parameters={"type": ["object", "null"], "properties": parameters}
    )  # fmt: skip


_OUTPUTS = {
    "type": ["array", "null"],
    "description": "probabilities and slice_width when absent, null or empty; each at most once",
    "items": {"oneOf": [_output(name) for name in OUTPUTS]},
    "allOf": [
        {"contains": _object(["name"], name={"const": name}), "minContains": 0, "maxContains": 1} for name in OUTPUTS
    ],
}

INFER = _object(
    ["inputs"],
    id={"type": ["string", "null"], "description": "echoed"},
    parameters=_PARAMETERS,
    inputs={"type": "array", "minItems": 1, "maxItems": 1, "items": {"oneOf": [_IMAGE, _PIXELS]}},
    outputs=_OUTPUTS,
)
"""An inference request that is JSON alone."""

INDEX = _object([], ready=_FLAG | {"default": False, "description": "only models that are served"})
"""Which models to list."""

LOAD = _object(
    [],
    parameters={
        "type": ["object", "null"],
        "patternProperties": {"^file:": False},
        "properties": {
            "config": _nullable(
                {
                    "type": "string",
                    "contentMediaType": "application/json",
                    "description": 'such as {"version_policy": {"specific": {"versions": [3]}}} or {}; the highest '
                    "version when absent",
                }
            )
        },
    },
)
"""What to load."""

UNLOAD = _object([], parameters=_FREE)
"""Nothing has to be said; no model here depends on another, so unload_dependents changes nothing."""


def json_body(schema: Schema, required: bool = False, **others: Any) -> dict[str, Any]:
    """OpenAPI of a JSON request body; ``others``: what else the operation declares."""
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}, **others}
