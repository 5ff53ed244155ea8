"""An inference request against one model: its images, its budget and the outputs it wants. PURE.

Inputs, one of: ``image`` BYTES [N], encoded images, in JSON as base64; ``pixels`` FP32 [N, 3, H, W], normalised.
Parameters mean what the headers of the same name mean; of two budgets the stricter holds.
"""

from __future__ import annotations

import binascii
import math
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.api.budget_headers import MAX_LATENCY_S, parse_budget
from service.api.open_inference_wire import F32, Call, Parameters, Tensor, Wanted, byte_values, float_values, whole
from service.errors import BadRequestError, TooLargeError
from service.request import Budget, Forced

N = TypeVar("N", int, float, Fraction)

MAX_PIXEL = 1000.0
"""Greatest absolute value of a normalised pixel: real ones are below 10, and far above it networks overflow."""
CLASSIFIED = ("logits", "probabilities")
OUTPUTS = {
    "logits": "FP32",
    "probabilities": "FP32",
    "slice_width": "INT32",
    "gate_logits": "FP32",
    "madds": "INT64",
}
DEFAULT_OUTPUTS = ("probabilities", "slice_width")

_LEAST, _MOST = 1e-12, 10**20
"""Numbers above 0 and beyond these mean the same as they do, and would have more digits than a header may."""
_HEADERS = {
    "compute_budget": b"compute-budget",
    "latency_budget_ms": b"latency-budget",
    "accuracy_floor": b"accuracy-floor",
    "slice_width": b"slice-width",
}


@dataclass(frozen=True, slots=True)
class InputShape:
    """What one model takes: pixels of its input, and images in one request."""

    height: int
    width: int
    limit_images: int


def images_of(call: Call, allowed: InputShape) -> list[bytes] | list[F32]:
    """The images of a request, encoded or as float32 [3, H, W], at least one.

    Raises BadRequestError, and TooLargeError above ``limit_images``.
    """
    tensor = _one_input(call, allowed)
    images = tensor.shape[0]
    if images > allowed.limit_images:
        raise TooLargeError(f"{images} images; allowed: at most {allowed.limit_images} images")
    if images < 1:
        raise BadRequestError(f"input {tensor.name} has shape {list(tensor.shape)}; allowed: at least 1 image")
    if tensor.name == "image":
        return [_image_bytes(value, index) for index, value in enumerate(byte_values(tensor))]
    pixels_NCHW = float_values(tensor)
    for index, pixels_CHW in enumerate(pixels_NCHW):
        _check_pixels(pixels_CHW, index)
    return list(pixels_NCHW)


def wanted_outputs(call: Call, forced: bool) -> tuple[Wanted, ...]:
    """The outputs to answer with; raises BadRequestError for one that is not there.

    forced  whether the request names a slice, so that there is nothing to say of the gate.
    """
    if call.outputs is None:
        return tuple(Wanted(name, call.binary_outputs) for name in DEFAULT_OUTPUTS)
    for wanted in call.outputs:
        if wanted.name not in OUTPUTS:
            raise BadRequestError(f"output {wanted.name!r:.64} is unknown; allowed: {', '.join(OUTPUTS)}")
        if wanted.classes and wanted.name not in CLASSIFIED:
            raise BadRequestError(f"classification of output {wanted.name}; allowed: {', '.join(CLASSIFIED)}")
        if wanted.name == "gate_logits" and forced:
            raise BadRequestError("output gate_logits with a forced slice, which runs no gate; allowed: one of them")
    return call.outputs


def merged_budget(stated: Budget, parameters: Parameters, widest: int) -> Budget:
    """The budget of the headers made stricter by that of the parameters; ``widest``: the ladder's last index.

    A priority among the parameters takes the place of the header's: 0 = the default, p = urgency p - 1, at
    most 7. Raises BadRequestError for malformed parameters and for two different forced slices.
    """
    fields = [(_HEADERS[name], _header(name, parameters[name])) for name in _HEADERS if name in parameters]
    budget = _named(lambda: parse_budget(fields), parameters)
    header, parameter = _index(stated.forced, widest), _index(budget.forced, widest)
    if header is not None and parameter is not None and header != parameter:
        raise BadRequestError(
            f"header Slice-Width forces slice {stated.forced}, parameter slice_width {budget.forced}; "
            "allowed: the same in both"
        )
    return Budget(
        compute_madds=_stricter(min, stated.compute_madds, budget.compute_madds),
        compute_share=_stricter(min, stated.compute_share, budget.compute_share),
        latency_s=_stricter(min, stated.latency_s, _stricter(min, budget.latency_s, _timeout_s(parameters))),
        accuracy_floor=_stricter(max, stated.accuracy_floor, budget.accuracy_floor),
        forced=budget.forced if stated.forced is None else stated.forced,
        urgency=_urgency(parameters, stated.urgency),
    )


def _index(forced: Forced | None, widest: int) -> int | None:
    return {"narrowest": 0, "widest": widest}[forced] if isinstance(forced, str) else forced


def _one_input(call: Call, allowed: InputShape) -> Tensor:
    shapes = {"image": ("BYTES", ()), "pixels": ("FP32", (3, allowed.height, allowed.width))}
    inputs = " or ".join(
        f"{name} {datatype} [N{''.join(f', {size}' for size in shape)}]" for name, (datatype, shape) in shapes.items()
    )
    if len(call.inputs) != 1:
        names = ", ".join(tensor.name[:64] for tensor in call.inputs)
        raise BadRequestError(f"{len(call.inputs)} inputs ({names}); allowed: exactly one, {inputs}")
    tensor = call.inputs[0]
    if tensor.name not in shapes:
        raise BadRequestError(f"input {tensor.name!r:.64} is unknown; allowed: {inputs}")
    datatype, shape = shapes[tensor.name]
    if tensor.datatype != datatype or tensor.shape[1:] != shape:
        raise BadRequestError(
            f"input {tensor.name} is {tensor.datatype:.16} {list(tensor.shape)}; allowed: {inputs}, N images"
        )
    return tensor


def _image_bytes(value: memoryview | str, index: int) -> bytes:
    if isinstance(value, memoryview):
        return bytes(value)
    try:
        return b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequestError(f"input image, element {index}, is not base64, as it must be in JSON: {error}") from error


def _check_pixels(pixels_CHW: NDArray[np.float32], index: int) -> None:
    least, most = pixels_CHW.min(), pixels_CHW.max()
    if not (least >= -MAX_PIXEL and most <= MAX_PIXEL):  # so that NaN, which compares as False, is refused too
        raise BadRequestError(
            f"input pixels, image {index}, has values {least:g}..{most:g}; allowed: finite, within "
            f"{-MAX_PIXEL:g}..{MAX_PIXEL:g}"
        )


def _header(name: str, value: Any) -> bytes:
    """A parameter as the text of its header; numbers without an exponent."""
    if isinstance(value, str) and name != "latency_budget_ms":
        return value[:256].encode()
    if type(value) not in (int, float):
        raise BadRequestError(f"parameter {name} is {str(value)[:64]!r}; allowed: a number, or a header's text")
    if name == "slice_width":
        value = value if (index := whole(value)) is None else index
    elif 0 < value < math.inf:
        value = min(max(value, _LEAST), _MOST)
    return format(Decimal(repr(value)), "f").encode()


def _named(parse: Callable[[], Budget], parameters: Mapping[str, Any]) -> Budget:
    try:
        return parse()
    except BadRequestError as error:
        names = ", ".join(name for name in _HEADERS if name in parameters)
        raise BadRequestError(f"parameters {names}: {error}") from error


def _timeout_s(parameters: Parameters) -> float | None:
    """Seconds of the parameter ``timeout``, which is in microseconds; 0 = none."""
    timeout_us = _integer(parameters, "timeout", "microseconds, 0 for none")
    return min(timeout_us / 1e6, MAX_LATENCY_S) if timeout_us else None


def _urgency(parameters: Parameters, stated: int) -> int:
    priority = _integer(parameters, "priority", "0 for the default, 1 for the most urgent")
    return min(priority - 1, 7) if priority else stated


def _integer(parameters: Parameters, name: str, meaning: str) -> int:
    given = parameters.get(name, 0)
    value = whole(given)
    if value is None:
        raise BadRequestError(f"parameter {name} is {str(given)[:64]!r}; allowed: an integer of at least 0, {meaning}")
    return value


def _stricter(choose: Callable[[N, N], N], one: N | None, other: N | None) -> N | None:
    if one is None or other is None:
        return other if one is None else one
    return choose(one, other)
