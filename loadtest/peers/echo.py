"""A server that reads a request and answers: what sockets, HTTP parsing and the ASGI server cost by themselves.

``POST /?delay_ms=50&answer_bytes=600`` is answered after that time with JSON of that length. Waiting as long as
a server that classifies gives this one the same rate of requests; a server with nothing else to do would find
several requests at each wake-up, and spend less on each.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qs

import uvicorn

HOST = "127.0.0.1"
LEAST_ANSWER_BYTES = 2

Event = MutableMapping[str, Any]


@lru_cache(maxsize=64)
def answer(query: bytes) -> tuple[float, bytes]:
    """Seconds to wait, and the body, that a query string asks for."""
    asked = parse_qs(query.decode("ascii"))
    length = max(LEAST_ANSWER_BYTES, int(asked.get("answer_bytes", ["0"])[0]))
    return float(asked.get("delay_ms", ["0"])[0]) / 1e3, b'"' + b"x" * (length - 2) + b'"'


async def app(
    scope: Event, receive: Callable[[], Awaitable[Event]], send: Callable[[Event], Awaitable[None]]
) -> None:  # fmt: skip
    """The ASGI application; any path will do."""
    assert scope["type"] == "http", "uvicorn is told to send nothing else: this is a bug"
    while (await receive()).get("more_body"):
        pass
    delay_s, body = answer(scope["query_string"])
    if delay_s:
        await asyncio.sleep(delay_s)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="Echo")
    parser.add_argument("--port", type=int, required=True)
    uvicorn.run(
        app, host=HOST, port=parser.parse_args(argv).port, loop="uvloop", http="httptools", ws="none", lifespan="off",
        access_log=False, log_level="warning",
    )  # fmt: skip


if __name__ == "__main__":
    main()
