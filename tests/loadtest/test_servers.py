import http.client
import sys
import time

import psutil
import pytest

from loadtest import servers
from loadtest.servers import HOST, Fleet, Server, ServerError, ServerSpec, free_port


def status_of(server: Server) -> int:
    connection = http.client.HTTPConnection(HOST, server.port, timeout=30)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    finally:
        connection.close()


def family(server: Server) -> list[psutil.Process]:
    """The server's processes, found without its help."""
    found = [p for p in psutil.Process().children(recursive=True) if str(server.port) in p.cmdline()]
    return [*found, *(child for process in found for child in process.children(recursive=True))]


def wait_until(condition) -> None:
    give_up_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def is_stopped(processes) -> bool:
    return all(process.status() == psutil.STATUS_STOPPED for process in processes)


def test_a_server_is_ready_inside_and_gone_after(fake_spec, tmp_path):
    with Server(fake_spec("fake", "--child"), tmp_path / "log") as server:
        assert status_of(server) == 200
        processes = family(server)
        assert len(processes) == 2
        assert server.resident_bytes() > 0
        before_s = server.cpu_s()
        wait_until(lambda: server.cpu_s() > before_s)  # the child's, which computes all the time
    wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes))


def test_a_paused_server_is_stopped_with_its_children_and_goes_on_after(fake_spec, tmp_path):
    with Server(fake_spec("fake", "--child"), tmp_path / "log") as server:
        processes = family(server)
        with server.paused():
            wait_until(lambda: is_stopped(processes))
        assert status_of(server) == 200
        server.pause()  # and one that is paused can be stopped for good


def test_a_server_that_ignores_sigterm_is_killed(fake_spec, tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "STOP_LIMIT_S", 0.05)
    with Server(fake_spec("fake", "--stubborn"), tmp_path / "log") as server:
        (process,) = family(server)
    assert not process.is_running()


def test_a_server_that_dies_says_its_status_and_its_log(tmp_path):
    command = (sys.executable, "-c", "import sys; print('no model here', file=sys.stderr); sys.exit(3)")
    with pytest.raises(ServerError, match=r"doomed: ended with status 3; log .*out\.log ends:\nno model here"):
        Server(ServerSpec("doomed", command, "/health"), tmp_path / "out.log").__enter__()


def test_a_server_that_never_gets_ready_is_given_up_and_stopped(tmp_path):
    command = (sys.executable, "-c", "import time; time.sleep(600)", "{port}")
    server = Server(ServerSpec("idle", command, "/health", ready_limit_s=0.2), tmp_path / "log")
    with pytest.raises(ServerError, match=r"idle: /health not 200 within 0\.2 s"):
        server.__enter__()
    assert family(server) == []


def test_a_command_that_does_not_exist_is_said(tmp_path):
    with pytest.raises(ServerError, match="absent: no-such-command does not start"):
        Server(ServerSpec("absent", ("no-such-command",), "/"), tmp_path / "log").__enter__()


def test_stopping_a_server_that_never_started_is_nothing(fake_spec, tmp_path):
    Server(fake_spec("fake"), tmp_path / "log").stop()


def test_a_fleet_starts_each_server_once_and_runs_one_at_a_time(fake_spec, tmp_path):
    first, second = fake_spec("first"), fake_spec("second")
    with Fleet(tmp_path) as fleet:
        with fleet.running(first) as server:
            began = family(server)
        with fleet.running(second) as other:
            wait_until(lambda: is_stopped(began))
            assert status_of(other) == 200
        with fleet.running(first) as again:
            assert again is server
            assert status_of(again) == 200
            wait_until(lambda: is_stopped(family(other)))
    assert not any(process.is_running() for process in began)
    assert {file.name for file in tmp_path.iterdir()} == {"1-first.log", "2-second.log"}


def test_a_fleet_notices_a_server_that_died_meanwhile(fake_spec, tmp_path):
    spec = fake_spec("frail")
    with Fleet(tmp_path) as fleet:
        with fleet.running(spec) as server:
            (process,) = family(server)
        process.kill()
        wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE)
        with pytest.raises(ServerError, match="frail: ended with status -9"), fleet.running(spec):
            pass


def test_free_ports_are_free():
    assert 0 < free_port() < 65536
