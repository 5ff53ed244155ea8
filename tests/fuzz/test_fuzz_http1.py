"""Broken bytes on a connection: whole answers, in bounded memory, and never two readings of one body."""

import asyncio
import logging
import re
from functools import partial

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from mutations import KIB, allocating_at_most, broken, examples
from uvicorn.server import ServerState

from service.http1 import HEADER_LIMIT_BYTES, AnyHttpProtocol, HttpProtocol, body_length

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /a?b=c HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\nX-Y: z\r\n\r\nhello\r\n\r\nab"
CHUNKED = (
    b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3;a=b\r\nabc\r\n0\r\nX: y\r\n\r\n"
)
OFFER = b"POST /a HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc"
EXPECT = b"POST /a HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc"
OLD = b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
BOTH = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
LONG = b"GET /a HTTP/1.1\r\nHost: x\r\nCookie: " + b"a" * 5000 + b"\r\n\r\n"
MANY = b"GET /a HTTP/1.1\r\n" + b"A: b\r\n" * 255 + b"Host: x\r\n\r\n"
REQUESTS = (GET, POST, CHUNKED, OFFER, EXPECT, OLD, BOTH, LONG, MANY)
HOSTILE = (
    b"Content-Length: 999999999999999\r\n", b"Content-Length: 4\r\n", b"Content-Length: -1\r\n", b"\x00: a\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity, chunked\r\n", b" folded\r\n", b"\r\n\r\n", b"\n",
    b"ffffffffffffffff\r\n", b"Connection: close\r\n", b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"A" * 300,
)  # fmt: skip
STREAMS = st.lists(
    st.sampled_from(REQUESTS).flatmap(lambda request: broken(request, (*REQUESTS, *HOSTILE), most=2)),
    min_size=1,
    max_size=4,
).map(b"".join)


class Wire(asyncio.Transport):
    """The server's end of a connection that lets go of nothing."""

    def __init__(self):
        super().__init__()
        self.sent, self.is_closed = bytearray(), False

    def get_extra_info(self, name, default=None):
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def write(self, data):
        if not self.is_closed:
            self.sent += data

    def is_closing(self):
        return self.is_closed

    def close(self):
        self.is_closed = True

    def can_write_eof(self):
        return True

    def write_eof(self):
        self.is_closed = True

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass

    def set_protocol(self, protocol):
        self.protocol = protocol


class Bodies:
    """An application that remembers what it was asked, and answers with the size of the body."""

    def __init__(self):
        self.seen = []

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.seen.append((scope["method"], scope["path"], body))
        text = str(len(body)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
        await send({"type": "http.response.body", "body": text})


@pytest.fixture(autouse=True)
def unlogged(monkeypatch):
    """Every broken request is a warning, and pytest keeps them all."""
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "disabled", True)


@pytest.fixture(scope="module")
def loop():
    made = asyncio.new_event_loop()
    made.set_exception_handler(lambda _, context: made.faults.append(context))
    made.faults = []
    yield made
    made.close()


def exchange(loop, kind, data, pieces):
    """(what the application saw, what came back) for ``data`` in so many pieces."""

    async def talk():
        app = Bodies()
        config = uvicorn.Config(app, http=partial(kind, head_timeout_s=60), ws="none", lifespan="off", log_config=None)
        wire = Wire()
        protocol = kind(config, ServerState(), {}, loop, head_timeout_s=60)
        wire.protocol = protocol
        protocol.connection_made(wire)
        size = max(1, -(-len(data) // pieces))
        for start in range(0, len(data), size):
            if wire.is_closed:
                break
            wire.protocol.data_received(data[start : start + size])
            for _ in range(4):
                await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        wire.protocol.connection_lost(None)
        protocol._unset_keepalive_if_required()
        for _ in range(4):
            await asyncio.sleep(0)
        return app.seen, bytes(wire.sent)

    loop.faults.clear()
    found = loop.run_until_complete(talk())
    assert loop.faults == []
    return found


def statuses(answer):
    """The status of every answer; raises where what came back is not one whole answer after the other."""
    found = []
    while answer:
        head, end, rest = answer.partition(b"\r\n\r\n")
        assert end, answer
        found.append(int(re.match(rb"HTTP/1\.[01] (\d{3}) ", head)[1]))
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        if length:
            assert len(rest) >= int(length[1])
            answer = rest[int(length[1]) :]
        else:
            answer = rest if found[-1] == 100 else b""
    return found


@pytest.mark.parametrize("request_", REQUESTS)
def test_the_seeds_are_answered(loop, request_):
    assert statuses(exchange(loop, HttpProtocol, request_, 1)[1])[-1] in (200, 400)


@examples(25_000, 60)
@given(STREAMS, st.sampled_from((1, 2, 3, 50)))
def test_broken_streams(loop, data, pieces):
    with allocating_at_most(4 * HEADER_LIMIT_BYTES + 512 * KIB):
        seen, answer = exchange(loop, HttpProtocol, data, pieces)
    found = statuses(answer)
    assert set(found) <= {100, 200, 400, 431}
    assert found.count(200) == len(seen)
    _, strict = exchange(loop, AnyHttpProtocol, data, 1)
    assert set(statuses(strict)) <= {100, 200, 400, 431}


@examples(15_000, 60)
@given(STREAMS, st.sampled_from((2, 3, 50)))
def test_how_bytes_are_cut_into_pieces_changes_nothing(loop, data, pieces):
    whole, parts = (exchange(loop, HttpProtocol, data, count)[0] for count in (1, pieces))
    assert whole == parts


@examples(15_000, 60)
@given(STREAMS)
def test_nobody_reads_a_body_where_h11_reads_another(loop, data):
    """Where neither refuses anything, one may wait for more than the other, and sees the same up to there.

    The end of a head is an empty line with carriage returns here, and one without them is enough for h11.
    """
    (fast, fast_answer), (strict, strict_answer) = (
        exchange(loop, kind, data, 1) for kind in (HttpProtocol, AnyHttpProtocol)
    )
    if {400, 431}.isdisjoint(statuses(fast_answer) + statuses(strict_answer)):
        assert all(one == other for one, other in zip(fast, strict, strict=False))


@examples(10_000, 60)
@given(st.sampled_from(REQUESTS).flatmap(lambda request: broken(request, HOSTILE)))
def test_broken_heads(data):
    with allocating_at_most(64 * KIB + 8 * len(data)):
        length = body_length(data)
    assert length is None or 0 <= length < 10**15
