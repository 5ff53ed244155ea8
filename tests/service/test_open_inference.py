"""The Open Inference Protocol as tritonclient speaks it, and as nobody should."""

import contextlib
import json
import threading
from importlib.metadata import version

import numpy as np
import pytest
import tritonclient.http as triton
from support import CLASSES, TINY_INPUT, random_image
from tritonclient.utils import InferenceServerException

from models import predictor
from models.transform import load_image
from service.api.open_inference_schemas import InferResponse, ModelStats, ServerMetadata
from service.api.problems import Problem

SEEDS = range(20, 26)
IMAGES = [random_image(seed, image_format="JPEG") for seed in SEEDS]
PIXELS = np.stack([load_image(image, TINY_INPUT) for image in IMAGES])
PROBE = {
    "inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 3, 16, 16], "data": PIXELS[0].ravel().tolist()}]
}


@contextlib.contextmanager
def speaking_to(server):
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(scope="module")
def client(server):
    with speaking_to(server) as client:
        yield client


@pytest.fixture(scope="module")
def http(server):
    return server.client


def test_a_deadline_holds_while_the_body_waits_to_be_parsed(server, http):
    held, asked = threading.Event(), server.metric("slicewise_budget_requests_total", kind="latency", result="expired")
    parser = server.state.parser.submit(held.wait, 10)
    body = json.dumps(PROBE) + " " * 300_000
    try:
        late = http.post("/v2/models/tiny/infer", content=body, headers={"latency-budget": "100ms"})
    finally:
        held.set()
        parser.result()
    assert (late.status_code, late.json()["outcome"]) == (504, "expired")
    assert server.metric("slicewise_budget_requests_total", kind="latency", result="expired") == asked + 1


def pixel_input(pixels=PIXELS[:1], binary=True):
    tensor = triton.InferInput("pixels", pixels.shape, "FP32")
    return [tensor.set_data_from_numpy(pixels, binary_data=binary)]


def image_input(images, binary=True):
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    return [tensor.set_data_from_numpy(np.array(images, np.object_), binary_data=binary)]


def outputs(*names, binary=True, classes=0):
    return [triton.InferRequestedOutput(name, binary_data=binary, class_count=classes) for name in names]


def refused(call, status, words):
    with pytest.raises(InferenceServerException) as caught:
        call()
    assert caught.value.status() == str(status), caught.value
    for word in [words] if isinstance(words, str) else words:
        assert word in caught.value.message()


ALL = ("logits", "probabilities", "slice_width", "gate_logits", "madds")


@pytest.fixture(scope="module")
def singles(http):
    """What /v1/classify says of every image."""
    answers = [
        http.post("/v1/classify", content=image, headers={"content-type": "image/jpeg"}, params={"top_k": 10}).json()
        for image in IMAGES
    ]
    assert len({answer["slice"]["width"] for answer in answers}) > 1, "the gate must choose, or this shows little"
    return answers


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("kind", ["pixels", "image"])
def test_many_images_are_each_answered_as_alone(client, singles, kind, binary):
    inputs = pixel_input(PIXELS) if kind == "pixels" else image_input(IMAGES)
    result = client.infer("tiny", inputs, outputs=outputs(*ALL, binary=binary))
    probabilities_NK = result.as_numpy("probabilities")
    assert probabilities_NK.dtype == np.float32
    assert probabilities_NK.shape == (len(IMAGES), 10)
    assert result.as_numpy("slice_width").dtype == np.int32
    assert result.as_numpy("madds").dtype == np.int64
    assert result.as_numpy("gate_logits").shape == (len(IMAGES), 3)
    exp = np.exp(result.as_numpy("logits"))
    np.testing.assert_allclose(probabilities_NK, exp / exp.sum(1, keepdims=True), atol=1e-5)
    for row, single in enumerate(singles):
        assert result.as_numpy("slice_width")[row] == single["slice"]["width"]
        assert result.as_numpy("madds")[row] == single["slice"]["madds"]
        for told in single["predictions"]:
            assert probabilities_NK[row, told["index"]] == pytest.approx(told["probability"], abs=1e-5)
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"]) == ("tiny", "2")
    assert "id" not in answer
    assert answer["parameters"]["compute_madds"] == result.as_numpy("madds").sum()
    assert set(answer["parameters"]) == {"compute_madds", "x_request_id"}


def test_without_named_outputs_probabilities_and_widths_come_back(client, singles):
    result = client.infer("tiny", image_input(IMAGES[:1]), model_version="2")
    assert [output["name"] for output in result.get_response()["outputs"]] == ["probabilities", "slice_width"]
    assert all("binary_data_size" in output["parameters"] for output in result.get_response()["outputs"])
    assert result.as_numpy("slice_width") == [singles[0]["slice"]["width"]]


@pytest.mark.parametrize("binary", [True, False])
def test_pixels_in_json(client, singles, binary):
    result = client.infer("tiny", pixel_input(PIXELS[:2], binary=False), outputs=outputs("slice_width", binary=binary))
    assert result.as_numpy("slice_width").tolist() == [single["slice"]["width"] for single in singles[:2]]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("count", "shown"), [(1, 1), (3, 3), (99, 10)])
def test_classes_instead_of_values(client, singles, binary, count, shown):
    result = client.infer("tiny", image_input(IMAGES), outputs=outputs("probabilities", binary=binary, classes=count))
    texts = result.as_numpy("probabilities")
    assert texts.shape == (len(IMAGES), shown)
    for row, single in zip(texts, singles, strict=True):
        for text, told in zip(row, single["predictions"], strict=False):
            score, index, label = (text.decode() if isinstance(text, bytes) else text).split(":")
            assert float(score) == pytest.approx(told["probability"], abs=1e-5)
            assert CLASSES[int(index)] == label == told["label"]


def test_ids_and_headers_go_both_ways(server, singles):
    with speaking_to(server) as client:
        result = client.infer(
            "tiny", image_input(IMAGES[:1]), request_id="mine", headers={"X-Request-ID": "abc", "Slice-Width": "1"}
        )
    answer = InferResponse.model_validate(result.get_response())
    assert answer.id == "mine"
    told = answer.parameters
    assert (told["slice_width"], told["slice_gate_width"], told["slice_reason"]) == (1, "none", "forced")
    assert told["x_request_id"] == "abc"
    assert "trunk;dur=" in told["server_timing"]
    assert set(told) == {
        "slice_width", "slice_gate_width", "slice_reason", "compute_madds", "server_timing", "x_request_id",
    }  # fmt: skip


def test_parameters_repeat_the_response_headers(http):
    response = http.post("/v2/models/tiny/infer", json=PROBE)
    assert response.headers["content-type"] == "application/json"
    for name, value in response.json()["parameters"].items():
        assert response.headers[name.replace("_", "-")] == str(value)
    assert "inference-header-content-length" not in response.headers


@pytest.mark.parametrize("way", ["header", "parameter"])
def test_a_compute_budget_is_a_ceiling_either_way(client, http, way):
    slices = http.get("/v1/models/tiny").json()["slices"]
    for facts in slices:
        budget = str(facts["madds_served"])
        ways = {
            "header": {"headers": {"Compute-Budget": budget}},
            "parameter": {"parameters": {"compute_budget": budget}},
        }
        result = client.infer("tiny", image_input(IMAGES), outputs=outputs("slice_width", "madds"), **ways[way])
        assert result.as_numpy("slice_width").max() <= facts["width"]
        assert result.as_numpy("madds").max() <= facts["madds_served"]


def test_the_stricter_of_header_and_parameter_holds(client, http):
    narrowest, *_, widest = (facts["madds_served"] for facts in http.get("/v1/models/tiny").json()["slices"])
    for header, parameter in ((narrowest, widest), (widest, narrowest)):
        result = client.infer(
            "tiny", image_input(IMAGES), outputs=outputs("slice_width"),
            headers={"Compute-Budget": str(header)}, parameters={"compute_budget": parameter},
        )  # fmt: skip
        assert not result.as_numpy("slice_width").any()
    with pytest.raises(InferenceServerException, match="same in both"):
        client.infer("tiny", pixel_input(), headers={"Slice-Width": "1"}, parameters={"slice_width": 2})


def test_budgets_that_nothing_satisfies(client, http):
    refused(lambda: client.infer("tiny", pixel_input(), headers={"Compute-Budget": "1"}), 422, "allowed")
    refused(lambda: client.infer("tiny", pixel_input(), parameters={"compute_budget": 1}), 422, "allowed")
    refused(lambda: client.infer("tiny", pixel_input(), timeout=1), 504, "")
    refused(lambda: client.infer("tiny", pixel_input(), parameters={"latency_budget_ms": 0.001}), 504, "")
    body = http.post("/v2/models/tiny/infer", json=PROBE | {"parameters": {"compute_budget": 1}}).json()
    assert body["error_type"] == "infeasible_budget"
    assert body["feasible"]["compute_budget"] > 1
    assert client.infer("tiny", pixel_input(), timeout=20_000_000, priority=1).as_numpy("slice_width").shape == (1,)


def test_one_bad_image_fails_the_call_and_is_named(client):
    images = [IMAGES[0], b"not an image", IMAGES[1]]
    refused(lambda: client.infer("tiny", image_input(images)), 400, ["image 1", "readable image"])
    refused(lambda: client.infer("tiny", image_input([b"no"])), 400, "readable image")


def test_what_the_client_is_told_it_did_wrong(client):
    wrong_shape = np.zeros((1, 3, 8, 8), np.float32)
    refused(lambda: client.infer("tiny", pixel_input(wrong_shape)), 400, ["[1, 3, 8, 8]", "[N, 3, 16, 16]"])
    refused(lambda: client.infer("tiny", pixel_input(PIXELS * np.nan)), 400, "finite")
    refused(lambda: client.infer("tiny", [*pixel_input(), *image_input(IMAGES)]), 400, "exactly one")
    refused(lambda: client.infer("tiny", pixel_input(), outputs=outputs("labels")), 400, ["'labels'", "logits"])
    refused(lambda: client.infer("tiny", pixel_input(), outputs=outputs("madds", classes=2)), 400, "classification")
    forced = {"parameters": {"slice_width": 1}, "outputs": outputs("gate_logits")}
    refused(lambda: client.infer("tiny", pixel_input(), **forced), 400, "gate_logits")
    refused(lambda: client.infer("nope", pixel_input()), 404, ["nope", "tiny"])
    refused(lambda: client.infer("tiny", pixel_input(), model_version="1"), 404, ["'1'", "served: 2"])
    refused(lambda: client.infer("tiny", image_input([b"x"] * 65)), 413, ["65 images", "64 images"])
    refused(lambda: client.infer("tiny", pixel_input(), sequence_id=7), 501, "sequence")


def test_compressed_requests(client):
    for algorithm in ("gzip", "deflate"):
        result = client.infer(
            "tiny",
            pixel_input(PIXELS),
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        assert result.as_numpy("slice_width").shape == (len(IMAGES),)


def test_health_and_metadata(client, http):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "2")
    assert not client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("nope")
    server = ServerMetadata.model_validate(client.get_server_metadata())
    assert (server.name, server.version) == ("slicewise", version("slicewise"))
    assert set(server.extensions) == {
        "classification", "binary_tensor_data", "parameters", "schedule_policy", "statistics", "model_configuration",
    }  # fmt: skip
    about = client.get_model_metadata("tiny")
    assert about == client.get_model_metadata("tiny", "2")
    assert (about["name"], about["versions"]) == ("tiny", ["2"])
    assert {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in about["inputs"]} == {
        "image": ("BYTES", [-1]), "pixels": ("FP32", [-1, 3, 16, 16]),
    }  # fmt: skip
    assert {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in about["outputs"]} == {
        "logits": ("FP32", [-1, 10]), "probabilities": ("FP32", [-1, 10]), "slice_width": ("INT32", [-1]),
        "gate_logits": ("FP32", [-1, 3]), "madds": ("INT64", [-1]),
    }  # fmt: skip
    settings = client.get_model_config("tiny")
    assert settings == client.get_model_config("tiny", "2")
    assert settings["max_batch_size"] == 0
    assert {tensor["data_type"] for tensor in settings["input"]} == {"TYPE_STRING", "TYPE_FP32"}
    refused(lambda: client.get_model_metadata("nope"), 404, "nope")


def test_statistics_count_every_image_and_every_failure(client, http):
    def stats():
        (told,) = client.get_inference_statistics("tiny")["model_stats"]
        assert told == client.get_inference_statistics("tiny", "2")["model_stats"][0]
        assert told in client.get_inference_statistics()["model_stats"]
        return ModelStats.model_validate(told)

    before = stats()
    client.infer("tiny", image_input(IMAGES))
    http.post("/v1/classify", content=IMAGES[0], headers={"content-type": "image/jpeg"})
    refused(lambda: client.infer("tiny", image_input([b"x"])), 400, "image")
    after = stats()
    assert after.inference_count == before.inference_count + len(IMAGES) + 1
    assert after.inference_stats.success.count == after.inference_count
    assert after.inference_stats.fail.count == before.inference_stats.fail.count + 1
    assert after.execution_count > before.execution_count
    assert after.last_inference > before.last_inference
    computed = sum(batch.batch_size * batch.compute_infer.count for batch in after.batch_stats)
    assert computed >= after.inference_count, "more where a caller left while its image was computed"
    for part in ("queue", "compute_input", "compute_infer", "compute_output", "success"):
        assert getattr(after.inference_stats, part).ns > getattr(before.inference_stats, part).ns


def check(response, status, error_type):
    assert response.status_code == status, response.text
    problem = Problem.model_validate(response.json())
    assert problem.error_type == error_type
    assert problem.request_id == response.headers["x-request-id"]
    return problem.error


@pytest.mark.parametrize("length", ["99999", "-1", "x", "0", "3"])
def test_a_length_that_lies(http, length):
    body = json.dumps(PROBE).encode()
    headers = {"Inference-Header-Content-Length": length}
    check(http.post("/v2/models/tiny/infer", content=body, headers=headers), 400, "bad_request")


def test_a_length_that_is_given_twice(http):
    headers = [("Inference-Header-Content-Length", "2")] * 2
    check(http.post("/v2/models/tiny/infer", content=b"{}", headers=headers), 400, "bad_request")


@pytest.mark.parametrize("size", [3071, 3073, 2**40, -1])
def test_tensors_whose_size_lies(http, size):
    tensor = {"name": "pixels", "datatype": "FP32", "shape": [1, 3, 16, 16], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    response = http.post(
        "/v2/models/tiny/infer", content=head + PIXELS[0].tobytes(),
        headers={"Inference-Header-Content-Length": str(len(head))},
    )  # fmt: skip
    assert "binary_data_size" in check(response, 400, "bad_request")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"inputs": []}', b'{"inputs": 3}', b"\xff\xfe"])
def test_bodies_that_are_no_request(http, body):
    check(http.post("/v2/models/tiny/infer", content=body), 400, "bad_request")


@pytest.mark.parametrize("kind", ["application/json", "application/octet-stream", "text/plain", None])
def test_the_content_type_does_not_matter(http, kind):
    headers = {} if kind is None else {"content-type": kind}
    response = http.post("/v2/models/tiny/infer", content=json.dumps(PROBE).encode(), headers=headers)
    assert response.status_code == 200
    InferResponse.model_validate(response.json())


def test_malformed_budgets_and_encodings(http):
    check(http.post("/v2/models/tiny/infer", json=PROBE, headers={"Compute-Budget": "-1"}), 400, "bad_request")
    error = check(http.post("/v2/models/tiny/infer", json=PROBE | {"parameters": {"timeout": -1}}), 400, "bad_request")
    assert "timeout is '-1'" in error
    headers = {"content-encoding": "br"}
    check(http.post("/v2/models/tiny/infer", json=PROBE, headers=headers), 415, "unsupported_media_type")


def test_unknown_paths_verbs_and_extensions(http):
    check(http.get("/v2/models/tiny/infer"), 405, "method_not_allowed")
    check(http.post("/v2/models/tiny"), 405, "method_not_allowed")
    check(http.get("/v2/nope"), 404, "not_found")
    for path in ("/v2/systemsharedmemory/status", "/v2/cudasharedmemory/region/a/register", "/v2/logging"):
        check(http.get(path), 501, "not_implemented")
    check(http.post("/v2/trace/setting", json={}), 501, "not_implemented")
    check(http.post("/v2/models/tiny/generate", json={}), 501, "not_implemented")


def test_bodies_are_bounded(start):
    with start(body_limit_bytes=5000, batch_body_limit_bytes=20_000) as server, speaking_to(server) as client:
        refused(lambda: client.infer("tiny", pixel_input(PIXELS[:1], binary=False)), 413, "5000 bytes")
        assert client.infer("tiny", pixel_input(PIXELS)).as_numpy("slice_width").shape == (len(IMAGES),)
        seven = np.concatenate([PIXELS, PIXELS[:1]])
        refused(lambda: client.infer("tiny", pixel_input(seven)), 413, "20000 bytes")
        bomb = np.zeros((64, 3, 16, 16), np.float32)
        refused(
            lambda: client.infer("tiny", pixel_input(bomb), request_compression_algorithm="gzip"), 413, "when inflated"
        )
        assert server.state.body_bytes == server.state.active == len(server.state.leases) == 0


def test_a_full_queue_refuses_the_call_as_a_whole(start):
    with start(queue_capacity_images=4, batch_limit_images=4) as server, speaking_to(server) as client:
        assert client.infer("tiny", pixel_input(PIXELS[:4])).as_numpy("slice_width").shape == (4,)
        server.state.models["tiny"].admitted += 1
        refused(lambda: client.infer("tiny", pixel_input(PIXELS[:4])), 503, "4")
        server.state.models["tiny"].admitted -= 1
        assert server.state.models["tiny"].admitted == 0


def test_a_model_that_fails_is_the_callers_to_know(start, monkeypatch):
    with start() as server, speaking_to(server) as client:
        engine = server.state.models["tiny"].batcher._engine
        monkeypatch.setattr(type(engine), "trunk", lambda *_: 1 / 0)
        refused(lambda: client.infer("tiny", pixel_input(PIXELS)), 500, "the model failed")
        assert server.state.models["tiny"].admitted == 0


def test_a_policy_that_never_asks_the_gate_has_no_gate_logits(start):
    with start(policy="fixed:1") as server, speaking_to(server) as client:
        assert client.infer("tiny", pixel_input()).as_numpy("slice_width") == [1]
        refused(lambda: client.infer("tiny", pixel_input(), outputs=outputs("gate_logits")), 400, "gate did not run")


def test_the_torch_engine_takes_pixels_too(start, repository):
    with start(engine="torch") as server, speaking_to(server) as client:
        result = client.infer("tiny", pixel_input(PIXELS))
    offline = predictor.load(repository / "tiny")
    assert result.as_numpy("slice_width").tolist() == [offline.predict(image).width for image in IMAGES]
