import socket
import sys
import time

import pytest

from loadtest.servers import ServerSpec
from loadtest.victim import Victim, sampled

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="descriptors are read from /proc")
POOLED = """
import http.server, socket, sys
kept = [socket.create_connection(("127.0.0.1", int(sys.argv[2]))) for _ in range(3)]
http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind="127.0.0.1")
"""


@pytest.fixture
def victim(tmp_path):
    """A server with three connections to a port of ours."""
    with socket.create_server(("127.0.0.1", 0)) as pool:
        port = pool.getsockname()[1]
        command = (sys.executable, "-c", POOLED, "{port}", str(port))
        with Victim(ServerSpec("pooled", command, "/"), tmp_path / "log") as server:
            yield server, port


def test_connections_of_a_pool_are_no_leak(victim):
    server, port = victim
    every = server.descriptors()
    assert server.pooled() == 0
    server.pool_port = port
    assert server.pooled() == 3
    assert server.descriptors() == every - 3


def test_samples_go_on_while_it_lives_and_end_with_the_watch(victim):
    server, _ = victim
    with sampled(server, every_s=0.01) as samples:
        give_up_s = time.monotonic() + 20
        while len(samples) < 3:
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
    taken = len(samples)
    assert all(sample.resident_bytes > 0 and sample.descriptors > 0 for sample in samples)
    assert [sample.at_s for sample in samples] == sorted(sample.at_s for sample in samples)
    time.sleep(0.05)
    assert len(samples) == taken


def test_it_dies_and_comes_back_on_its_port(victim):
    server, _ = victim
    pid, url = server.pid, server.url
    server.kill()
    assert server.wait_status(0) is not None
    server.__enter__()
    assert server.pid != pid
    assert server.url == url
    server.terminate()
    assert server.wait_status(20) is not None


def test_a_server_that_does_not_end_has_no_status(victim):
    server, _ = victim
    assert server.wait_status(0.01) is None
