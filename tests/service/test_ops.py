import re
import threading
import time

from prometheus_client.parser import text_string_to_metric_families
from support import TINY_ACCURACY, Server, random_image

from service.api.problems import DESCRIPTIONS
from service.api.schemas import ModelInfo, ModelList


def test_models_show_the_ladder(client):
    model = ModelInfo.model_validate(client.get("/v1/models/tiny").json())
    assert (model.name, model.version, model.architecture) == ("tiny", "2", "ds_mbnet")
    assert [s.accuracy for s in model.slices] == list(TINY_ACCURACY)
    assert all(s.madds_served > s.madds_published for s in model.slices)
    assert all({"1", "2"} <= set(s.latency_ms) and min(s.latency_ms.values()) > 0 for s in model.slices)
    assert model.gate.choices == [0, 1, 3]
    assert ModelList.model_validate(client.get("/v1/models").json()).models == [model]
    assert client.get("/v1/models/nope").status_code == 404


def test_health_and_readiness(client):
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_metrics_are_prometheus_text_with_bounded_labels(client):
    secret = "private-request-id"
    headers = {"content-type": "image/png", "x-request-id": secret, "compute-budget": "77%"}
    assert client.post("/v1/classify", content=random_image(0), headers=headers).status_code == 200
    client.get(f"/{secret}")
    text = client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert secret not in text
    assert {s.labels["width"] for s in families["slicewise_slice_madds"].samples} == {"0", "1", "2", "3"}
    assert families["slicewise_model_info"].samples[0].labels["digest"].startswith("sha256:")
    routes = {s.labels["route"] for s in families["slicewise_requests"].samples}
    assert {"/v1/classify", "unmatched"} <= routes
    allowed = {
        "model", "version", "width", "gate_width", "served_width", "stage", "reason", "outcome", "kind", "result",
        "route", "code", "batch", "engine", "device", "digest", "le",
    }  # fmt: skip
    for family in families.values():
        assert family.name.startswith("slicewise_")
        assert all(set(sample.labels) <= allowed for sample in family.samples)


def test_the_documentation_needs_no_other_host(client):
    page = client.get("/docs").text
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(links) >= 2
    assert all(link.startswith("/") for link in links)
    assert all(client.get(link).status_code == 200 for link in links)


def test_openapi_declares_every_error_status_and_every_knob(client):
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/v1/classify", "/v1/classify/batch"):
        operation = paths[path]["post"]
        assert set(operation["responses"]) == {"200", *map(str, DESCRIPTIONS)} - {"403", "501"}
        assert {p["name"] for p in operation["parameters"]} >= {
            "Compute-Budget", "Latency-Budget", "Accuracy-Floor", "Slice-Width", "Priority", "X-Request-ID",
            "model", "version", "top_k",
        }  # fmt: skip
        assert {"Compute-MAdds", "X-Request-ID"} <= set(operation["responses"]["200"]["headers"])
        assert "Retry-After" in operation["responses"]["503"]["headers"]
    assert set(paths["/v1/models/{model}"]["get"]["responses"]) == {
        "200", "401", "404", "405", "408", "431", "500", "503",
    }  # fmt: skip
    assert set(paths["/healthz"]["get"]["responses"]) == {"200", "405", "408", "431", "500"}


def test_cors_is_off_by_default_and_exposes_the_headers_when_on(start, client):
    origin = {"origin": "https://app.example", "content-type": "image/png"}
    off = client.post("/v1/classify", content=random_image(0), headers=origin)
    assert "access-control-allow-origin" not in off.headers
    with start(cors_origins=["https://app.example"]) as server:
        on = server.client.post("/v1/classify", content=random_image(0), headers=origin)
    assert on.headers["access-control-allow-origin"] == "https://app.example"
    assert "Compute-MAdds" in on.headers["access-control-expose-headers"]


def test_stopping_during_the_warm_up_interrupts_it(make_settings, monkeypatch):
    began, interrupted = threading.Event(), threading.Event()

    def slow_warm_up(checkpoint, settings, cancelled):
        began.set()
        if cancelled.wait(20):
            interrupted.set()
        raise InterruptedError

    monkeypatch.setattr("service.app.warm_up", slow_warm_up)
    with Server(make_settings()) as server:
        assert began.wait(20)  # a server that stops earlier never begins it
        assert server.client.get("/readyz").json()["error_type"] == "loading"
    assert interrupted.wait(20)  # the thread is told to stop, not waited for


def test_a_model_that_cannot_warm_up_is_said_and_never_ready(make_settings, monkeypatch):
    def broken_warm_up(checkpoint, settings, cancelled):
        raise RuntimeError("no such device")

    monkeypatch.setattr("service.app.warm_up", broken_warm_up)
    with Server(make_settings()) as server:
        while not server.state.failed:
            time.sleep(0.005)
        assert server.client.get("/readyz").status_code == 503
