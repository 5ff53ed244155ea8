"""From the last byte of a request to its plan, over HTTP, on every route that classifies."""

import time
from types import SimpleNamespace

import pytest
from support import TINY_INPUT, random_image

from models.transform import load_image
from service.api.state import TURNS, ServiceState
from service.batcher import Batcher
from service.hosting import HostedModel

IMAGE = random_image(3)
PIXELS = load_image(IMAGE, TINY_INPUT).ravel().tolist()
ROUTES = {
    "/v1/classify": {"content": IMAGE},
    "/v1/classify/batch": {"files": [("image", ("1.png", IMAGE, "image/png"))]},
    "/v2/models/tiny/infer": {
        "json": {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 3, 16, 16], "data": PIXELS}]}
    },
}


def ask(client, route):
    """Status of the answer to one image, whatever the way that the route tells it."""
    response = client.post(route, headers={"latency-budget": "20s"}, **ROUTES[route])
    if response.status_code == 200 and "results" in response.json():
        return response.json()["results"][0].get("status", 200)
    return response.status_code


@pytest.mark.parametrize("route", ROUTES)
def test_a_deadline_counts_from_the_last_byte(client, monkeypatch, route):
    assert ask(client, route) == 200
    monkeypatch.setattr("service.http1.time", SimpleNamespace(monotonic=lambda: time.monotonic() - 3600.0))
    assert ask(client, route) == 504


@pytest.mark.parametrize("route", ROUTES)
def test_a_request_gives_way_to_answers_once_and_tells_how_long_it_has_waited(client, monkeypatch, route):
    calls, answers_first, begun = [], ServiceState.answers_first, HostedModel.begun

    async def noting_answers(self):
        calls.append("answers")
        await answers_first(self)

    def noting_begin(self, arrived_s, now_s):
        calls.append("begun")
        assert arrived_s <= now_s
        begun(self, arrived_s, now_s)

    monkeypatch.setattr(ServiceState, "answers_first", noting_answers)
    monkeypatch.setattr(HostedModel, "begun", noting_begin)
    assert ask(client, route) == 200
    assert calls == ["answers", "begun"]


def test_a_request_begins_in_the_end_however_many_answers_leave(client, monkeypatch):
    asked = []
    monkeypatch.setattr(Batcher, "settle_finished", lambda self: asked.append(self) or True)
    # Nothing is settled, so the request itself is not answered in its time; but it begins.
    response = client.post("/v1/classify", content=IMAGE, headers={"latency-budget": "200ms"})
    assert response.status_code == 504
    assert response.json()["outcome"] == "late"
    assert len(asked) >= TURNS
