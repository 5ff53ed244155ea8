"""LitServe with ONNX Runtime as its documentation advises for CPUs: dynamic batching, a worker process per core.

Raw image bytes in, the five likeliest classes out. The body reaches ``decode_request`` as bytes by
FastAPI's own means (a dependency), because LitServe by itself reads JSON and forms only.
"""
# No postponed annotations here: LitServe inspects those of decode_request and encode_response as they are.

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import litserve
import numpy as np
import orjson
from fastapi import Depends, Request, Response

from loadtest.peers.onnx_model import F32, logits, open_session, peer_parser, top_predictions, usable_cores
from loadtest.peers.preprocess import Transform, load_into

HOST = "127.0.0.1"
MAX_BATCH_SIZE = 16
BATCH_TIMEOUT_S = 0.002
"""How long a worker waits for more images. At 0 it would poll its queue without a pause."""


async def body_of(request: Request) -> bytes:
    """The raw body of a request."""
    return await request.body()


Body = Annotated[bytes, Depends(body_of)]


class OnnxApi(litserve.LitAPI):  # type: ignore[misc, unused-ignore]  # untyped where it is not installed
    """One worker: a batch of images is decoded into one array, and runs through the graph at once."""

    def __init__(self, graph: Path, transform: Transform, max_batch_size: int, batch_timeout_s: float) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout_s)
        self._graph, self._transform = graph, transform

    def setup(self, device: str) -> None:
        """Called once in each worker process."""
        self._session = open_session(self._graph)

    def decode_request(self, request: Body) -> bytes:
        return request

    def batch(self, inputs: list[bytes]) -> F32:
        """Decode straight into the batch's array, which spares a copy of every image."""
        transform = self._transform
        pixels_NCHW = np.empty((len(inputs), 3, transform.height, transform.width), np.float32)
        for data, pixels_CHW in zip(inputs, pixels_NCHW, strict=True):
            load_into(data, transform, pixels_CHW)
        return pixels_NCHW

    def predict(self, x: F32) -> F32:
        return logits(self._session, x)

    def unbatch(self, output: F32) -> list[F32]:
        return list(output)

    def encode_response(self, output: F32) -> Response:
        return Response(orjson.dumps({"predictions": top_predictions(output)}), media_type="application/json")


def main(argv: Sequence[str] | None = None) -> None:
    """Serve ``POST /predict`` and ``GET /health`` until SIGTERM."""
    parser = peer_parser("LitServe + ONNX Runtime")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="worker processes, of one thread each")
    parser.add_argument("--api-servers", type=int, help="HTTP processes; as many as workers when absent")
    parser.add_argument("--max-batch-size", type=int, default=MAX_BATCH_SIZE)
    parser.add_argument("--batch-timeout-s", type=float, default=BATCH_TIMEOUT_S)
    parser.add_argument("--no-fast-queue", dest="fast_queue", action="store_false", help="no ZeroMQ between processes")
    arguments = parser.parse_args(argv)
    transform = Transform.from_manifest(arguments.manifest)
    api = OnnxApi(arguments.graph, transform, arguments.max_batch_size, arguments.batch_timeout_s)
    server: Any = litserve.LitServer(
        api, accelerator="cpu", devices=1, workers_per_device=arguments.workers, fast_queue=arguments.fast_queue
    )
    server.run(
        host=HOST, port=arguments.port, num_api_servers=arguments.api_servers, log_level="warning",
        generate_client_file=False, loop="uvloop", http="httptools", access_log=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
