"""The strongest simple server: FastAPI, one ONNX Runtime session shared by a thread per core, no batching.

Raw image bytes in, the five likeliest classes out. Decoding, resizing, inference and rendering of one
image happen on one pool thread, so that there is one hand-off per request; all of them let go of the GIL.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

from loadtest.peers.onnx_model import F32, logits, open_session, peer_parser, top_predictions, usable_cores
from loadtest.peers.preprocess import Transform, load_into

HOST = "127.0.0.1"


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


def create_app(classifier: Classifier, threads: int) -> FastAPI:
    """``POST /classify`` and ``GET /health``."""
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

    return app


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM."""
    parser = peer_parser("FastAPI + ONNX Runtime")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="images in work at once")
    arguments = parser.parse_args(argv)
    classifier = Classifier(arguments.graph, Transform.from_manifest(arguments.manifest))
    app = create_app(classifier, arguments.threads)
    uvicorn.run(
        app, host=HOST, port=arguments.port, loop="uvloop", http="httptools", access_log=False, log_level="warning"
    )


if __name__ == "__main__":
    main()
