import httpx
import numpy as np
import pytest
from support import random_image

from models.transform import load_image

pytest.importorskip("cv2")

from loadtest.peers.fastapi_onnx import Classifier, create_app
from loadtest.peers.preprocess import Transform


@pytest.fixture
async def client(graph, manifest):
    path, _ = manifest()
    app = create_app(Classifier(graph, Transform.from_manifest(path)), threads=2)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://peer") as client:
        yield client


async def test_an_image_is_answered_with_its_likeliest_classes(client, manifest):
    _, spec = manifest()
    data = random_image(3)
    answer = (await client.post("/classify", content=data)).json()["predictions"]
    logits_K = load_image(data, spec).mean((1, 2))
    expected_K = np.exp(logits_K) / np.exp(logits_K).sum()
    assert [one["index"] for one in answer] == list(np.argsort(-logits_K))
    assert [one["probability"] for one in answer] == pytest.approx(sorted(expected_K, reverse=True), abs=1e-4)


async def test_images_do_not_leak_into_each_other(client):
    first = (await client.post("/classify", content=random_image(3))).content
    assert (await client.post("/classify", content=random_image(4))).content != first
    assert (await client.post("/classify", content=random_image(3))).content == first


async def test_bytes_that_are_no_image_are_400(client):
    response = await client.post("/classify", content=b"no image")
    assert response.status_code == 400
    assert "not a readable image" in response.json()["error"]


async def test_it_says_that_it_is_ready(client):
    assert (await client.get("/health")).status_code == 200
