import httpx
import pytest

from loadtest.peers.echo import answer, app


@pytest.fixture
async def client():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://peer") as client:
        yield client


@pytest.mark.parametrize(("asked", "length"), [(600, 600), (0, 2), (2, 2)])
async def test_the_answer_is_json_of_the_length_that_was_asked_for(client, asked, length):
    response = await client.post(f"/?answer_bytes={asked}&delay_ms=1", content=b"x" * 100_000)
    assert response.status_code == 200
    assert len(response.content) == length == int(response.headers["content-length"])
    assert isinstance(response.json(), str)


async def test_it_says_that_it_is_ready(client):
    assert (await client.get("/health")).status_code == 200


async def test_a_body_is_read_to_its_end_before_it_is_answered():
    events = [{"type": "http.request", "more_body": True}, {"type": "http.request", "more_body": False}]
    sent = []

    async def receive():
        assert not sent
        return events.pop(0)

    async def send(event):
        sent.append((event["type"], len(events)))

    await app({"type": "http", "query_string": b""}, receive, send)
    assert sent == [("http.response.start", 0), ("http.response.body", 0)]


def test_the_wait_is_read_in_milliseconds():
    assert answer(b"delay_ms=50.5")[0] == 0.0505
    assert answer(b"")[0] == 0.0
