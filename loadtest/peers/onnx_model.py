"""An exported slice on ONNX Runtime, and its answer. Shared by the peers."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

F32 = NDArray[np.float32]

TOP_K = 5


def open_session(graph: Path) -> Any:
    """A session of one thread, which as many callers as there are cores may share."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def logits(session: Any, pixels_NCHW: F32) -> F32:
    """``pixels`` [N, 3, H, W], normalised -> ``logits`` [N, K]."""
    (logits_NK,) = session.run(["logits"], {"pixels": pixels_NCHW})
    return np.asarray(logits_NK, np.float32)


def top_predictions(logits_K: F32) -> list[dict[str, float]]:
    """The likeliest classes with their probabilities, highest first."""
    exponentials_K = np.exp(logits_K - logits_K.max())
    best = np.argsort(-logits_K)[:TOP_K]
    probabilities = exponentials_K[best] / exponentials_K.sum()
    return [{"index": int(k), "probability": float(p)} for k, p in zip(best, probabilities, strict=True)]


def peer_parser(description: str) -> argparse.ArgumentParser:
    """The flags that every peer takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--graph", type=Path, required=True, metavar="FILE.onnx")
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="manifest.json of the checkpoint")
    parser.add_argument("--port", type=int, required=True)
    return parser


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
