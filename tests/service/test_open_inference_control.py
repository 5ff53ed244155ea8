"""Models come and go while requests run: nothing is lost, and nothing is mixed."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import tritonclient.http as triton
from prometheus_client import generate_latest
from support import CLASSES, TINY_INPUT, Server, random_image, tiny_net
from tritonclient.utils import InferenceServerException

from models.checkpoint import load, save
from models.transform import load_image
from service.api.open_inference_schemas import IndexEntry
from service.hosting import warm_up

IMAGES = [random_image(seed) for seed in range(8)]
PIXELS = np.stack([load_image(image, TINY_INPUT) for image in IMAGES])
PNG = {"content-type": "image/png"}
V1_ONLY = {"config": '{"version_policy": {"specific": {"versions": [1]}}}'}


@pytest.fixture
def root(repository, tmp_path) -> Path:
    """A repository of the test's own."""
    shutil.copytree(repository, tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def server(start, root):
    with start(repository=root, model_control="explicit") as running:
        yield running


@pytest.fixture
def client(server):
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    yield client
    client.close()


def refused(call, status, words=""):
    with pytest.raises(InferenceServerException) as caught:
        call()
    assert caught.value.status() == str(status), caught.value
    assert words in caught.value.message()


def infer(client, model="tiny", **more):
    tensor = triton.InferInput("pixels", PIXELS.shape, "FP32").set_data_from_numpy(PIXELS)
    outputs = [triton.InferRequestedOutput(name) for name in ("logits", "slice_width")]
    return client.infer(model, [tensor], outputs=outputs, **more)


def index(client):
    entries = client.get_model_repository_index()
    return {IndexEntry.model_validate(entry).name: entry for entry in entries}


def wait_until_retired(server):
    give_up = time.monotonic() + 20
    while server.state.retiring:
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_load_and_unload_are_off_by_default(start):
    with start() as server:
        client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
        refused(lambda: client.load_model("tiny"), 403, "model_control")
        refused(lambda: client.unload_model("tiny"), 403, "model_control")
        assert set(index(client)) == {"tiny", "blank"}
        assert "model_repository" not in client.get_server_metadata()["extensions"]
        client.close()


def test_a_model_is_loaded_served_and_unloaded(server, client):
    assert "model_repository" in client.get_server_metadata()["extensions"]
    assert not client.is_model_ready("blank")
    assert index(client) == {
        "blank": {"name": "blank", "state": "UNAVAILABLE", "reason": "not loaded"},
        "tiny": {"name": "tiny", "version": "2", "state": "READY", "reason": ""},
    }
    client.load_model("blank")
    assert client.is_model_ready("blank")
    assert infer(client, "blank").get_response()["model_version"] == "1"
    assert index(client)["blank"] == {"name": "blank", "version": "1", "state": "READY", "reason": ""}
    assert [model["name"] for model in server.client.get("/v1/models").json()["models"]] == ["tiny", "blank"]
    client.unload_model("blank")
    assert not client.is_model_ready("blank")
    assert client.is_server_ready()
    refused(lambda: infer(client, "blank"), 404, "served: tiny")
    refused(lambda: client.unload_model("blank"), 404, "blank")
    wait_until_retired(server)
    assert index(client)["blank"]["state"] == "UNAVAILABLE"
    ready = server.client.post("/v2/repository/index", json={"ready": True}).json()
    assert [entry["name"] for entry in ready] == ["tiny"]
    gauges = [
        line for line in generate_latest(server.state.telemetry.registry).decode().splitlines() if "blank" in line
    ]
    assert gauges
    assert not any(line.startswith(("slicewise_slice_", "slicewise_queue_", "slicewise_model_")) for line in gauges)


def test_without_any_model_the_service_is_ready_and_says_so(server, client):
    client.unload_model("tiny")
    assert client.is_server_ready()
    assert server.client.get("/v1/models").json() == {"models": []}
    response = server.client.post("/v1/classify", content=IMAGES[0], headers=PNG)
    assert (response.status_code, response.json()["error_type"]) == (404, "not_found")
    client.load_model("tiny")
    assert server.client.post("/v1/classify", content=IMAGES[0], headers=PNG).json()["version"] == "2"


def test_the_highest_version_is_loaded_unless_one_is_named(server, client, root):
    client.load_model("tiny", config=V1_ONLY["config"])
    assert infer(client).get_response()["model_version"] == "1"
    assert client.get_model_config("tiny")["version_policy"] == {"specific": {"versions": [1]}}
    assert client.get_inference_statistics("tiny")["model_stats"][0]["inference_count"] == len(PIXELS)
    save(root / "tiny" / "3", tiny_net(5), classes=CLASSES, input_spec=TINY_INPUT)
    client.load_model("tiny")
    assert infer(client, model_version="3").get_response()["model_version"] == "3"
    refused(lambda: infer(client, model_version="1"), 404, "served: 3")
    wait_until_retired(server)
    assert server.metric_sum("slicewise_slice_madds", model="tiny", version="1") == 0
    assert server.metric_sum("slicewise_slice_madds", model="tiny", version="3") > 0
    assert server.metric("slicewise_queue_capacity_images", model="tiny", width="trunk") == 256


def test_loading_what_is_served_unchanged_does_nothing(server, client):
    before = server.state.models["tiny"]
    client.load_model("tiny")
    client.load_model("tiny", config='{"name": "tiny", "version_policy": {"latest": {"num_versions": 1}}}')
    assert server.state.models["tiny"] is before


def test_what_cannot_be_loaded_leaves_what_is_served(server, client, root):
    before = server.state.models["tiny"]
    save(root / "tiny" / "4", tiny_net(6), classes=CLASSES, input_spec=TINY_INPUT)
    tensors = root / "tiny" / "4" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    refused(lambda: client.load_model("tiny"), 400, "digest")
    refused(lambda: client.load_model("nope"), 404, "nope")
    refused(lambda: client.load_model("../tiny"), 404)
    refused(lambda: client.load_model("tiny", config='{"version_policy": {"specific": {"versions": [9]}}}'), 404, "9")
    specific = '{"version_policy": {"specific": {"versions": %s}}}'
    for config in (
        "[]", "{", '{"max_batch_size": 8}', '{"version_policy": {"all": {}}}', '{"version_policy": 3}',
        specific % "[1, 2]", specific % "[true]", specific % '["1"]',
    ):  # fmt: skip
        refused(lambda config=config: client.load_model("tiny", config=config), 400)
    files = {"parameters": {"file:1/model.onnx": "aGk="}}
    assert server.client.post("/v2/repository/models/tiny/load", json=files).status_code == 501
    for body in (b"[]", b"{", b'{"parameters": 3}', b'{"parameters": {"config": 3}}'):
        assert server.client.post("/v2/repository/models/tiny/load", content=body).status_code == 400
    assert server.client.post("/v2/repository/index", json={"ready": 1}).status_code == 400
    assert server.client.post("/v2/repository/index", content=b" " * 70_000).status_code == 413
    assert server.state.models["tiny"] is before
    assert server.state.body_bytes == 0
    assert infer(client).get_response()["model_version"] == "2"


def test_a_warm_up_that_fails_leaves_what_is_served(server, client, monkeypatch):
    def broken(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr("service.api.open_inference_control.warm_up", broken)
    refused(lambda: client.load_model("tiny", config=V1_ONLY["config"]), 500, "internal error")
    assert infer(client).get_response()["model_version"] == "2"


class Traffic:
    """Callers that ask again and again, both ways, until told to stop; what each was answered."""

    def __init__(self, url, callers=4):
        self.url, self.stop = url, threading.Event()
        self.pool = ThreadPoolExecutor(callers)
        self.results = [self.pool.submit(self.v2 if caller % 2 else self.v1, caller) for caller in range(callers)]

    def v1(self, caller):
        answers, asked = [], 0
        with httpx.Client(base_url=self.url, timeout=30) as http:
            while not self.stop.is_set():
                image = (asked + caller) % len(IMAGES)
                response = http.post("/v1/classify", content=IMAGES[image], headers=PNG, params={"top_k": 10})
                assert response.status_code == 200, response.text
                body, asked = response.json(), asked + 1
                values = {told["index"]: told["probability"] for told in body["predictions"]}
                row = [values[k] for k in range(10)]
                answers.append((int(body["version"]), image, body["slice"]["width"], row))
        return answers

    def v2(self, caller):
        answers = []
        tensor = {"name": "pixels", "datatype": "FP32", "shape": list(PIXELS.shape), "data": PIXELS.ravel().tolist()}
        with httpx.Client(base_url=self.url, timeout=30) as http:
            while not self.stop.is_set():
                response = http.post("/v2/models/tiny/infer", json={"inputs": [tensor]})
                assert response.status_code == 200, response.text
                body = response.json()
                rows, widths = (output["data"] for output in body["outputs"])
                for image, width in enumerate(widths):
                    row = rows[10 * image : 10 * image + 10]
                    answers.append((int(body["model_version"]), image, width, row))
        return answers

    def finish(self):
        self.stop.set()
        answers = [answer for result in self.results for answer in result.result(timeout=60)]
        self.pool.shutdown()
        return answers


def expected_rows(root):
    """Probabilities [version, width, image, class], computed without the service."""
    rows = {}
    for version in (1, 2):
        net = load(root / "tiny" / str(version)).net
        with torch.no_grad():
            for width in range(len(net.ladder)):
                features = net.trunk(torch.from_numpy(PIXELS)).features
                rows[version, width] = net.body(features, width).softmax(1).numpy()
    return rows


def test_versions_swapped_under_load_lose_nothing_and_mix_nothing(server, client, root):
    expected = expected_rows(root)
    traffic = Traffic(server.url)
    try:
        for config in (V1_ONLY["config"], None, V1_ONLY["config"], None):
            time.sleep(0.2)
            client.load_model("tiny", config=config)
            told = server.client.post("/v1/classify", content=IMAGES[0], headers=PNG).json()["version"]
            assert told == ("2" if config is None else "1"), "once a load is answered, requests reach that version"
        time.sleep(0.2)
    finally:
        answers = traffic.finish()
    assert {version for version, *_ in answers} == {1, 2}
    for version, image, width, row in answers:
        np.testing.assert_allclose(row, expected[version, width][image], atol=1e-4)
    other = expected[1, 0] - expected[2, 0]
    assert np.abs(other).max() > 0.01, "the versions must differ, or this shows nothing"
    wait_until_retired(server)
    assert server.metric("slicewise_rejections_total", reason="draining") == 0


def test_a_request_whose_body_arrives_during_a_swap_is_answered_by_the_version_it_found(server, client):
    begun, go_on = threading.Event(), threading.Event()

    def slowly():
        yield IMAGES[0][:20]
        begun.set()
        assert go_on.wait(20)
        yield IMAGES[0][20:]

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(httpx.post, f"{server.url}/v1/classify", content=slowly(), headers=PNG, timeout=30)
        assert begun.wait(20)
        while not server.state.active:
            time.sleep(0.01)
        client.load_model("tiny", config=V1_ONLY["config"])
        assert len(server.state.retiring) == 1
        assert infer(client).get_response()["model_version"] == "1"
        time.sleep(0.1)
        assert len(server.state.retiring) == 1, "the old version stays as long as somebody may need it"
        go_on.set()
        response = slow.result()
    assert (response.status_code, response.json()["version"]) == (200, "2")
    wait_until_retired(server)


def test_loads_take_turns(server, client, monkeypatch):
    running, most = [], []

    def watched(*arguments):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        try:
            return warm_up(*arguments)
        finally:
            running.pop()

    monkeypatch.setattr("service.api.open_inference_control.warm_up", watched)
    one = {"parameters": V1_ONLY}
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(httpx.post, f"{server.url}/v2/repository/models/{name}/load", json=body, timeout=30)
            for name, body in (("tiny", one), ("blank", {}), ("tiny", one), ("blank", {}))
        ]
        assert [call.result().status_code for call in calls] == [200] * 4
    assert most == [1, 1], "each is warmed once, one after the other"


def test_nothing_is_loaded_while_models_warm_up_or_the_service_drains(make_settings, root, monkeypatch):
    release = threading.Event()

    def slow(*arguments):
        release.wait(20)
        return warm_up(*arguments)

    monkeypatch.setattr("service.app.warm_up", slow)
    with Server(make_settings(repository=root, model_control="explicit")) as server:
        response = server.client.post("/v2/repository/models/blank/load")
        assert (response.status_code, response.json()["error_type"]) == (503, "loading")
        assert server.client.post("/v2/repository/index").json()[1]["state"] == "LOADING"
        release.set()
        server.wait_ready()
        server.state.draining = True
        response = server.client.post("/v2/repository/models/blank/load")
        assert (response.status_code, response.json()["error_type"]) == (503, "draining")
        server.state.draining = False


def test_stopping_interrupts_a_load(server, monkeypatch):
    began, interrupted = threading.Event(), threading.Event()

    def endless(checkpoint, settings, cancelled):
        began.set()
        if cancelled.wait(20):
            interrupted.set()
        raise InterruptedError

    monkeypatch.setattr("service.api.open_inference_control.warm_up", endless)

    def ask():
        try:
            return httpx.post(f"{server.url}/v2/repository/models/blank/load", timeout=30)
        except httpx.HTTPError as error:
            return error

    with ThreadPoolExecutor(1) as pool:
        pool.submit(ask)
        assert began.wait(20)
        server.server.should_exit = True
        assert interrupted.wait(20)


def test_openapi_describes_the_routes(server):
    document = server.client.get("/openapi.json").json()
    paths = {path: verbs for path, verbs in document["paths"].items() if path.startswith("/v2")}
    models = ["", "/ready", "/config", "/stats", "/infer"]
    assert set(paths) == {
        "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/stats", "/v2/repository/index",
        "/v2/repository/models/{model}/load", "/v2/repository/models/{model}/unload",
        *(f"/v2/models/{{model}}{part}{suffix}" for part in ("", "/versions/{version}") for suffix in models),
    }  # fmt: skip
    identities = [operation["operationId"] for verbs in paths.values() for operation in verbs.values()]
    assert len(set(identities)) == len(identities)
    for path, verbs in paths.items():
        for operation in verbs.values():
            assert {"200", "405", "431", "500"} <= set(operation["responses"])
            declared = {parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "path"}
            assert declared == {name for name in ("model", "version") if f"{{{name}}}" in path}
            assert operation["description"]
    infer = paths["/v2/models/{model}/infer"]["post"]
    assert set(infer["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
    assert set(infer["responses"]["200"]["content"]) == {"application/json", "application/octet-stream"}
    assert {"Compute-Budget", "Inference-Header-Content-Length"} <= {p["name"] for p in infer["parameters"]}
    assert {"400", "404", "408", "413", "415", "422", "501", "503", "504"} <= set(infer["responses"])
    assert "$defs" not in json.dumps(document)
    assert all(
        part.split('"')[0].startswith("#/components/schemas/") for part in json.dumps(document).split('"$ref": "')[1:]
    )
