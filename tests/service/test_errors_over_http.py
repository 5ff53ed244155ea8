import contextlib
import http.client
import socket
import struct
import threading
import time
import zlib

import pytest
from support import random_image

from service.api.problems import Problem

PNG = {"content-type": "image/png"}


def check(response, status, error_type):
    assert response.status_code == status, response.text
    problem = Problem.model_validate(response.json())
    assert problem.error_type == error_type
    assert problem.request_id == response.headers["x-request-id"]
    if status == 503:
        assert int(response.headers["retry-after"]) >= 1
    return problem.error


@pytest.fixture(scope="module")
def small(start):
    """A server with low limits."""
    limits = {
        "body_limit_bytes": 5000, "batch_body_limit_bytes": 50_000, "batch_limit_images": 3,
        "image_limit_pixels": 10_000, "body_timeout_s": 0.3,
    }  # fmt: skip
    with start(**limits) as running:
        yield running


def test_unknown_paths_and_verbs(client):
    assert "/nope" in check(client.get("/nope"), 404, "not_found")
    response = client.get("/v1/classify")
    assert "POST" in check(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("params", [{"model": "nope"}, {"version": "1"}, {"version": "x"}])
def test_unknown_models_and_versions(client, params):
    check(client.post("/v1/classify", content=random_image(0), headers=PNG, params=params), 404, "not_found")


@pytest.mark.parametrize("top_k", ["0", "11", "-1", "x", "1.5"])
def test_bad_top_k(client, top_k):
    response = client.post("/v1/classify", content=random_image(0), headers=PNG, params={"top_k": top_k})
    assert top_k in check(response, 400, "bad_request")


@pytest.mark.parametrize("data", [b"", b"not an image", random_image(0)[:60], b"\xff\xd8\xff\xe0 then nothing"])
def test_bytes_that_are_no_image(client, data):
    check(client.post("/v1/classify", content=data, headers=PNG), 400, "bad_image")


@pytest.mark.parametrize("kind", ["text/plain", "image/tiff", "video/mp4", "application/xml"])
def test_media_types_that_are_no_image(client, kind):
    response = client.post("/v1/classify", content=random_image(0), headers={"content-type": kind})
    assert kind in check(response, 415, "unsupported_media_type")


def test_absent_media_type_on_something_else(client):
    check(client.post("/v1/classify", content=b"hello"), 415, "unsupported_media_type")
    check(client.post("/v1/classify/batch", content=b"hello"), 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"image": 3}', b'{"image": "*"}', b'{"image": "aGk=", "x": 1}', b"\xff", b"null"]
)
def test_malformed_json(client, body):
    response = client.post("/v1/classify", content=body, headers={"content-type": "application/json"})
    check(response, 400, "bad_request")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"garbage"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: nothing\r\n\r\nx\r\n--b--\r\n"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--b--\r\n',
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="other"; filename="a"\r\n\r\nx\r\n--b--\r\n',
        ),
    ],
)
@pytest.mark.parametrize("path", ["/v1/classify", "/v1/classify/batch"])
def test_malformed_multipart(client, path, kind, body):
    check(client.post(path, content=body, headers={"content-type": kind}), 400, "bad_request")


def test_two_images_where_one_is_allowed(client):
    parts = [("image", ("a.png", random_image(0), "image/png"))] * 2
    check(client.post("/v1/classify", files=parts), 413, "too_large")


def test_bodies_over_the_limit_are_refused_announced_or_not(small):
    check(small.client.post("/v1/classify", content=b"x" * 5001, headers=PNG), 413, "too_large")

    def chunks():
        for _ in range(6):
            yield b"x" * 1000

    check(small.client.post("/v1/classify", content=chunks(), headers=PNG), 413, "too_large")


def test_too_many_images(small):
    parts = [("image", ("a.png", random_image(0), "image/png"))] * 4
    assert "3 images" in check(small.client.post("/v1/classify/batch", files=parts), 413, "too_large")


def test_a_pixel_bomb_is_refused_from_its_header(small):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    check(small.client.post("/v1/classify", content=bomb, headers=PNG), 413, "too_large")
    wide = random_image(0, 101, "JPEG")
    assert "10201" in check(small.client.post("/v1/classify", content=wide, headers=PNG), 413, "too_large")


def test_a_body_that_does_not_arrive_in_time(small):
    with socket.create_connection(("127.0.0.1", small.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 500\r\n\r\nabc"
        )
        answer = b""
        with contextlib.suppress(TimeoutError):
            while chunk := connection.recv(65536):
                answer += chunk
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"error_type":"timeout"' in answer


def test_a_failing_model_is_a_500_that_names_no_internals(start):
    with start() as server:
        engine = server.state.models["tiny"].batcher._engine
        original, engine.body = engine.body, lambda width, features: 1 / 0
        response = server.client.post("/v1/classify", content=random_image(0), headers=PNG)
        assert "division" not in check(response, 500, "backend")
        engine.body = original
        assert server.client.post("/v1/classify", content=random_image(0), headers=PNG).status_code == 200


def test_our_bugs_are_answered_in_the_same_form(start):
    with start() as server:
        server.state.pipeline.classify = None
        response = server.client.post("/v1/classify", content=random_image(0), headers=PNG)
        check(response, 500, "internal")
        assert server.metric("slicewise_rejections_total", reason="internal") == 1


def test_a_full_queue_refuses_with_a_time_to_come_back(start):
    with start(queue_capacity_images=2, batch_limit_images=2, workers=1) as server:
        engine, gate = server.state.models["tiny"].batcher._engine, threading.Event()
        trunk = engine.trunk
        engine.trunk = lambda images: (gate.wait(10), trunk(images))[1]
        results = []

        def post():
            results.append(server.client.post("/v1/classify", content=random_image(0), headers=PNG))

        threads = [threading.Thread(target=post) for _ in range(2)]
        for thread in threads:
            thread.start()
        while server.state.models["tiny"].admitted < 2:
            time.sleep(0.002)
        response = server.client.post("/v1/classify", content=random_image(0), headers=PNG)
        assert "2 images" in check(response, 503, "queue_full")
        gate.set()
        for thread in threads:
            thread.join()
        assert [r.status_code for r in results] == [200, 200]
        assert server.state.models["tiny"].admitted == 0


def test_draining_and_loading_are_503(start):
    with start() as server:
        server.state.draining = True
        for refused in (server.client.get("/readyz"), server.client.post("/v1/classify", content=b"", headers=PNG)):
            check(refused, 503, "draining")
            assert refused.headers["connection"] == "close"  # so that the client looks for another replica
        assert server.client.get("/healthz").status_code == 200
        server.state.draining = False
        models = dict(server.state.models)
        server.state.models.clear()
        loading = server.client.get("/readyz")
        check(loading, 503, "loading")
        assert "connection" not in loading.headers
        check(server.client.post("/v1/classify", content=random_image(0), headers=PNG), 503, "loading")
        server.state.models.update(models)


def test_a_bad_budget_is_told_before_the_body_is_read(client):
    def endless():
        yield b"x"
        time.sleep(0.2)
        yield b"x"

    response = client.post("/v1/classify", content=endless(), headers=PNG | {"compute-budget": "-1"})
    check(response, 400, "bad_request")


def test_a_client_that_writes_all_before_it_reads_still_gets_its_413(small):
    connection = http.client.HTTPConnection("127.0.0.1", small.port, timeout=10)
    connection.request("POST", "/v1/classify", body=b"x" * 19_000, headers=PNG)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_trailing_slash_is_another_path(client):
    check(client.post("/v1/classify/", content=random_image(0), headers=PNG), 404, "not_found")


def test_a_repeated_request_id_is_a_bad_request(client):
    headers = [("content-type", "image/png"), ("x-request-id", "a"), ("x-request-id", "b")]
    check(client.post("/v1/classify", content=random_image(0), headers=headers), 400, "bad_request")


def test_bodies_together_are_bounded(start):
    with start(bodies_limit_bytes=100_000) as server:
        held = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        held.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n" + b"x" * 80_000)
        while server.state.body_bytes < 80_000:
            time.sleep(0.005)
        for count, path in enumerate(("/v1/classify", "/v2/models/tiny/infer"), 1):
            response = server.client.post(path, content=b"x" * 30_000, headers=PNG | {"latency-budget": "5s"})
            assert "100000 bytes" in check(response, 503, "queue_full")
            assert server.metric("slicewise_budget_requests_total", kind="latency", result="refused") == count
        held.close()
        while server.state.active:
            time.sleep(0.005)
        assert server.state.body_bytes == 0
        assert server.client.post("/v1/classify", content=random_image(0), headers=PNG).status_code == 200


def test_a_failing_model_counts_against_attainment(start):
    with start() as server:
        server.state.models["tiny"].batcher._engine.body = lambda width, features: 1 / 0
        headers = PNG | {"latency-budget": "5s"}
        check(server.client.post("/v1/classify", content=random_image(0), headers=headers), 500, "backend")
        assert server.metric("slicewise_budget_requests_total", kind="latency", result="refused") == 1


def test_browsers_may_read_our_bugs(start):
    with start(cors_origins=["https://app.example"]) as server:
        server.state.pipeline.classify = None
        headers = PNG | {"origin": "https://app.example"}
        response = server.client.post("/v1/classify", content=random_image(0), headers=headers)
        check(response, 500, "internal")
        assert response.headers["access-control-allow-origin"] == "https://app.example"
