"""A server with faults to order: ``python fake_server.py --port N``. Also importable, for tests in one process."""

import argparse
import asyncio
import dataclasses
import signal
import subprocess
import sys

from aiohttp import web


@dataclasses.dataclass
class Seen:
    """What clients did: bodies with their media types, and the addresses they came from."""

    bodies: list[tuple[str, bytes]] = dataclasses.field(default_factory=list)
    peers: set[tuple[str, int]] = dataclasses.field(default_factory=set)


def create_app(seen: Seen, fail_every: int = 0, item_errors: int = 0, delay_s: float = 0.0) -> web.Application:
    """POST /classify answers 200 with the asked Slice-Width, or 503 at every ``fail_every``-th request."""

    async def classify(request: web.Request) -> web.Response:
        seen.bodies.append((request.content_type, await request.read()))
        seen.peers.add(request.transport.get_extra_info("peername"))
        if fail_every and len(seen.bodies) % fail_every == 0:
            return web.json_response({"error": "no"}, status=503)
        await asyncio.sleep(delay_s)
        answer = {"results": [{"error": "bad", "error_type": "bad_image"}] * item_errors}
        return web.json_response(answer, headers={"Slice-Width": request.headers.get("Slice-Width", "none")})

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.add_routes([web.post("/classify", classify), web.get("/health", health)])
    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--delay-s", type=float, default=0.0)
    parser.add_argument("--fail-every", type=int, default=0)
    parser.add_argument("--child", action="store_true", help="have a child process that computes all the time")
    parser.add_argument("--stubborn", action="store_true", help="ignore SIGTERM")
    arguments = parser.parse_args()
    if arguments.child:
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
    app = create_app(Seen(), arguments.fail_every, delay_s=arguments.delay_s)

    async def serve() -> None:
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", arguments.port).start()
        if arguments.stubborn:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
