"""Optimised graphs on disk, so that a restart neither exports nor optimises anything.

A graph is kept under a key that names everything it depends on: the network's id, the graph's part of it,
the version of ONNX Runtime and the processor, because the optimiser lays weights out for the vector unit
it finds. Nothing in the folder is ever needed: what is missing, unreadable or cannot be written is built
again.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import structlog

from service.engine.blocked import keep_blocked

log = structlog.get_logger()

BLOCKS = (16, 8)
"""Channels per block that ONNX Runtime may have chosen: for AVX-512 and AVX2; the one that computes right is it."""
TOLERANCE = 1e-5
LAYOUT = 1
"""Raise it when the graphs that the engine builds change."""


def _options(level: ort.GraphOptimizationLevel) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.graph_optimization_level = level
    options.log_severity_level = 3  # warnings about constant folding are no news to an operator
    return options


class SessionFactory:
    """Makes ONNX Runtime sessions of one checkpoint, by way of the cache. Thread-safe.

    folder   where optimised graphs are kept; None: nowhere.
    context  what every graph depends on beside its part: network, processor.
    graph_bytes  size of every graph that was made or found, by part; as optimised where it is kept.
    """

    def __init__(self, folder: Path | None, *context: str) -> None:
        self._folder = folder
        self.graph_bytes: dict[str, int] = {}
        self._context = (*context, f"onnxruntime {ort.__version__}", f"layout {LAYOUT}")

    def session(self, part: str, export: Callable[[], bytes]) -> ort.InferenceSession:
        """A session for ``part``; ``export`` makes its graph where no optimised one is kept."""
        kept = None if self._folder is None else self._file(self._folder, part)
        if kept is not None and kept.exists():
            try:
                session = _load(kept)
                self.graph_bytes[part] = kept.stat().st_size
                return session
            except Exception as error:  # a damaged file raises what the protobuf parser likes
                log.warning("kept_graph_unreadable", file=str(kept), exc_info=error)
        graph = export()
        self.graph_bytes[part] = len(graph)
        session = self._optimise(graph, kept)
        if kept is not None and kept.exists():
            self.graph_bytes[part] = kept.stat().st_size
        return session

    def _file(self, folder: Path, part: str) -> Path:
        key = hashlib.sha256("\n".join((*self._context, part)).encode()).hexdigest()
        return folder / f"{key[:32]}.onnx"

    def _optimise(self, graph: bytes, kept: Path | None) -> ort.InferenceSession:
        try:
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=kept.parent if kept else None) as folder:
                file = Path(folder) / "graph.onnx"
                session = _optimised(graph, file)
                if kept is not None:
                    file.replace(kept)  # whole or not at all, also between replicas
                return session
        except Exception as error:  # no space, read-only, or a graph that cannot be written: serve without
            log.warning("graph_not_kept", file=str(kept), exc_info=error)
            return _start(graph, _options(ort.GraphOptimizationLevel.ORT_ENABLE_ALL))


def _optimised(graph: bytes, file: Path) -> ort.InferenceSession:
    """A session of ``graph``, fully optimised; ``file`` gets what it runs."""
    options = _options(ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    options.optimized_model_filepath = str(file)
    plain = _start(graph, options)
    exported, optimised = onnx.load_from_string(graph), onnx.load(str(file))
    for block in BLOCKS:
        blocked = keep_blocked(exported, optimised, block)
        if blocked is not None:
            session = _start(blocked.SerializeToString(), _options(ort.GraphOptimizationLevel.ORT_DISABLE_ALL))
            if _agree(plain, session):
                file.write_bytes(blocked.SerializeToString())
                return session
    return plain


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


def _start(graph: bytes | str, options: ort.SessionOptions) -> ort.InferenceSession:
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _load(file: Path) -> ort.InferenceSession:
    # Optimised when it was written; another pass finds nothing and costs what the cache saves.
    return _start(str(file), _options(ort.GraphOptimizationLevel.ORT_DISABLE_ALL))
