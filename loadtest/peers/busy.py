"""A server with nothing to do but threads that compute: how late an event loop is where no service is to blame.

``GET /healthz`` is answered by FastAPI, as a service would; the threads hash, for most of the time without the
interpreter lock, as threads that run networks do.
"""

from __future__ import annotations

import argparse
import hashlib
import threading
from collections.abc import Sequence

import uvicorn
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

HOST = "127.0.0.1"
CHUNK_BYTES = 512 * 1024
"""About half a millisecond of work between two moments with the interpreter lock."""


def compute(stop: threading.Event) -> None:
    """Hash until told to stop."""
    chunk = bytes(CHUNK_BYTES)
    while not stop.is_set():
        hashlib.sha256(chunk)


def create_app() -> FastAPI:
    """The application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("ok")

    return app


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="Busy threads beside an event loop")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args(argv)
    stop = threading.Event()
    threads = [threading.Thread(target=compute, args=(stop,)) for _ in range(arguments.threads)]
    for thread in threads:
        thread.start()
    try:
        uvicorn.run(
            create_app(), host=HOST, port=arguments.port, loop="uvloop", http="httptools", ws="none",
            access_log=False, log_level="warning",
        )  # fmt: skip
    finally:
        stop.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
