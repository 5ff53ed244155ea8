import asyncio
import gc
import resource
import sys
import threading

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadtest import open_loop
from loadtest.open_loop import Limits, Playback, Post, play, replay
from loadtest.outcomes import NOT_SENT
from loadtest.servers import HOST, Server, free_port

pytestmark = pytest.mark.timeout(30)
LIMITS = Limits(outstanding=50, request_s=5.0)


def posts(count: int, gap_s: float = 0.002, **headers: str) -> list[Post]:
    return [Post(k * gap_s, bytes([k]) * 20, {"Content-Type": "image/png", **headers}) for k in range(count)]


async def replayed(app: web.Application, sent: list[Post], limits: Limits = LIMITS) -> Playback:
    async with TestServer(app) as server:
        return await replay(str(server.make_url("/classify")), sent, limits)


class Gate:
    """A server that answers nobody until ``arrivals`` requests are waiting, and never those after."""

    def __init__(self, arrivals: int) -> None:
        self.waiting, self.arrivals, self.opened = 0, arrivals, asyncio.Event()
        self.app = web.Application()
        self.app.add_routes([web.post("/classify", self.classify)])

    async def classify(self, request: web.Request) -> web.Response:
        await request.read()
        self.waiting += 1
        if self.waiting == self.arrivals:
            self.opened.set()
        await self.opened.wait()
        return web.json_response({})


async def test_every_request_is_sent_with_its_body_and_headers(fake_app):
    app, seen = fake_app()
    sent = [Post(0.01 * k, bytes([k]), {"Content-Type": "image/png", "Slice-Width": str(k)}) for k in range(5)]
    playback = await replayed(app, sent)
    assert sorted(seen.bodies) == [("image/png", bytes([k])) for k in range(5)]
    assert [exchange.at_s for exchange in playback.exchanges] == [post.at_s for post in sent]
    assert [exchange.headers["Slice-Width"] for exchange in playback.exchanges] == ["0", "1", "2", "3", "4"]
    assert all(exchange.status == 200 and exchange.body == b'{"results": []}' for exchange in playback.exchanges)


async def test_requests_are_sent_while_none_is_answered():
    """A closed loop would wait for the first answer for ever, and each of its requests would fail."""
    gate = Gate(arrivals=20)
    playback = await replayed(gate.app, posts(20))
    assert [exchange.status for exchange in playback.exchanges] == [200] * 20
    assert playback.outstanding_peak == 20


async def test_an_answer_takes_as_long_as_the_server_makes_it_wait():
    """The first cannot be answered before the last is there, which is due 0.3 s later."""
    sent = [*posts(1), Post(0.3, b"x", {"Content-Type": "image/png"})]
    first, last = (await replayed(Gate(arrivals=2).app, sent)).exchanges
    assert first.latency_s >= 0.3
    assert last.latency_s >= last.send_late_s


async def test_no_request_is_sent_before_its_instant(fake_app):
    """A send before it would show as a lateness of exactly 0."""
    playback = await replayed(fake_app()[0], posts(30))
    assert all(exchange.send_late_s > 0 for exchange in playback.exchanges)


async def test_a_generator_that_is_held_up_says_so(fake_app):
    """What is due while the event loop stands still is sent late, and its latency holds the wait."""
    app = fake_app()[0]
    async with TestServer(app) as server:
        task = asyncio.create_task(replay(str(server.make_url("/classify")), posts(3, gap_s=0.001), LIMITS))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        open_loop.time.sleep(0.4)
        playback = await task
    assert all(exchange.send_late_s > 0.2 for exchange in playback.exchanges)
    assert all(exchange.latency_s > exchange.send_late_s for exchange in playback.exchanges)


async def test_requests_beyond_the_limit_of_outstanding_ones_are_not_sent():
    gate = Gate(arrivals=5)
    playback = await replayed(gate.app, posts(8, gap_s=0.0), Limits(outstanding=4, request_s=0.3))
    assert gate.waiting == playback.outstanding_peak == 4
    assert [exchange.failure for exchange in playback.exchanges] == ["TimeoutError"] * 4 + [NOT_SENT] * 4
    assert [exchange.send_late_s is None for exchange in playback.exchanges] == [False] * 4 + [True] * 4


async def test_places_are_free_again_after_a_failure():
    sent = [Post(at_s, b"x", {"Content-Type": "image/png"}) for at_s in (0.0, 1.2)]
    playback = await replayed(Gate(arrivals=9).app, sent, Limits(outstanding=1, request_s=0.2))
    assert [exchange.failure for exchange in playback.exchanges] == ["TimeoutError"] * 2


async def test_a_server_that_is_not_there_is_a_failure_by_name():
    playback = await replay(f"http://{HOST}:{free_port()}/", posts(5), LIMITS)
    assert {(exchange.status, exchange.failure) for exchange in playback.exchanges} == {(0, "ConnectionRefusedError")}
    assert all(exchange.latency_s is None for exchange in playback.exchanges)


async def test_an_error_status_is_an_answer_with_its_body(fake_app):
    playback = await replayed(fake_app(fail_every=1)[0], posts(3))
    for exchange in playback.exchanges:
        assert (exchange.status, exchange.failure, exchange.body) == (503, "", b'{"error": "no"}')
        assert exchange.latency_s is not None


async def test_connections_are_kept(fake_app):
    app, seen = fake_app()
    await replayed(app, [Post(0.2 * k, b"x", {"Content-Type": "image/png"}) for k in range(6)])
    assert len(seen.peers) < 6


async def test_a_broken_header_is_refused_before_anything_is_sent(fake_app):
    app, seen = fake_app()
    with pytest.raises(ValueError, match=r"header 'Bad' is 'a\\nb'; allowed: a token, and printable ASCII"):
        await replayed(app, [*posts(40, gap_s=0.0005), *posts(1, Bad="a\nb")])
    assert seen.bodies == []
    assert "instants" not in {thread.name for thread in threading.enumerate()}


def test_a_whole_process_replays_with_garbage_collection_held_off(fake_spec, tmp_path, monkeypatch):
    collecting = []
    original = open_loop.replay

    async def watched(*arguments):
        collecting.append(gc.isenabled())
        return await original(*arguments)

    monkeypatch.setattr(open_loop, "replay", watched)
    with Server(fake_spec("fake"), tmp_path / "log") as server:
        playback = play(f"{server.url}/classify", posts(10), LIMITS)
    assert [exchange.status for exchange in playback.exchanges] == [200] * 10
    assert playback.event_loop == "uvloop"
    assert playback.cpu_s > 0
    assert collecting == [False]
    assert gc.isenabled()


def test_without_uvloop_the_loop_is_asyncios_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert play(f"http://{HOST}:{free_port()}/", posts(2), LIMITS).event_loop == "asyncio"


def test_what_cannot_be_replayed_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="no request; allowed: 1 or more"):
        play("http://127.0.0.1:9/", [], LIMITS)
    with pytest.raises(ValueError, match="limit of 0 outstanding requests; allowed: 1 or more"):
        Limits(outstanding=0)
    with pytest.raises(ValueError, match="limit of 0 s for a request; allowed: above 0 s"):
        Limits(request_s=0)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 256))
    with pytest.raises(ValueError, match="1000 outstanding requests; allowed: up to 156, by the limit of open files"):
        play("http://127.0.0.1:9/", posts(1), Limits(outstanding=1000))


def test_the_limit_of_open_files_is_raised_to_what_is_needed(monkeypatch):
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda *arguments: raised.append(arguments))
    play(f"http://{HOST}:{free_port()}/", posts(1), Limits(outstanding=1000))
    assert raised == [(resource.RLIMIT_NOFILE, (1100, 4096))]
