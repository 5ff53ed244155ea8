"""A real Redis of a test's own, which can be killed, frozen, slowed and started again."""

import contextlib
import shutil
import signal
import socket
import subprocess
import time

import pytest


class RedisServer:
    """A redis-server on a free port, with nothing on disk."""

    def __init__(self):
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("needs redis-server: apt-get install redis-server")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = None

    def start(self):
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up = time.monotonic() + 20
        while self.ask("PING") != "+PONG":
            assert time.monotonic() < give_up
            time.sleep(0.01)

    def kill(self):
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait()

    def freeze(self):
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self._process.send_signal(signal.SIGCONT)

    def pause(self, milliseconds):
        """Answer everybody only after so long."""
        assert self.ask(f"CLIENT PAUSE {milliseconds}") == "+OK"

    def ask(self, command):
        """The first line of the answer to an inline command; empty when there is none."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
            connection.sendall(f"{command}\r\n".encode())
            return connection.recv(65536).decode("latin-1").split("\r\n")[0]
        return ""


@contextlib.contextmanager
def running_redis():
    server = RedisServer()
    server.start()
    try:
        yield server
    finally:
        server.kill()
