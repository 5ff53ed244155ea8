import pytest
from starlette.routing import Match
from support import random_image

from service.api import classify

IMAGE = random_image(0)
VARYING = {"date", "server-timing", "x-request-id"}
REQUESTS = {
    "served": {"headers": {"Slice-Width": "1"}},
    "several": {"path": "/v1/classify/batch", "files": [("image", ("a.png", IMAGE)), ("image", ("b.png", b"none"))]},
    "query": {"params": {"top_k": 2}, "headers": {"Slice-Width": "narrowest"}},
    "query_that_is_refused": {"params": {"top_k": "many"}},
    "unknown_model": {"params": {"model": "none"}},
    "malformed_header": {"headers": {"Compute-Budget": "much"}},
    "infeasible": {"headers": {"Compute-Budget": "1"}},
    "no_image": {"content": b"BM not really", "headers": {"Content-Type": "image/bmp"}},
    "media_type": {"headers": {"Content-Type": "text/plain"}},
    "another_verb": {"verb": "GET"},
    "another_path": {"path": "/v1/classify/"},
}


@pytest.fixture(scope="module")
def general(start):
    """Behind a root path nothing takes the shortcut."""
    with start(root_path="/slices") as server:
        yield server


def answer(server, verb="POST", path="/v1/classify", **request):
    if "files" not in request and verb == "POST":
        request = {"content": IMAGE} | request
        request["headers"] = {"Content-Type": "image/png"} | request.get("headers", {})
    response = server.client.request(verb, path, **request)
    body = response.json()
    for part in (body, *body.get("results", [])):
        part.pop("timings_ms", None)
        part.pop("request_id", None)
    headers = {name: value for name, value in response.headers.items() if name not in VARYING | {"content-length"}}
    return response.status_code, headers, set(response.headers), body


@pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")
@pytest.mark.parametrize("case", REQUESTS)
def test_the_short_way_answers_as_the_general_one_does(server, general, case):
    assert answer(server, **REQUESTS[case]) == answer(general, **REQUESTS[case])


def test_requests_are_counted_under_the_same_route(server):
    before = server.metric("slicewise_requests_total", route="/v1/classify", code="200")
    answer(server)
    assert server.metric("slicewise_requests_total", route="/v1/classify", code="200") == before + 1


def test_a_bug_behind_it_is_an_internal_error(server, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(server.state.pipeline, "precheck", fail)
    status, _, _, body = answer(server)
    assert (status, body["error_type"]) == (500, "internal")


def test_plain_routes_are_those_of_the_module_and_match_nothing_but_their_path():
    routes = {route.path: route for route in classify.plain_routes()}
    assert set(routes) == {"/v1/classify", "/v1/classify/batch"}
    for path, route in routes.items():
        match, scope = route.matches({"type": "http", "method": "POST", "path": path})
        assert (match, scope["path_params"]) == (Match.FULL, {})
