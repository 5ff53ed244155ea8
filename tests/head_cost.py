"""What the guards of service/http1.py cost: python tests/head_cost.py

One connection in this process, without sockets; the application answers at once. Arms take turns, so that what the
machine does meanwhile falls on all of them. Prints microseconds per request: the median of the rounds, their quartiles,
and the median of the differences to the first arm within a round.
"""

import asyncio
import statistics
import time

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.http1 import HttpProtocol

ROUNDS, REQUESTS = 60, 400
BODY = b"x" * 2000
REQUEST = (
    b"POST /v1/classify?top_k=3 HTTP/1.1\r\nHost: localhost:8000\r\nUser-Agent: python-httpx/0.28\r\nAccept: */*\r\n"
    b"Accept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\nContent-Type: image/png\r\nCompute-Budget: 40%%\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)


class NoTimers(HttpProtocol):
    """The bounds on size alone."""

    def _watch(self, owed):
        pass


class Wire(asyncio.Transport):
    """Takes everything and sends nothing."""

    def get_extra_info(self, name, default=None):
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def write(self, data):
        pass

    def is_closing(self):
        return False

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


async def app(scope, receive, send):
    while (await receive())["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def seconds(kind, **options):
    """Of one request, over ``REQUESTS`` on one connection."""
    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None)
    protocol = kind(config, ServerState(), {}, asyncio.get_running_loop(), **options)
    protocol.connection_made(Wire())
    began_s = time.perf_counter()
    for _ in range(REQUESTS):
        protocol.data_received(REQUEST)
        while not protocol.cycle.response_complete:
            await asyncio.sleep(0)
    spent_s = time.perf_counter() - began_s
    protocol._unset_keepalive_if_required()
    return spent_s / REQUESTS


async def main():
    arms = {
        "httptools alone, no bounds": (HttpToolsProtocol, {}),
        "bounds on size": (NoTimers, {"head_timeout_s": 10.0}),
        "bounds on size and time": (HttpProtocol, {"head_timeout_s": 10.0}),
        "h11 alone": (H11Protocol, {}),
    }
    found = {name: [] for name in arms}
    for _ in range(ROUNDS):
        for name, (kind, options) in arms.items():
            found[name].append(1e6 * await seconds(kind, **options))
    first = next(iter(found.values()))
    for name, times in found.items():
        low, middle, high = statistics.quantiles(times, n=4)
        more = statistics.median(one - other for one, other in zip(times, first, strict=True))
        print(f"{name:28} {middle:7.1f} us   {low:.1f} .. {high:.1f}   {more:+.1f} in the median of the rounds")


asyncio.run(main())
