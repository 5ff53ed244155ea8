import asyncio
import re
import socket
import threading

import pytest

from loadtest import hostile
from loadtest.corpus import EncodedImage
from loadtest.hostile import NONE, Hostiles
from loadtest.redis_process import RedisProcess
from loadtest.servers import ServerError

FIELDS_ALLOWED = 100


@pytest.fixture
def slow_server():
    """Answers 431 to many fields, 408 to a body that is not there at once, and 200 otherwise; its port."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"Content-Length: (\d+)", head)[1])
            status = b"431 No" if head.count(b"\r\n") > FIELDS_ALLOWED else b"200 OK"
            if status == b"200 OK":
                try:
                    await asyncio.wait_for(reader.readexactly(length), 0.15)
                except TimeoutError:
                    status = b"408 Slow"
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    ready, ports, stop = threading.Event(), [], []

    async def serve() -> None:
        stop.append((asyncio.get_running_loop(), event := asyncio.Event()))
        server = await asyncio.start_server(talk, "127.0.0.1", 0, limit=2**20)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        await event.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ready.wait()
    yield ports[0]
    loop, event = stop[0]
    loop.call_soon_threadsafe(event.set)
    thread.join()


def test_hostile_clients_do_what_they_are_named_for(slow_server, monkeypatch):
    monkeypatch.setattr(hostile, "VANISH_EVERY_S", 0.02)
    monkeypatch.setattr(hostile, "FLOOD_EVERY_S", 0.2)
    monkeypatch.setattr(hostile, "FLOOD_FIELDS", 2 * FIELDS_ALLOWED)
    monkeypatch.setattr(hostile, "SLOW_CLIENTS", 2)
    monkeypatch.setattr(hostile, "BYTE_EVERY_S", 0.05)
    hostiles = Hostiles(slow_server, "/v1/classify", EncodedImage("image/png", b"0123456789" * 9), 0.65)
    hostiles.run()
    sent = hostiles.sent
    assert set(sent.vanished) == {"within the headers", "after the headers", "within the body", "before the answer"}
    assert sent.vanished.total() == 32
    assert sent.slow_headers == {NONE: 2}
    assert sent.slow_bodies == {"408": 2}
    assert sent.floods == {"431": 3}


def ping(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=0.3) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(64)


def test_a_redis_dies_freezes_and_comes_back_on_its_port():
    try:
        redis = RedisProcess()
    except ServerError as error:
        pytest.skip(str(error))
    with redis:
        assert ping(redis.port).startswith(b"+PONG")
        redis.freeze()
        with pytest.raises(TimeoutError):
            ping(redis.port)
        redis.thaw()
        assert ping(redis.port).startswith(b"+PONG")
        redis.kill()
        with pytest.raises(ConnectionRefusedError):
            ping(redis.port)
        redis.start()
        assert ping(redis.port).startswith(b"+PONG")
        redis.freeze()
    with pytest.raises(ConnectionRefusedError):
        ping(redis.port)


def test_without_redis_it_is_said(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ServerError, match="redis-server is not installed"):
        RedisProcess()
