import base64
import math

import numpy as np
import pytest
from support import random_image

from models import predictor
from service.api.schemas import BatchResponse, ClassifyResponse, ModelInfo
from service.latency import Overhead

PNG = {"content-type": "image/png"}


def post(client, seed=0, params=None, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post("/v1/classify", content=random_image(seed), headers=PNG | named, params=params)


@pytest.fixture(scope="module")
def info(client):
    return ModelInfo.model_validate(client.get("/v1/models/tiny").json())


@pytest.fixture(scope="module")
def offline(repository):
    return predictor.load(repository / "tiny")


def test_an_image_is_answered_as_the_checkpoint_answers_it_offline(client, offline):
    widths = set()
    for seed in range(12):
        expected = offline.predict(random_image(seed))
        answer = ClassifyResponse.model_validate(post(client, seed).json())
        widths.add(answer.slice.width)
        assert answer.slice.width == expected.width
        assert answer.slice.reason == "gate"
        assert answer.slice.madds == expected.madds
        assert [p.label for p in answer.predictions] == [label for label, _ in expected.predictions]
        for got, (_, probability) in zip(answer.predictions, expected.predictions, strict=True):
            assert got.probability == pytest.approx(probability, abs=1e-5)
    assert len(widths) > 1, "the gate of the test network must choose, or this test shows little"


def test_headers_repeat_the_body(client):
    response = post(client, x_request_id="abc-1.2_3")
    body = ClassifyResponse.model_validate(response.json())
    assert response.headers["slice-width"] == str(body.slice.width)
    assert response.headers["slice-gate-width"] == str(body.slice.gate_width)
    assert response.headers["slice-reason"] == body.slice.reason
    assert response.headers["compute-madds"] == str(body.slice.madds)
    timing = body.timings_ms
    assert response.headers["server-timing"] == (
        f"decode;dur={timing.decode}, queue;dur={timing.queue}, trunk;dur={timing.trunk}, body;dur={timing.body}"
    )
    assert response.headers["x-request-id"] == body.request_id == "abc-1.2_3"
    assert timing.decode + timing.queue + timing.trunk + timing.body <= timing.total
    assert (body.model, body.version, body.slice.widest, body.cached) == ("tiny", "2", 3, False)


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "ü".encode()])
def test_a_request_id_that_does_not_match_is_replaced(client, bad):
    response = post(client, x_request_id=bad)
    assert response.status_code == 200
    assert response.headers["x-request-id"] != bad
    assert len(response.headers["x-request-id"]) == 32


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_every_format_is_answered_by_every_way_of_sending(client, image_format):
    image = random_image(3, 20, image_format)
    kind = f"image/{image_format.lower()}"
    ways = [
        client.post("/v1/classify", content=image, headers={"content-type": kind}),
        client.post("/v1/classify", content=image),
        client.post("/v1/classify", content=image, headers={"content-type": "application/octet-stream"}),
        client.post("/v1/classify", files={"image": ("a", image, kind)}),
        client.post("/v1/classify", json={"image": base64.b64encode(image).decode()}),
    ]
    assert [way.status_code for way in ways] == [200] * 5
    answers = [way.json()["predictions"] for way in ways]
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize(("top_k", "count"), [(None, 5), (1, 1), (10, 10)])
def test_top_k(client, top_k, count):
    answer = post(client, params={"top_k": top_k} if top_k else None).json()
    probabilities = [p["probability"] for p in answer["predictions"]]
    assert len(probabilities) == count
    assert probabilities == sorted(probabilities, reverse=True)
    if count == 10:
        assert math.isclose(sum(probabilities), 1, abs_tol=1e-6)


def test_a_compute_budget_is_a_hard_ceiling(client, info):
    for seed in range(8):
        for facts in info.slices:
            for budget in (facts.madds_served, facts.madds_served + 1):
                slice_ = post(client, seed, compute_budget=str(budget)).json()["slice"]
                assert slice_["madds"] <= budget
                assert slice_["width"] == min(slice_["gate_width"], facts.width)
                assert slice_["reason"] == ("gate" if slice_["gate_width"] <= facts.width else "compute_budget")


def test_a_ceiling_below_the_narrowest_is_infeasible_and_names_the_nearest_point(client, info):
    narrowest = info.slices[0].madds_served
    response = post(client, compute_budget=str(narrowest - 1))
    assert response.status_code == 422
    problem = response.json()
    assert problem["error_type"] == "infeasible_budget"
    assert problem["feasible"]["compute_budget"] == narrowest
    assert post(client, compute_budget=str(problem["feasible"]["compute_budget"])).status_code == 200


def test_an_accuracy_floor_raises_the_slice(client):
    for seed in range(8):
        slice_ = post(client, seed, accuracy_floor="0.65").json()["slice"]
        assert slice_["width"] == max(1, slice_["gate_width"])
        assert slice_["reason"] == ("gate" if slice_["gate_width"] >= 1 else "accuracy_floor")
    assert post(client, accuracy_floor="90%").json()["slice"]["width"] == 3
    assert post(client, accuracy_floor="0.901").status_code == 422


@pytest.mark.parametrize(("wish", "width"), [("0", 0), ("2", 2), ("narrowest", 0), ("widest", 3)])
def test_a_forced_slice_skips_the_gate_and_its_cost(client, info, offline, wish, width):
    response = post(client, 5, slice_width=wish)
    slice_ = response.json()["slice"]
    assert (slice_["width"], slice_["gate_width"], slice_["reason"]) == (width, None, "forced")
    assert slice_["madds"] == info.slices[width].madds_published
    assert response.headers["slice-gate-width"] == "none"
    expected = offline.predict(random_image(5), width=width).predictions[0]
    assert response.json()["predictions"][0]["probability"] == pytest.approx(expected[1], abs=1e-5)


def test_a_forced_slice_outside_the_budgets_is_infeasible(client):
    assert post(client, slice_width="3", compute_budget="50%").status_code == 422
    assert post(client, slice_width="0", accuracy_floor="0.9").status_code == 422


def test_a_deadline_that_nothing_can_meet_is_refused_at_once(client, server):
    before = server.metric("slicewise_budget_requests_total", kind="latency", result="refused")
    response = post(client, latency_budget="0.001ms")
    assert (response.status_code, response.json()["error_type"]) == (504, "deadline_exceeded")
    assert server.metric("slicewise_budget_requests_total", kind="latency", result="refused") == before + 1


@pytest.mark.parametrize("budget", [{"latency_budget": "0.001ms"}, {"compute_budget": "1"}])
def test_who_is_refused_bears_its_share_of_what_the_process_spends(client, monkeypatch, budget):
    seen = []
    monkeypatch.setattr(Overhead, "turned_away", lambda self: seen.append(self))
    post(client)
    assert seen == []
    assert post(client, **budget).status_code in {422, 504}
    assert len(seen) == 1


def test_a_generous_deadline_changes_nothing(client):
    slice_ = post(client, 1, latency_budget="20s", priority="u=0").json()["slice"]
    assert slice_["reason"] == "gate"


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("Compute-Budget", "-1"),
        ("Compute-Budget", "101%"),
        ("Compute-Budget", "1e9"),
        ("Latency-Budget", "soon"),
        ("Accuracy-Floor", "1.1"),
        ("Slice-Width", "4"),
        ("Slice-Width", "wide"),
        ("Priority", "u=8"),
    ],
)
def test_malformed_headers_are_bad_requests_that_name_the_header(client, header, value):
    response = post(client, **{header: value})
    assert (response.status_code, response.json()["error_type"]) == (400, "bad_request")
    assert value in response.json()["error"] or value.rstrip("%") in response.json()["error"]


def test_a_repeated_budget_is_a_bad_request(client):
    headers = [("content-type", "image/png"), ("compute-budget", "1G"), ("compute-budget", "2G")]
    assert client.post("/v1/classify", content=random_image(0), headers=headers).status_code == 400


def test_a_batch_answers_in_order_and_one_bad_image_fails_alone(client, info):
    images = [random_image(seed) for seed in range(6)]
    parts = [("image", (f"{i}.png", image, "image/png")) for i, image in enumerate(images)]
    parts.insert(2, ("image", ("bad.png", b"not an image", "image/png")))
    response = client.post("/v1/classify/batch", files=parts, headers={"compute-budget": "100%"})
    batch = BatchResponse.model_validate(response.json())
    assert response.status_code == 200
    results = response.json()["results"]
    bad = results.pop(2)
    assert (bad["error_type"], bad["status"]) == ("bad_image", 400)
    singles = [post(client, seed).json() for seed in range(6)]
    for got, single in zip(results, singles, strict=True):
        assert got["slice"] == single["slice"]
        assert np.allclose(
            [p["probability"] for p in got["predictions"]], [p["probability"] for p in single["predictions"]], atol=1e-5
        )
    spent = sum(result["slice"]["madds"] for result in results)
    assert response.headers["compute-madds"] == str(spent)
    assert "slice-width" not in response.headers
    assert len(batch.results) == 7


def test_an_infeasible_budget_fails_a_batch_as_a_whole_with_its_feasible_point(client, server, info):
    before = server.metric("slicewise_budget_requests_total", kind="compute", result="infeasible")
    parts = [("image", ("a.png", random_image(0), "image/png"))] * 2
    response = client.post("/v1/classify/batch", files=parts, headers={"compute-budget": "1"})
    assert response.status_code == 422
    assert response.json()["feasible"]["compute_budget"] == info.slices[0].madds_served
    assert server.metric("slicewise_budget_requests_total", kind="compute", result="infeasible") == before + 1


def test_a_model_without_accuracies_serves_with_nulls_and_refuses_floors(start):
    with start(model=["tiny", "blank"]) as server:
        answer = post(server.client, params={"model": "blank"})
        assert answer.json()["slice"]["accuracy"] is None
        assert answer.json()["model"] == "blank"
        refused = post(server.client, params={"model": "blank"}, accuracy_floor="0.5")
        assert refused.status_code == 422
        names = [model["name"] for model in server.client.get("/v1/models").json()["models"]]
        assert names == ["tiny", "blank"]
        assert post(server.client).json()["model"] == "tiny"
