"""The answer cache as clients see it: in memory, in Redis, and while Redis is away."""

import asyncio
import base64

import numpy as np
import pytest
from redis_server import running_redis
from support import random_image

from service.request import Reason

PNG = {"content-type": "image/png"}
IMAGES = 12


def post(server, seed=0, params=None, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    response = server.client.post("/v1/classify", content=random_image(seed), headers=PNG | named, params=params)
    assert response.status_code == 200, response.text
    return response


def counts(server):
    results = ("hit", "miss", "bypass", "error")
    return {result: server.metric("slicewise_cache_requests_total", result=result) for result in results}


def change(server, before):
    return {result: count - before[result] for result, count in counts(server).items() if count != before[result]}


@pytest.fixture(scope="module", params=["memory", "redis"])
def cached(request, start):
    if request.param == "memory":
        with start(cache_enabled=True) as server:
            yield server
        return
    with running_redis() as redis, start(cache_enabled=True, redis_url=redis.url, redis_timeout_ms=1000) as server:
        yield server


def settled(server, seed):
    """The image's answer, known to the cache from now on: what Redis is told is on its way for a moment."""
    first = post(server, seed)
    for _ in range(100):
        if post(server, seed).json()["cached"]:
            break
    return first


def test_a_hit_is_the_first_answer_and_costs_nothing(cached):
    first = settled(cached, 0)
    spent, images = cached.metric_sum("slicewise_madds_total"), cached.metric_sum("slicewise_images_total")
    before = counts(cached)
    again = post(cached, 0)
    a, b = first.json(), again.json()
    assert (a["cached"], b["cached"]) == (False, True)
    assert b["slice"] == a["slice"]
    assert b["predictions"] == a["predictions"]
    assert again.headers["compute-madds"] == "0"
    for name in ("slice-width", "slice-gate-width", "slice-reason"):
        assert again.headers[name] == first.headers[name]
    assert [b["timings_ms"][stage] for stage in ("decode", "queue", "trunk", "body")] == [0, 0, 0, 0]
    assert cached.metric_sum("slicewise_madds_total") == spent
    assert cached.metric_sum("slicewise_images_total") == images
    assert change(cached, before) == {"hit": 1}
    assert len(post(cached, 0, {"top_k": 10}).json()["predictions"]) == 10


def test_a_forced_slice_and_no_cache_bypass_it(cached):
    settled(cached, 1)
    for headers in ({"slice_width": "widest"}, {"cache_control": "max-age=0, No-Cache"}, {"cache_control": "no-store"}):
        before = counts(cached)
        answer = post(cached, 1, **headers)
        assert not answer.json()["cached"]
        assert int(answer.headers["compute-madds"]) > 0
        assert change(cached, before) == {"bypass": 1}
    assert post(cached, 1, slice_width="auto").json()["cached"]


def test_an_answer_serves_those_whose_budgets_allow_its_slice(cached):
    slices = cached.state.models["tiny"].slices
    for seed in range(IMAGES):
        width = settled(cached, seed).json()["slice"]["width"]
        for facts in slices:
            answer = post(cached, seed, compute_budget=str(facts.madds_served)).json()
            assert answer["cached"] == (facts.width >= width)
            assert answer["slice"]["width"] <= facts.width
        for floor, lowest in (("0.5", 0), ("0.65", 1), ("0.9", 3)):
            answer = post(cached, seed, accuracy_floor=floor).json()
            assert answer["cached"] == (lowest <= width)
            assert answer["slice"]["width"] >= lowest


def test_only_answers_by_gate_and_widened_are_kept(cached):
    narrow = str(cached.state.models["tiny"].slices[0].madds_served)
    for seed in range(100, 100 + IMAGES):
        for _ in range(3):
            body = post(cached, seed, compute_budget=narrow).json()
            if body["slice"]["reason"] != Reason.GATE.value:
                assert not body["cached"]


def test_another_image_and_another_encoding_are_other_keys(cached):
    settled(cached, 2)
    data = random_image(2)
    changed = bytearray(random_image(3))
    assert not cached.client.post("/v1/classify", content=bytes(changed) + b"\0" * 3, headers=PNG).json()["cached"]
    assert cached.client.post("/v1/classify", files={"image": data}).json()["cached"]


def test_batches_and_the_open_inference_protocol_share_it(cached):
    settled(cached, 4)
    files = [("image", random_image(4)), ("image", random_image(300)), ("image", b"rubbish")]
    answer = cached.client.post("/v1/classify/batch", files=files)
    known, fresh, bad = answer.json()["results"]
    assert (known["cached"], fresh["cached"], bad["status"]) == (True, False, 400)
    assert int(answer.headers["compute-madds"]) == fresh["slice"]["madds"]

    before = cached.client.get("/v2/models/tiny/stats").json()["model_stats"][0]
    pixels = {"name": "pixels", "datatype": "FP32", "shape": [1, 3, 16, 16], "data": np.zeros(768).tolist()}
    counted = counts(cached)
    computed = cached.client.post("/v2/models/tiny/infer", json={"inputs": [pixels]})
    assert computed.status_code == 200
    assert change(cached, counted) == {"bypass": 1}
    inputs = [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [_base64(random_image(4))]}]
    outputs = [{"name": name} for name in ("madds", "slice_width", "gate_logits")]
    hit = cached.client.post("/v2/models/tiny/infer", json={"inputs": inputs, "outputs": outputs})
    assert hit.json()["parameters"]["compute_madds"] == 0
    after = cached.client.get("/v2/models/tiny/stats").json()["model_stats"][0]
    assert after["inference_count"] == before["inference_count"] + 1
    assert after["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 2
    hits = [stats["inference_stats"]["cache_hit"]["count"] for stats in (before, after)]
    assert hits[1] == hits[0] + 1


def _base64(data):
    return base64.b64encode(data).decode()


def test_an_answer_that_is_found_after_the_deadline_is_refused_as_any_other(cached, monkeypatch):
    settled(cached, 5)
    decoder = cached.state.pipeline._decoder
    digest = decoder.digest

    async def slow_digest(data):
        await asyncio.sleep(0.05)
        return await digest(data)

    monkeypatch.setattr(decoder, "digest", slow_digest)
    before = counts(cached)
    late = cached.client.post("/v1/classify", content=random_image(5), headers=PNG | {"latency-budget": "20ms"})
    assert (late.status_code, late.json()["error_type"]) == (504, "deadline_exceeded")
    assert late.json()["outcome"] == "expired"
    assert change(cached, before) == {}


def test_without_it_nothing_is_cached_or_counted(server):
    assert [post(server, 5).json()["cached"] for _ in range(3)] == [False] * 3
    assert sum(counts(server).values()) == 0


def test_the_service_starts_without_redis_and_outlives_it(start):
    with running_redis() as redis:
        redis.kill()
        changes = {"redis_url": redis.url, "redis_retry_s": 0.1, "cache_enabled": True, "quota_madds_per_s": 10**9}
        with start(**changes) as server:
            for _ in range(5):
                answer = post(server, 6)
                assert not answer.json()["cached"]
                assert "ratelimit" not in answer.headers
                assert "ratelimit-policy" in answer.headers
            assert counts(server)["error"] == 5
            failures = {kind: server.metric("slicewise_store_failures_total", kind=kind) for kind in ("find", "admit")}
            assert failures == {"find": 5, "admit": 5}
            redis.start()
            _until_cached(server)
            redis.freeze()
            for _ in range(10):
                assert post(server, 6).status_code == 200
            redis.thaw()
            _until_cached(server)
            redis.kill()
            for _ in range(5):
                assert not post(server, 6).json()["cached"]
            redis.start()
            _until_cached(server)
            assert "ratelimit" in post(server, 6).headers


def _until_cached(server):
    for _ in range(500):
        if post(server, 6).json()["cached"]:
            return
    raise AssertionError("the cache did not come back")
