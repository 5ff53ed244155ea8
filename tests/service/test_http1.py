"""Bytes on the socket: what is parsed in C, what goes to h11, and what is refused."""

import asyncio
import contextlib
import json
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response
from wire import IMAGE, listening, post

from service.api.bodies import arrived_s
from service.http1 import HEADER_LIMIT_BYTES, body_length

PROBE = b"GET /healthz HTTP/1.1\r\nHost: x\r\n%s\r\n"
LAST = PROBE % b"Connection: close\r\n"


def raw(port, *pieces):
    """Everything that comes back for raw bytes, until the server closes or is silent for two seconds."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
            if len(pieces) > 1:
                time.sleep(0.001)
        with contextlib.suppress(TimeoutError):
            while chunk := connection.recv(65536):
                answer += chunk
    return answer


def pieces_of(request, count):
    size = -(-len(request) // count)
    return [request[start : start + size] for start in range(0, len(request), size)]


def statuses(answer):
    """The status of every answer, by its Content-Length; one without is the last."""
    found = []
    while answer:
        head, _, rest = answer.partition(b"\r\n\r\n")
        found.append(int(head[9:12]))
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        answer = rest[int(lengths[0].split(b":")[1]) :] if lengths else b""
    return found


@pytest.mark.parametrize("offer", ["h2c", "websocket", "TLS/1.2"])
@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_a_request_that_offers_an_upgrade_keeps_its_body(server, offer, count):
    fields = (
        f"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: {offer}\r\nHTTP2-Settings: AAMA\r\nSlice-Width: 1\r\n"
    )
    answer = raw(server.port, *pieces_of(post(fields), count))
    assert statuses(answer) == [200]
    assert b"slice-width: 1\r\n" in answer.lower()
    assert len(json.loads(answer.partition(b"\r\n\r\n")[2])["predictions"]) == 3


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_offer_changes_nothing_for_the_version(server, version):
    request = f"GET /healthz HTTP/{version}\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n".encode()
    began_s = time.monotonic()
    answer = raw(server.port, request)
    assert statuses(answer) == [200]
    if version == "1.0":  # whose answer ends with the connection
        assert time.monotonic() - began_s < 1.5


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_pipelined_requests_of_all_kinds_are_answered_in_their_order(server, count):
    chunked = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
    requests = [
        post(),
        PROBE % b"",
        PROBE.replace(b"/healthz", b"/nowhere") % b"",
        post("Content-Type: text/plain\r\n"),
        PROBE % b"Connection: upgrade\r\nUpgrade: h2c\r\n",
        chunked % (len(IMAGE), IMAGE),
        post(),
        LAST,
    ]
    assert statuses(raw(server.port, *pieces_of(b"".join(requests), count))) == [200, 200, 404, 415, 200, 200, 200, 200]


def test_many_pipelined_offers_are_all_answered(server):
    offer = PROBE % b"Connection: upgrade\r\nUpgrade: h2c\r\n"
    assert statuses(raw(server.port, offer * 2000 + LAST)) == [200] * 2001


def test_a_broken_request_does_not_take_the_answer_of_the_one_before_it(server):
    assert statuses(raw(server.port, post() + b"BROKEN\r\n\r\n")) == [200, 400]
    assert statuses(raw(server.port, post() + PROBE % b"\x00: 1\r\n")) == [200, 400]


def test_a_pipelined_head_that_is_not_complete_waits_for_its_rest(server):
    large = post(body=b"x" * 100_000)
    assert statuses(raw(server.port, large + LAST[:30], LAST[30:])) == [415, 200]


@pytest.mark.parametrize("request_", [b"CONNECT a:1 HTTP/1.1\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_verbs_that_no_route_has_are_refused_and_nothing_breaks(server, request_):
    answer = raw(server.port, request_)
    assert 400 <= int(answer[9:12]) < 500
    assert server.client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "trailer", [b"Slice-Width: 2\r\nX-Request-ID: smuggled\r\n", b"X: " + b"a" * 200_000 + b"\r\n"]
)
def test_trailers_are_no_headers_and_are_bounded(server, trailer):
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    with contextlib.suppress(ConnectionError):
        answer = raw(server.port, head + b"%x\r\n" % len(IMAGE) + IMAGE + b"\r\n0\r\n" + trailer + b"\r\n")
        assert b"smuggled" not in answer
        assert b'"forced"' not in answer
    assert server.client.get("/healthz").status_code == 200


def test_an_expectation_is_met_before_the_body_is_sent(server):
    request = post("Expect: 100-continue\r\nConnection: close\r\n")
    head = request[: -len(IMAGE)]
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(head)
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(IMAGE)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


FIELD = b"X-%d: " + b"a" * 990 + b"\r\n"


@pytest.mark.parametrize("size", [1000, 50_000, 10**7])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (b"X-Long: " + b"a" * 200_000 + b"\r\n", "more than 65536 bytes"),
        (b"X-" + b"a" * 200_000 + b": 1\r\n", "more than 65536 bytes"),
        (b"".join(FIELD % k for k in range(70)), "more than 65536 bytes"),
        (b"".join(b"X-%d: 1\r\n" % k for k in range(300)), "more than 256 header fields"),
        (b"".join(b"X-%d: 1\r\n" % k for k in range(10_000)), "more than"),
    ],
    ids=["one long value", "one long name", "many bytes", "many fields", "ten thousand fields"],
)
def test_endless_headers_are_refused_with_a_reason(server, fields, message, size):
    request = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n"
    answer = raw(server.port, *(request[start : start + size] for start in range(0, len(request), size)))
    assert statuses(answer) == [431]
    head, _, body = answer.partition(b"\r\n\r\n")
    problem = json.loads(body)
    assert problem["error_type"] == "headers_too_large"
    assert message in problem["error"]
    assert f"x-request-id: {problem['request_id']}".encode() in head


CHUNKED = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
CHUNKED_POST = CHUNKED % (len(IMAGE), IMAGE)


@pytest.mark.parametrize("count", [1, 50])
def test_endless_headers_are_refused_with_a_reason_by_h11_too(server, count):
    endless = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000
    answer = raw(server.port, CHUNKED_POST, *pieces_of(endless, count))
    assert statuses(answer) == [200, 431]
    assert b'"error_type":"headers_too_large"' in answer


@pytest.fixture(scope="module")
def impatient(start):
    with start(head_timeout_s=0.4, body_timeout_s=0.4, keep_alive_s=1) as running:
        yield running


def dripped(port, begin, drops):
    """Everything that comes back for ``begin`` and then one byte after the other, until the server closes."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(begin)
        connection.settimeout(0.02)
        with contextlib.suppress(ConnectionError):
            for drop in drops:
                with contextlib.suppress(TimeoutError):
                    chunk = connection.recv(65536)
                    if not chunk:
                        return answer
                    answer += chunk
                with contextlib.suppress(BrokenPipeError):  # it has answered and reads no more
                    connection.sendall(bytes([drop]))
            raise AssertionError("the server waits for ever")
    return answer


@pytest.mark.parametrize("before", [b"", PROBE % b"", CHUNKED_POST], ids=["first", "later", "by h11"])
def test_a_head_that_drips_is_refused(impatient, before):
    answer = dripped(impatient.port, before, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2000)
    assert statuses(answer) == [200] * bool(before) + [408]
    head, _, body = answer.rpartition(b"\r\n\r\n")
    problem = json.loads(body)
    assert problem["error_type"] == "timeout"
    assert "0.4 s" in problem["error"]
    assert f"x-request-id: {problem['request_id']}".encode() in head


def test_a_body_that_drips_is_refused(impatient):
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n"
    assert statuses(dripped(impatient.port, head + b"Content-Length: 5000\r\n\r\n", b"x" * 5000)) == [408]
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n"
    assert statuses(dripped(impatient.port, chunked, b"x" * 4096)) == [408]


@pytest.mark.parametrize("length", [b"Content-Length: 5000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1000\r\n"])
def test_a_body_that_drips_after_its_answer_does_not_hold_the_connection(impatient, length):
    request = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nCompute-Budget: -1\r\n" + length
    assert statuses(dripped(impatient.port, request, b"x" * 4096)) == [400]


@pytest.mark.parametrize(
    ("length", "rest"),
    [(b"Content-Length: 5000\r\n\r\n", b"x" * 5000), (b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n0\r\n\r\n")],
    ids=["plain", "by h11"],
)
def test_a_connection_whose_body_ended_after_its_answer_is_let_go_and_may_be_used_again(impatient, length, rest):
    request = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nCompute-Budget: -1\r\n" + length
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=10) as connection:
        connection.sendall(request)
        assert statuses(connection.recv(65536)) == [400]
        connection.sendall(rest)
        connection.sendall(PROBE % b"")
        assert statuses(connection.recv(65536)) == [200]
        connection.sendall(request)
        assert statuses(connection.recv(65536)) == [400]
        connection.sendall(rest)
        assert connection.recv(65536) == b""  # after keep_alive_s


@pytest.mark.parametrize("rest", [b"no chunk\r\n", b"0\r\nX: " + b"a" * 200_000])
def test_what_is_wrong_with_a_body_after_its_answer_is_not_answered_again(server, rest, caplog):
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nCompute-Budget: -1\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head)
        assert statuses(connection.recv(65536)) == [400]
        with contextlib.suppress(ConnectionError):
            connection.sendall(rest)
            assert connection.recv(100) == b""
    assert "Fatal error" not in caplog.text


async def test_an_answers_head_leaves_with_the_beginning_of_its_body():
    async def app(scope, receive, send):
        fields = [(b"content-length", b"6")]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        await asyncio.sleep(0.02)
        await send({"type": "http.response.body", "body": b"abc", "more_body": True})
        await asyncio.sleep(0.02)
        await send({"type": "http.response.body", "body": b"def"})

    async with listening(app) as address:
        reader, writer = await asyncio.open_connection(*address)
        for _ in range(2):  # of one connection
            writer.write(post(body=b"x"))
            first = await reader.read(65536)
            assert first.startswith(b"HTTP/1.1 200 OK\r\n")
            assert first.endswith(b"\r\n\r\nabc")
            assert await reader.read(65536) == b"def"
        writer.close()
        await writer.wait_closed()


async def test_a_head_without_its_body_still_leaves():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
        raise RuntimeError("no body")

    async with listening(app) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(post(body=b"x"))
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()


async def test_a_request_has_arrived_with_its_last_byte_however_long_its_turn_takes():
    waited_s = []

    async def app(scope, receive, send):
        await asyncio.sleep(0.05)
        request = Request(scope, receive)
        await request.body()
        waited_s.append(time.monotonic() - arrived_s(request))
        await Response()(scope, receive, send)

    async with listening(app) as address:
        reader, writer = await asyncio.open_connection(*address)
        chunked = post("Transfer-Encoding: chunked\r\nConnection: close\r\n", body=b"1\r\nx\r\n0\r\n\r\n", length=False)
        for request in (post(body=b"x"), chunked):  # of the second nobody saw it
            writer.write(request)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()
    plain_s, other_s = waited_s
    assert 0.05 <= plain_s < 5
    assert other_s < plain_s


def test_who_says_nothing_is_let_go_without_a_word(impatient):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=10) as connection:
        assert connection.recv(100) == b""


@pytest.mark.parametrize("first", [PROBE % b"", CHUNKED_POST], ids=["plain", "by h11"])
def test_a_connection_outlives_the_time_of_one_head(impatient, first):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=10) as connection:
        for request in (first, *[PROBE % b""] * 4):
            for piece in (request[:20], request[20:]):
                connection.sendall(piece)
                time.sleep(0.1)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_an_endless_target_is_refused(server):
    assert statuses(raw(server.port, b"GET /" + b"a" * 70_000)) == [431]


def test_large_headers_within_the_bounds_are_read_whatever_their_pieces(server):
    request = PROBE % (b"Connection: close\r\n" + b"".join(FIELD % k for k in range(60)))
    for count in (1, 2, 60):
        assert statuses(raw(server.port, *pieces_of(request, count))) == [200]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (b"", 0),
        (b"Content-Length: 12\r\n", 12),
        (b"content-LENGTH:  12  \r\nX: y\r\n", 12),
        (b"Content-Length: 12\r\nContent-Length: 12\r\n", None),
        (b"Content-Length: 12\r\nContent-Length: 13\r\n", None),
        (b"Content-Length: 12, 12\r\n", None),
        (b"Content-Length : 12\r\n", None),
        (b"Content-Length: +12\r\n", None),
        (b"Content-Length: -1\r\n", None),
        (b"Content-Length: 1_0\r\n", None),
        (b"Content-Length: 0x10\r\n", None),
        (b"Content-Length:\r\n", None),
        (b"Transfer-Encoding: chunked\r\n", None),
        (b"Content-Length: 12\r\ntransfer-ENCODING: gzip\r\n", None),
        (b"Transfer-Encoding : chunked\r\n", None),
        (b"X: y\r\n Content-Length: 3\r\n", None),
        (b"X: y\nTransfer-Encoding: chunked\r\n", None),
        (b"X: y\rTransfer-Encoding: chunked\r\n", None),
        (b"Upgrade: h2c\r\n", None),
        (b"Expect: 100-continue\r\n", None),
    ],
)
def test_which_heads_are_plain(fields, expected):
    assert body_length(b"POST / HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n") == expected


@pytest.mark.parametrize(
    "start", [b"PUT / HTTP/1.1", b"POST / HTTP/1.0", b"POST /a b HTTP/1.1", b"post / HTTP/1.1", b""]
)
def test_other_request_lines_are_not_plain(start):
    assert body_length(start + b"\r\nHost: x\r\n\r\n") is None


@given(st.binary(max_size=300))
def test_no_bytes_break_the_look_at_a_head(data):
    assert (body_length(data + b"\r\n\r\n") or 0) >= 0
    assert len(data) < HEADER_LIMIT_BYTES
