"""A server of our protocol, and requests as they are on the wire."""

import asyncio
import contextlib

import uvicorn
from support import random_image
from uvicorn.server import ServerState

from service.http1 import HttpProtocol

IMAGE = random_image(0)


def post(fields="", version="1.1", body=IMAGE, length=True):
    size = f"Content-Length: {len(body)}\r\n" if length else ""
    return f"POST /v1/classify?top_k=3 HTTP/{version}\r\nHost: x\r\n{fields}{size}\r\n".encode() + body


@contextlib.asynccontextmanager
async def listening(app):
    """Where a server of this protocol listens that serves ``app``."""
    config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None)
    config.load()

    def protocol():
        return HttpProtocol(config, ServerState(), {}, head_timeout_s=10)

    async with await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()
