import httpx
import numpy as np
import pytest
from support import random_image

from models.transform import load_image

pytest.importorskip("cv2")

from loadtest.peers.fastapi_onnx import STAGES, AccountedClassifier, Classifier, Totals, create_app
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


async def test_without_an_account_there_is_none(client):
    assert (await client.get("/account")).status_code == 404


async def test_an_account_counts_images_and_the_time_of_every_stage(graph, manifest, client):
    path, _ = manifest()
    app = create_app(AccountedClassifier(graph, Transform.from_manifest(path)), threads=2)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://peer") as accounted:
        for seed in (3, 4):
            data = random_image(seed)
            assert (await accounted.post("/classify", content=data)).content == (
                await client.post("/classify", content=data)
            ).content
        assert (await accounted.post("/classify", content=b"no image")).status_code == 400
        account = (await accounted.get("/account")).json()
    assert account["images"] == 2
    for clock in ("cpu_s", "wall_s"):
        assert list(account[clock]) == list(STAGES)
        assert all(seconds > 0 for seconds in account[clock].values())


def test_totals_are_differences_of_the_marks():
    totals = Totals()
    for _ in range(2):
        totals.add([0, 1, 3, 6, 10, 15], [0, 0, 0, 0, 7, 7])
    assert totals.images == 2
    assert totals.cpu_s == dict(zip(STAGES, [2, 4, 6, 8, 10], strict=True))
    assert totals.wall_s == dict(zip(STAGES, [0, 0, 0, 14, 0], strict=True))
