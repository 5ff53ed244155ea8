"""Many callers at once, good and bad, some of whom leave: right answers, right statuses, an exact ledger."""

import asyncio
import contextlib
import time

import httpx
import pytest
from support import random_image

from models import predictor

PNG = {"content-type": "image/png"}

# (headers, body, expected status); None as the body means a good image.
KINDS = [
    ({}, None, 200),
    ({"compute-budget": "60%"}, None, 200),
    ({"accuracy-floor": "0.65"}, None, 200),
    ({"slice-width": "2"}, None, 200),
    ({"latency-budget": "20s"}, None, 200),
    ({"compute-budget": "0.001k"}, None, 422),
    ({"compute-budget": "lots"}, None, 400),
    ({"slice-width": "9"}, None, 400),
    ({"latency-budget": "0.001ms"}, None, 504),
    ({}, b"rubbish", 400),
    ({"content-type": "text/plain"}, b"rubbish", 415),
]


async def send(client, index):
    headers, body, status = KINDS[index % len(KINDS)]
    image = random_image(index) if body is None else body
    response = await client.post("/v1/classify", content=image, headers=PNG | headers)
    return index, status, response


async def leave_early(port, index):
    """Send a whole request and hang up before, or while, it is answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    image = random_image(index)
    head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(image)}\r\n\r\n"
    writer.write(head.encode() + (image if index % 2 else image[: len(image) // 2]))
    await writer.drain()
    await asyncio.sleep(0.001 * (index % 5))
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    del reader


def wait_until_quiet(server):
    give_up = time.monotonic() + 10
    model = server.state.models["tiny"]
    while model.admitted or model.batcher.waiting or model.batcher._running:
        assert time.monotonic() < give_up, "something hangs"
        time.sleep(0.01)


def check_ledger(server):
    """Trunk MAdds = rows through the trunk times its cost; body MAdds = images at a width times its cost."""
    model = server.state.models["tiny"]
    trunk_madds = model.manifest.slices[0].trunk_madds
    slimming = model.slices[0].madds_served - model.slices[0].madds_published
    rows = server.metric("slicewise_batch_size_sum", model="tiny", width="trunk")
    spent = server.metric_sum("slicewise_madds_total", model="tiny", stage="trunk")
    gated, remainder = divmod(spent - rows * trunk_madds, slimming)
    assert remainder == 0
    assert 0 <= gated <= rows
    for facts in model.slices:
        width = str(facts.width)
        images = server.metric("slicewise_batch_size_sum", model="tiny", width=width)
        body = server.metric("slicewise_madds_total", model="tiny", version="2", width=width, stage="body")
        assert body == images * (facts.madds_published - trunk_madds)
        answered = server.metric("slicewise_images_total", model="tiny", version="2", width=width)
        assert answered <= images
    return rows, gated


def test_200_concurrent_mixed_requests(start, repository):
    offline = predictor.load(repository / "tiny")
    expected = {index: offline.predict(random_image(index)) for index in range(0, 200, len(KINDS))}
    with start(queue_capacity_images=400) as server:

        async def all_at_once():
            limits = httpx.Limits(max_connections=200)
            async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
                good = [send(client, index) for index in range(200)]
                gone = [leave_early(server.port, index) for index in range(40)]
                answers, _ = await asyncio.gather(asyncio.gather(*good), asyncio.gather(*gone))
            return answers

        answers = asyncio.run(all_at_once())
        for index, status, response in answers:
            assert response.status_code == status, (index, response.text)
            if status == 200 and index in expected:
                body = response.json()
                assert body["slice"]["width"] == expected[index].width
                assert body["predictions"][0]["probability"] == pytest.approx(
                    expected[index].predictions[0][1], abs=1e-5
                )
        wait_until_quiet(server)
        rows, _ = check_ledger(server)
        good_count = sum(status == 200 for _, status, _ in answers)
        assert server.metric_sum("slicewise_images_total") >= good_count
        assert rows >= good_count
        forced = server.metric_sum("slicewise_width_decisions_total", gate_width="none")
        assert forced == sum(index % len(KINDS) == 3 for index, _, _ in answers)
        assert server.state.telemetry.in_flight._value.get() == 0


def test_the_ledger_is_exact_to_the_image_when_nobody_leaves(start):
    with start() as server:
        for index in range(30):
            headers = {"slice-width": str(index % 4)} if index % 3 == 0 else {}
            assert (
                server.client.post("/v1/classify", content=random_image(index), headers=PNG | headers).status_code
                == 200
            )
        wait_until_quiet(server)
        rows, gated = check_ledger(server)
        assert (rows, gated) == (30, 20)
        charged = server.metric_sum("slicewise_madds_total")
        model = server.state.models["tiny"]
        served = sum(
            server.metric_sum("slicewise_width_decisions_total", served_width=str(f.width), reason="gate")
            * f.madds_served
            + server.metric_sum("slicewise_width_decisions_total", served_width=str(f.width), reason="forced")
            * f.madds_published
            for f in model.slices
        )
        assert charged == served
