"""Which answers are kept, under which key, and whom they serve. PURE.

An answer is kept only when it is what the gate wished, or wider: what load, a deadline or a budget narrowed says
nothing of the image. Such an answer, computed at slice k, serves every request whose window holds k: its floor is
at most k and its ceiling admits k. So the client's budgets are no part of the key but decide at the lookup, and
under one key there is at most one answer per slice.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.request import Reason, Route, Window

DIGEST_BYTES = 16
"""128 bits: two images that share a digest are not met by chance, and nobody can make them."""
_FORMAT = 1
_STORABLE = (Reason.GATE, Reason.WIDENED)
_HEAD = struct.Struct("<BBHHIH")  # format, reason, width, gate width, classes K, gate choices G


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a slice made of an image: class logits [K], gate logits [G], and the route that led there."""

    route: Route
    logits_K: NDArray[np.float32]
    gate_logits_G: NDArray[np.float32]


def scope(digest: str, facts: Mapping[str, Any], operating_point: int | None, build: str) -> bytes:
    """16 bytes that answers share if the same model would give them.

    digest           of the model's tensors.
    facts            its manifest as JSON-ready data: input transform, gate and its calibration, ladder.
    operating_point  the budget of the gate: another one wishes other slices.
    build            of the service, whose decoding is part of the answer.
    """
    text = json.dumps([_FORMAT, digest, facts, operating_point, build], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def image_digest(data: bytes) -> bytes:
    """16 bytes that stand for these encoded bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def key(scope_bytes: bytes, digest: bytes) -> str:
    """Under which all answers of one model for one image are kept."""
    return f"{scope_bytes.hex()}:{digest.hex()}"


def storable(route: Route) -> bool:
    """Whether an answer by this route may serve others: only ``gate`` and ``widened`` do."""
    return route.reason in _STORABLE and route.gate_width is not None


def widths(window: Window) -> range:
    """The slices whose answers serve a request; none for a forced slice, which is to be computed."""
    return range(0) if window.forced is not None else range(window.lo, window.hi + 1)


def best(found: Mapping[int, Answer], window: Window) -> Answer | None:
    """The answer of the widest slice that serves the request, as none of them costs anything; None without one."""
    serving = [width for width in widths(window) if width in found]
    return found[serving[-1]] if serving else None


def encode(answer: Answer) -> bytes:
    """An answer as bytes. Raises ValueError for one that may not be stored."""
    route = answer.route
    if not storable(route) or route.gate_width is None:
        raise ValueError(f"an answer by reason {route.reason.value} is not kept; allowed: gate, widened")
    head = _HEAD.pack(
        _FORMAT, _STORABLE.index(route.reason), route.width, route.gate_width,
        len(answer.logits_K), len(answer.gate_logits_G),
    )  # fmt: skip
    logits_K, gate_logits_G = answer.logits_K.astype("<f4"), answer.gate_logits_G.astype("<f4")
    return head + logits_K.tobytes() + gate_logits_G.tobytes()


def decode(data: bytes, width: int, classes: int) -> Answer:
    """The answer in ``data``; ValueError unless it is one of slice ``width`` over ``classes``, with finite numbers."""
    if len(data) < _HEAD.size:
        raise ValueError(f"{len(data)} bytes; allowed: at least {_HEAD.size}")
    version, reason, kept_width, gate_width, logits, gate_logits = _HEAD.unpack_from(data)
    expected = _HEAD.size + 4 * (logits + gate_logits)
    if version != _FORMAT or reason >= len(_STORABLE) or kept_width != width or gate_width > width:
        raise ValueError(f"format {version}, reason {reason}, slice {kept_width}, wish {gate_width} for slice {width}")
    if logits != classes or len(data) != expected:
        raise ValueError(f"{len(data)} bytes with {logits} classes; allowed: {expected} bytes with {classes}")
    numbers = np.frombuffer(data, "<f4", offset=_HEAD.size).astype(np.float32)
    if not np.isfinite(numbers).all():
        raise ValueError("numbers that are not finite")
    return Answer(Route(width, _STORABLE[reason], gate_width), numbers[:logits], numbers[logits:])
