"""The strongest simple server: FastAPI, one ONNX Runtime session shared by a thread per core, no batching.

Raw image bytes in, the five likeliest classes out. Decoding, resizing, inference and rendering of one
image happen on one pool thread, so that there is one hand-off per request; all of them let go of the GIL.
With ``--account`` it also says, at ``GET /account``, how much CPU time each of these took.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

from loadtest.peers.onnx_model import F32, logits, open_session, peer_parser, top_predictions, usable_cores
from loadtest.peers.preprocess import Transform, crop_and_resize, decode, load_into, normalise_into

HOST = "127.0.0.1"
STAGES = ("decode", "resize", "normalise", "engine", "answer")
"""What happens to an image, in this order; ``answer`` is the likeliest classes and their JSON."""


class Classifier:
    """Image bytes -> JSON. Called on the pool's threads."""

    def __init__(self, graph: Path, transform: Transform) -> None:
        self._session, self._transform = open_session(graph), transform
        self._local = threading.local()

    def __call__(self, data: bytes) -> bytes:
        """Raises ValueError for bytes that are no image."""
        pixels_NCHW = self._buffer()
        load_into(data, self._transform, pixels_NCHW[0])
        return orjson.dumps({"predictions": top_predictions(logits(self._session, pixels_NCHW)[0])})

    def _buffer(self) -> F32:
        """[1, 3, H, W] of the calling thread, made once."""
        buffer: F32 | None = getattr(self._local, "pixels_NCHW", None)
        if buffer is None:
            buffer = np.empty((1, 3, self._transform.height, self._transform.width), np.float32)
            self._local.pixels_NCHW = buffer
        return buffer


@dataclass(slots=True)
class Totals:
    """Seconds that all images together spent in each of ``STAGES``. Not thread-safe."""

    images: int = 0
    cpu_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    wall_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def add(self, cpu_marks_s: Sequence[float], wall_marks_s: Sequence[float]) -> None:
        """One image: the clocks before the first stage and after each."""
        self.images += 1
        for totals_s, marks_s in ((self.cpu_s, cpu_marks_s), (self.wall_s, wall_marks_s)):
            for stage, before_s, after_s in zip(STAGES, marks_s, marks_s[1:], strict=False):
                totals_s[stage] += after_s - before_s


class AccountedClassifier(Classifier):
    """The same, with the clocks read between the stages."""

    def __init__(self, graph: Path, transform: Transform) -> None:
        super().__init__(graph, transform)
        self._lock, self._totals = threading.Lock(), Totals()

    def __call__(self, data: bytes) -> bytes:
        cpu_s, wall_s = [time.thread_time()], [time.perf_counter()]

        def mark() -> None:
            cpu_s.append(time.thread_time())
            wall_s.append(time.perf_counter())

        pixels_NCHW = self._buffer()
        decoded_HWC = decode(data)
        mark()
        pixels_HWC = crop_and_resize(decoded_HWC, self._transform)
        mark()
        normalise_into(pixels_HWC, self._transform, pixels_NCHW[0])
        mark()
        logits_NK = logits(self._session, pixels_NCHW)
        mark()
        answer = orjson.dumps({"predictions": top_predictions(logits_NK[0])})
        mark()
        with self._lock:
            self._totals.add(cpu_s, wall_s)
        return answer

    def totals(self) -> Totals:
        """A copy of the totals so far."""
        with self._lock:
            return Totals(self._totals.images, dict(self._totals.cpu_s), dict(self._totals.wall_s))


def create_app(classifier: Classifier, threads: int) -> FastAPI:
    """``POST /classify`` and ``GET /health``; ``GET /account`` where the classifier keeps one."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="classify")

    @app.post("/classify")
    async def classify(request: Request) -> Response:
        data = await request.body()
        try:
            answer = await asyncio.get_running_loop().run_in_executor(pool, classifier, data)
        except ValueError as error:
            return Response(orjson.dumps({"error": str(error)}), status_code=400, media_type="application/json")
        return Response(answer, media_type="application/json")

    @app.get("/health")
    async def health() -> Response:
        return Response(b"ok")

    if isinstance(classifier, AccountedClassifier):

        @app.get("/account")
        async def account() -> Response:
            return Response(orjson.dumps(classifier.totals()), media_type="application/json")

    return app


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM."""
    parser = peer_parser("FastAPI + ONNX Runtime")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="images in work at once")
    parser.add_argument("--account", action="store_true", help="clock every stage; GET /account says the totals")
    arguments = parser.parse_args(argv)
    make = AccountedClassifier if arguments.account else Classifier
    classifier = make(arguments.graph, Transform.from_manifest(arguments.manifest))
    app = create_app(classifier, arguments.threads)
    uvicorn.run(
        app, host=HOST, port=arguments.port, loop="uvloop", http="httptools", access_log=False, log_level="warning"
    )


if __name__ == "__main__":
    main()
