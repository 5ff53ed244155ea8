"""A service with the routes that resilience is tested by, and faults to order: ``python fake_service.py --port N``.

What it answers follows from the image's bytes and the slice, so that each image has answers of its own. It remembers
images: an answer is cached when it was given before.
"""

import argparse
import asyncio
import hashlib

from aiohttp import web

CLASSES, WIDTHS = ("cat", "dog", "owl"), 2
MADDS = 1000


class Service:
    def __init__(self, wrong_every: int, leak: bool) -> None:
        self.wrong_every, self.leak = wrong_every, leak
        self.asked = self.madds = self.open = 0
        self.seen: set[bytes] = set()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/readyz", self.health), web.get("/healthz", self.health), web.get("/metrics", self.metrics),
            web.get("/v1/models/{name}", self.model), web.post("/v1/classify", self.one),
            web.post("/v1/classify/batch", self.many),
        ]  # fmt: skip

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({})

    async def metrics(self, _: web.Request) -> web.Response:
        lines = [
            f"slicewise_in_flight_requests {self.open + 1}.0", 'slicewise_queue_images{width="0"} 0.0',
            f'slicewise_madds_total{{width="0"}} {self.madds}.0',
        ]  # fmt: skip
        return web.Response(text="\n".join(lines) + "\n")

    async def model(self, _: web.Request) -> web.Response:
        return web.json_response({"classes": CLASSES, "slices": [{"width": width} for width in range(WIDTHS)]})

    async def one(self, request: web.Request) -> web.Response:
        body = await request.read()
        if not body.startswith(b"\xff\xd8") or not body.endswith(b"\xff\xd9"):
            return web.json_response({"error": "bad"}, status=400)
        forced = request.headers.get("Slice-Width")
        if forced is None and self.leak:
            self.open += 1
        return web.json_response(self.answer(body, forced), headers={"Compute-MAdds": str(MADDS)})

    async def many(self, request: web.Request) -> web.Response:
        parts = [bytes(await part.read()) async for part in await request.multipart()]
        return web.json_response({"results": [self.answer(part, None) for part in parts]})

    def answer(self, body: bytes, forced: str | None) -> dict[str, object]:
        width, image, cached = int(forced or 1), body, forced is None and body in self.seen
        if forced is None:
            self.asked += 1
            self.seen.add(body)
            if self.wrong_every and self.asked % self.wrong_every == 0:
                image = b"another image"
        self.madds += 0 if cached else MADDS
        digest = hashlib.sha256(image + bytes([width])).digest()
        weights = [1 + digest[place] for place in range(len(CLASSES))]
        predictions = [
            {"index": k, "label": label, "probability": weight / sum(weights)}
            for k, (label, weight) in enumerate(zip(CLASSES, weights, strict=True))
        ]
        return {
            "predictions": predictions, "slice": {"width": width}, "cached": cached, "timings_ms": {"total": 0.05},
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--wrong-every", type=int, default=0)
    parser.add_argument("--leak", action="store_true", help="count requests as in flight that were answered")
    arguments, _ = parser.parse_known_args()  # what the real one is given as well
    service = Service(arguments.wrong_every, arguments.leak)

    async def serve() -> None:
        app = web.Application()
        app.add_routes(service.routes())
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", arguments.port).start()
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
