"""Against servers that say byte for byte what a test wants."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import httptools
import pytest

from loadtest.http_client import Client, Fields, Reply
from loadtest.servers import HOST, free_port

pytestmark = pytest.mark.timeout(20)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nSlice-Width: 3\r\n\r\nok"


class Scripted:
    """Answers the requests of each connection with ``answers``, one after the other, and closes it behind the last."""

    def __init__(self, *answers: bytes) -> None:
        self.answers, self.heard, self.connections = answers, list[bytes](), 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        for answer in self.answers:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            self.heard.append(head + await reader.readexactly(length))
            writer.write(answer)
            await writer.drain()


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def client_of(serve: Serve, limit_s: float = 5.0, user: str = "") -> AsyncIterator[Client]:
    """A client of a server of its own; afterwards the server's connections have ended, too."""
    serving: set[asyncio.Task[None] | None] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await serve(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(one, HOST, 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        async with Client(f"http://{user}{HOST}:{port}/classify?top=1", limit_s) as client:
            yield client
        await asyncio.gather(*(task for task in serving if task))


async def test_a_request_is_plain_http():
    server = Scripted(ANSWER)
    async with client_of(server, user="us%40er:pw@") as client:
        reply = await client.post({"Content-Type": "image/png"}, b"pixels")
    head, _, body = server.heard[0].partition(b"\r\n\r\n")
    first, *fields = head.decode().split("\r\n")
    assert first == "POST /classify?top=1 HTTP/1.1"
    assert {name: value for name, _, value in (field.partition(": ") for field in fields)} == {
        "Host": f"{HOST}:{client._port}", "User-Agent": "slicewise-load", "Authorization": "Basic dXNAZXI6cHc=",
        "Content-Type": "image/png", "Content-Length": "6",
    }  # fmt: skip
    assert body == b"pixels"
    assert (reply.status, reply.body, reply.headers["slice-width"]) == (200, b"ok", "3")


async def test_a_connection_serves_one_request_after_the_other():
    server = Scripted(*[ANSWER] * 3)
    async with client_of(server) as client:
        for _ in range(3):
            assert (await client.post({}, b"")).body == b"ok"
    assert server.connections == 1


async def test_requests_at_once_have_a_connection_each():
    server = Scripted(*[ANSWER] * 3)
    async with client_of(server) as client:
        await asyncio.gather(*(client.post({}, b"") for _ in range(3)))
    assert server.connections == 3


@pytest.mark.parametrize(
    "answer",
    [ANSWER.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), ANSWER.replace(b"HTTP/1.1", b"HTTP/1.0")],
    ids=["said", "by the version"],
)
async def test_a_connection_that_ends_is_not_used_again(answer):
    server = Scripted(*[answer] * 2)
    async with client_of(server) as client:
        for _ in range(2):
            assert (await client.post({}, b"")).body == b"ok"
    assert server.connections == 2


async def test_a_connection_that_the_server_has_closed_meanwhile_is_not_used_again():
    server = Scripted(ANSWER)
    async with client_of(server) as client:
        for _ in range(2):
            assert (await client.post({}, b"")).body == b"ok"
            await asyncio.sleep(0.1)
    assert server.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + ANSWER,
    ],
    ids=["chunked", "behind an interim one"],
)
async def test_answers_in_pieces(answer):
    server = Scripted(answer, ANSWER)
    async with client_of(server) as client:
        first, second = await client.post({}, b""), await client.post({}, b"")
    assert (first.status, first.body) == (second.status, second.body) == (200, b"ok")
    assert "link" not in first.headers
    assert server.connections == 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", ConnectionResetError),
        (ANSWER[:-1], ConnectionResetError),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", ConnectionResetError),
        (b"SSH-2.0-OpenSSH\r\n", httptools.HttpParserError),
    ],
    ids=["none", "cut", "without a length", "not HTTP"],
)
async def test_what_is_no_whole_answer_is_an_error(answer, error):
    server = Scripted(answer)
    async with client_of(server) as client:
        with pytest.raises(error):
            await client.post({}, b"")


async def test_an_answer_after_the_limit_is_a_timeout_and_never_the_next_ones():
    async def late(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.3)
        writer.write(ANSWER.replace(b"ok", b"no"))

    async with client_of(late, limit_s=0.1) as client:
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await client.post({}, b"")
        assert not client._idle


async def test_a_server_that_is_not_there_is_an_error():
    async with Client(f"http://{HOST}:{free_port()}/", 5.0) as client:
        with pytest.raises(ConnectionRefusedError):
            await client.post({}, b"")


async def test_a_client_that_closes_leaves_nothing_open():
    async def never(reader, writer):
        await reader.read()

    ended: list[Reply | Exception] = []
    async with client_of(never) as client:
        client.send(client.head({}, 0), ended.append)
        while not client._open:
            await asyncio.sleep(0.01)
    assert not client._open
    assert ended == []


@pytest.mark.parametrize("headers", [{"Bad": "a\r\nb"}, {"Bad name": "x"}, {"": "x"}, {"Bad": "\x7f"}])
async def test_a_field_that_would_break_the_request_is_refused(headers):
    async with Client(f"http://{HOST}:1/", 1.0) as client:
        with pytest.raises(ValueError, match="allowed: a token, and printable ASCII"):
            client.head(headers, 0)


@pytest.mark.parametrize("url", ["ftp://user:secret@host/", "host:80/x", "http:///x"])
async def test_a_url_that_cannot_be_asked_is_refused_without_its_password(url):
    with pytest.raises(ValueError, match="allowed: http:// or https:// and a host") as refused:
        Client(url, 1.0)
    assert "secret" not in str(refused.value)


def test_fields_have_names_in_any_case_and_the_first_of_several_counts():
    fields = Fields([(b"Slice-Width", b"3"), (b"slice-width", b"4"), (b"x", b"\xe9")])
    assert (fields["SLICE-WIDTH"], fields.get("X"), fields.get("y"), len(fields)) == ("3", "é", None, 2)
    assert set(fields) == {"slice-width", "x"}
