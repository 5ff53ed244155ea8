"""ONNX Runtime on the CPU: one session for the trunk, one per width, shared by all worker threads.

A run uses one thread and releases the interpreter lock, so as many callers as cores keep the machine
busy; that beats one caller with several threads at batch 1 (docs/adr/0002).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import cast

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from models.checkpoint import Checkpoint
from models.export import FromPixels, fold_batch_norm, to_onnx
from models.supernet import Supernet
from models.transform import U8, normalise
from service.engine.base import F32, Exited, Feature, Image, TrunkResult
from service.engine.graphs import SessionFactory, code_digest


class OnnxEngine:
    """All widths of one checkpoint as sessions, resident at once."""

    name = "onnxruntime"
    version = f"{ort.__version__}, code {code_digest()[:12]}"
    device = "cpu"

    def __init__(self, checkpoint: Checkpoint, workers: int, factory: SessionFactory) -> None:
        ort.disable_telemetry_events()  # a server reports to its operator alone
        self.workers = workers
        self._input = checkpoint.manifest.input
        exports = _exports(checkpoint)
        with ThreadPoolExecutor(workers, thread_name_prefix="build") as pool:
            built = dict(zip(exports, pool.map(factory.session, exports, exports.values()), strict=True))
        self._pixels_trunk, self._trunk, self._gate = (built[part] for part in ("pixels_trunk", "trunk", "gate"))
        self.part_bytes: Mapping[str, int] = {part: factory.graph_bytes[part] for part in exports}
        self.has_exit = checkpoint.net.has_exit
        self._bodies = {width: built[_body(width)] for width in _widths_with_body(checkpoint.net)}

    def trunk(self, images: Sequence[Image]) -> TrunkResult:
        if all(image.dtype == np.uint8 for image in images):
            features, gate_inputs = self._pixels_trunk.run(None, {"pixels": np.array(images)})
        else:
            images_NCHW = np.array([self._normalised(image) for image in images])
            features, gate_inputs = self._trunk.run(None, {"images": images_NCHW})
        return TrunkResult(list(map(Exited, features, gate_inputs)) if self.has_exit else features, gate_inputs)

    def _normalised(self, image: Image) -> Image:
        return normalise(cast(U8, image), self._input) if image.dtype == np.uint8 else image

    def gate(self, gate_inputs_NR: F32) -> F32:
        logits_NG: F32 = self._gate.run(None, {"gate_input": gate_inputs_NR})[0]
        return logits_NG

    def body(self, width: int, features: Sequence[Feature]) -> F32:
        if self.has_exit and width == 0:
            return np.array([exited.logits_K for exited in features])
        stacked = np.array([exited.feature for exited in features] if self.has_exit else features)
        logits_NK: F32 = self._bodies[width].run(None, {"features": stacked})[0]
        return logits_NK


def _body(width: int) -> str:
    return f"body {width}"


def _widths_with_body(net: Supernet) -> range:
    return range(int(net.has_exit), len(net.ladder))


def _exports(checkpoint: Checkpoint) -> dict[str, Callable[[], bytes]]:
    """What makes each part's graph, by the part's name."""
    net, shape = checkpoint.net, checkpoint.net.input_shape
    images = torch.zeros(2, shape.channels, shape.height, shape.width)
    pixels = torch.zeros(2, shape.height, shape.width, shape.channels, dtype=torch.uint8)
    with torch.no_grad():
        features, gate_input = net.trunk(images)
    outputs = ["features", "gate_input"]

    def trunk(wrap: Callable[[nn.Module], nn.Module], example: torch.Tensor, name: str) -> bytes:
        return to_onnx(wrap(fold_batch_norm(net.subnet(0).trunk)), (example,), [name], outputs)

    def gate() -> bytes:
        return to_onnx(net.subnet(0).slimming, (gate_input,), ["gate_input"], ["gate_logits"])

    def body(width: int) -> bytes:
        static = net.subnet(width).body
        assert static is not None, "an early exit has no body: this is a bug"
        return to_onnx(fold_batch_norm(static), (features,), ["features"], ["logits"])

    return {
        "trunk": partial(trunk, lambda module: module, images, "images"),
        "pixels_trunk": partial(trunk, lambda module: FromPixels(module, checkpoint.manifest.input), pixels, "pixels"),
        "gate": gate,
        **{_body(width): partial(body, width) for width in _widths_with_body(net)},
    }
