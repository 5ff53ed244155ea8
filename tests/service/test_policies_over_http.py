"""Policies as a caller meets them."""

import asyncio
import re
import threading

import httpx
import pytest
from support import random_image

IMAGE = {"content": random_image(0), "headers": {"content-type": "image/png"}}


@pytest.mark.parametrize(("policy", "width"), [("fixed:1", 1), ("fixed:widest", 3), ("maxacc", 3)])
def test_policies_that_never_ask_the_gate(start, policy, width):
    with start(policy=policy) as server:
        answer = server.client.post("/v1/classify", **IMAGE)
        assert answer.json()["slice"] | {"accuracy": None, "madds": 0} == {
            "width": width, "gate_width": None, "widest": 3, "reason": "policy", "madds": 0, "accuracy": None,
        }  # fmt: skip
        assert answer.headers["slice-gate-width"] == "none"
        madds = int(answer.headers["compute-madds"])
        low = server.client.post(
            "/v1/classify", content=IMAGE["content"], headers=IMAGE["headers"] | {"Compute-Budget": str(madds - 1)}
        ).json()
        assert low["slice"]["width"] < width
        assert low["slice"]["reason"] == "compute_budget"


def test_gate_slack_serves_the_wish_while_there_is_time(start):
    with start(policy="gate_slack") as server:
        found = server.client.post("/v1/classify", **IMAGE).json()["slice"]
    assert found["reason"] == "gate"
    assert found["width"] == found["gate_width"]


def test_gate_slack_narrows_under_load_and_says_so(start):
    """With an SLO that nothing can meet all that waits goes to the narrowest slice, and nothing is refused."""
    with start(policy="gate_slack", default_slo_ms=0.001, workers=1) as server:

        async def all_at_once():
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                return await asyncio.gather(*(client.post("/v1/classify", **IMAGE) for _ in range(40)))

        slices = [answer.json()["slice"] for answer in asyncio.run(all_at_once())]
    assert "load" in {found["reason"] for found in slices}
    assert {found["width"] for found in slices if found["reason"] == "load"} == {0}


def test_nobody_is_given_up_for_a_batch_that_finds_no_room_all_the_same(start):
    with start(queue_capacity_images=4, batch_limit_images=4, workers=1) as server:
        model, computing = server.state.models["tiny"], threading.Event()
        engine, go_on = model.batcher._engine, threading.Event()
        whole = engine.trunk

        def slow(images):
            computing.set()
            go_on.wait(20)
            return whole(images)

        engine.trunk = slow

        async def all_of_it():
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

                def post(count, urgency):
                    files = [("image", ("x.png", IMAGE["content"], "image/png"))] * count
                    return client.post("/v1/classify/batch", files=files, headers={"Priority": f"u={urgency}"})

                relaxed = [asyncio.create_task(post(1, 7))]
                await asyncio.to_thread(computing.wait, 20)
                relaxed += [asyncio.create_task(post(1, 7)) for _ in range(3)]
                while model.admitted < 4:
                    await asyncio.sleep(0.005)
                refused = await post(4, 0)  # one of the four is being computed
                asked = asyncio.create_task(post(2, 0))
                while sum(task.done() for task in relaxed) < 2:
                    await asyncio.sleep(0.005)
                go_on.set()
                return refused, await asked, await asyncio.gather(*relaxed)

        refused, urgent, relaxed = asyncio.run(all_of_it())
    assert (refused.status_code, refused.json()["error_type"]) == (503, "queue_full")
    assert "given up" not in refused.text
    assert [result.get("status", 200) for result in urgent.json()["results"]] == [200, 200]
    found = sorted(answer.json()["results"][0].get("status", 200) for answer in relaxed)
    assert found == [200, 200, 503, 503]


def test_a_deadline_that_cannot_be_met_is_refused_with_its_prediction(start):
    with start() as server:
        refused = server.client.post(
            "/v1/classify", content=IMAGE["content"], headers=IMAGE["headers"] | {"Latency-Budget": "0.001ms"}
        )
        metric = server.client.get("/metrics").text
    assert refused.status_code == 504
    assert refused.json()["outcome"] == "refused"
    assert re.search(r"predicted: [0-9.]+ ms at slice 0 with \d+ images waiting", refused.json()["error"])
    assert 'slicewise_budget_requests_total{kind="latency",result="refused"} 1.0' in metric
