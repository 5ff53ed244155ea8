"""Policies as a caller meets them."""

import asyncio
import re

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
