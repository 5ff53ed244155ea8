"""A redis-server of one's own, to be killed, frozen and started again. Nothing of it is kept on disk."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from types import TracebackType
from typing import Self

from loadtest.servers import HOST, ServerError, free_port

_START_LIMIT_S = 20.0
_POLL_S = 0.02


class RedisProcess:
    """Running inside the context. Raises ServerError where there is no redis-server, or it does not start."""

    def __init__(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise ServerError("redis-server is not installed, and this needs one")
        self.port = free_port()
        self._command = [program, "--port", str(self.port), "--bind", HOST, "--save", "", "--appendonly", "no"]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, also again, empty, after ``kill``; returns when it answers."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up_s = time.monotonic() + _START_LIMIT_S
        while not self._answers():
            if time.monotonic() > give_up_s or self._process.poll() is not None:
                self.kill()
                raise ServerError(f"redis-server on port {self.port} does not answer")
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """End it at once, frozen or not; may be repeated."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        """It takes connections and answers nobody."""
        self._running.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._running.send_signal(signal.SIGCONT)

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError("redis-server was not started")
        return self._process

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        return False
