"""Optimised graphs on disk, so that a restart neither exports nor optimises anything.

A graph is kept under a key that names everything it depends on: the network's id, the graph's part of it,
the code that makes it, the versions of PyTorch and ONNX Runtime, and the processor, because the optimiser
lays weights out for the vector unit it finds. Nothing in the folder is ever needed: what is missing,
unreadable or cannot be written is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import structlog
import torch

import models
import service.engine
from service.engine.blocked import keep_blocked, pad_hidden

log = structlog.get_logger()

BLOCKS = (16, 8)
"""Channels per block that ONNX Runtime may have chosen: for AVX-512 and AVX2; the one that computes right is it."""
TOLERANCE = 1e-5
_ERRORS, _FATAL = 3, 4
"""Levels of ONNX Runtime's own log: warnings about constant folding are no news to an operator, and what a
wrong guess of the layout writes is none either."""


class SessionFactory:
    """Makes ONNX Runtime sessions of one checkpoint, by way of the cache. Thread-safe.

    folder       where optimised graphs are kept, in a folder of their own; None: nowhere.
    context      what every graph depends on beside its part and the code: network, processor.
    cancelled    once it is set, no further session is made.
    graph_bytes  size of every graph that was made or found, by part; as it runs.
    """

    def __init__(self, folder: Path | None, *context: str, cancelled: threading.Event | None = None) -> None:
        key = hashlib.sha256("\n".join((*context, code_digest())).encode()).hexdigest()
        self._folder = None if folder is None else folder / key[:32]
        self._cancelled = cancelled or threading.Event()
        self.graph_bytes: dict[str, int] = {}

    def session(self, part: str, export: Callable[[], bytes]) -> ort.InferenceSession:
        """A session for ``part``; ``export`` makes its graph where no optimised one is kept.

        Raises InterruptedError once ``cancelled`` is set.
        """
        if self._cancelled.is_set():
            raise InterruptedError(f"building {part} was cancelled")
        kept = None if self._folder is None else self._folder / f"{part.replace(' ', '-')}.onnx"
        graph = _read(kept) if kept is not None else None
        if kept is not None and graph is not None:
            try:
                # Optimised when it was written; another pass would find nothing and cost what the cache saves.
                session = _start(graph, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
                self.graph_bytes[part] = len(graph)
                with contextlib.suppress(OSError):
                    os.utime(kept.parent)  # it is in use
                return session
            except Exception as error:  # a damaged file raises what the protobuf parser likes
                log.warning("kept_graph_unreadable", file=str(kept), exc_info=error)
        session, graph = _optimised(export())
        self.graph_bytes[part] = len(graph)
        if kept is not None:
            _keep(kept, graph)
        return session


@cache
def code_digest() -> str:
    """Of what turns a checkpoint into a graph: our sources, and the versions of the exporter and the optimiser."""
    sources = hashlib.sha256(f"torch {torch.__version__}, onnxruntime {ort.__version__}".encode())
    for package in (models, service.engine):
        for file in sorted(Path(package.__path__[0]).glob("*.py")):
            sources.update(file.read_bytes())
    return sources.hexdigest()


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("kept_graph_unreadable", file=str(file), error=str(error))
        return None


def _keep(file: Path, graph: bytes) -> None:
    """Write it whole or not at all, also beside other replicas; the service goes on without."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".partial", delete=False) as partial:
            try:
                partial.write(graph)
                partial.flush()
                Path(partial.name).replace(file)
            except BaseException:
                Path(partial.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        log.warning("graph_not_kept", file=str(file), error=str(error))


def _optimised(graph: bytes) -> tuple[ort.InferenceSession, bytes]:
    """A session of ``graph``, fully optimised, and the graph that it runs."""
    graph = pad_hidden(onnx.load_from_string(graph), BLOCKS[0]).SerializeToString()
    with tempfile.TemporaryDirectory(prefix="slicewise-") as folder:
        file = Path(folder) / "graph.onnx"
        plain = _start(graph, ort.GraphOptimizationLevel.ORT_ENABLE_ALL, file)
        written = file.read_bytes()
    exported, optimised = onnx.load_from_string(graph), onnx.load_from_string(written)
    for block in BLOCKS:
        blocked = keep_blocked(exported, optimised, block)
        if blocked is not None:
            serialised = blocked.SerializeToString()
            session = _start(serialised, ort.GraphOptimizationLevel.ORT_DISABLE_ALL, severity=_FATAL)
            if _agree(plain, session):
                return session, serialised
    return plain, written


def _agree(one: ort.InferenceSession, other: ort.InferenceSession) -> bool:
    """Whether both compute the same, but for rounding, for two random images."""
    rng = np.random.default_rng(0)
    feed = {}
    for given in one.get_inputs():
        values = rng.integers(0, 256, (2, *given.shape[1:]))
        feed[given.name] = values.astype(np.uint8) if given.type == "tensor(uint8)" else values.astype(np.float32) / 128
    try:
        pairs = zip(one.run(None, feed), other.run(None, feed), strict=True)
    except Exception as error:  # a layout that does not fit is one that does not agree
        log.debug("layout_does_not_fit", exc_info=error)
        return False
    return all(bool(np.abs(a - b).max() <= TOLERANCE * np.abs(a).max()) for a, b in pairs)


def _start(
    graph: bytes, level: ort.GraphOptimizationLevel, written: Path | None = None, severity: int = _ERRORS
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.graph_optimization_level = level
    options.log_severity_level = severity
    if written is not None:
        options.optimized_model_filepath = str(written)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
