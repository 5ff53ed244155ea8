"""ONNX Runtime on the CPU: one session for the trunk, one per width, shared by all worker threads.

A run uses one thread and releases the interpreter lock, so as many callers as cores keep the machine
busy; that beats one caller with several threads at batch 1 (docs/adr/0002).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
import torch

from models.export import fold_batch_norm, to_onnx
from models.supernet import Supernet
from service.engine.base import F32, TrunkResult


def _session(graph: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # warnings about constant folding are no news to an operator
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class OnnxEngine:
    """All widths of one supernet as sessions, resident at once."""

    name = "onnxruntime"
    device = "cpu"

    def __init__(self, net: Supernet, workers: int) -> None:
        ort.disable_telemetry_events()  # a server reports to its operator alone
        self.workers = workers
        shape = net.input_shape
        x = torch.zeros(2, shape.channels, shape.height, shape.width)
        narrowest = net.subnet(0)
        with torch.no_grad():
            features, gate_input = narrowest.trunk(x)
        self._trunk = _session(to_onnx(fold_batch_norm(narrowest.trunk), (x,), ["images"], ["features", "gate_input"]))
        self._gate = _session(to_onnx(narrowest.slimming, (gate_input,), ["gate_input"], ["gate_logits"]))
        self._bodies = [
            _session(to_onnx(fold_batch_norm(net.subnet(width).body), (features,), ["features"], ["logits"]))
            for width in range(len(net.ladder))
        ]

    def trunk(self, images_CHW: Sequence[F32]) -> TrunkResult:
        features, gate_inputs = self._trunk.run(None, {"images": np.stack(images_CHW)})
        return TrunkResult(features, gate_inputs)

    def gate(self, gate_inputs_NR: F32) -> F32:
        logits_NG: F32 = self._gate.run(None, {"gate_input": gate_inputs_NR})[0]
        return logits_NG

    def body(self, width: int, features: Sequence[F32]) -> F32:
        logits_NK: F32 = self._bodies[width].run(None, {"features": np.stack(features)})[0]
        return logits_NK
