"""A server under test as a subprocess: start, wait until ready, account, pause, stop.

Linux and macOS: idle rivals are held by SIGSTOP, so that one that polls takes nothing from the one measured.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

HOST = "127.0.0.1"
READY_LIMIT_S = 180.0
"""Time to start: slicewise measures its latency table, which takes up to 20 s a process."""
STOP_LIMIT_S = 40.0
"""Time after SIGTERM, then SIGKILL; above the longest drain of slicewise's default settings."""
_ORPHANS_LIMIT_S = 2.0
"""Time for child processes to end after the first has."""
_POLL_S = 0.05
ASK_LIMIT_S = 30.0
_PROBE_LIMIT_S = 2.0
_LOG_TAIL_BYTES = 800


class ServerError(RuntimeError):
    """A server did not start, or died. The message names its log and quotes the end of it."""


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """How to start a server.

    command     its arguments; ``{port}`` in them becomes a free port.
    ready_path  what answers 200 once it can serve.
    """

    name: str
    command: tuple[str, ...]
    ready_path: str
    ready_limit_s: float = READY_LIMIT_S


class Server:
    """A running server and its child processes. A context manager: ready inside, gone after.

    Both of its output streams go to ``log_path``.
    """

    def __init__(self, spec: ServerSpec, log_path: Path) -> None:
        self.spec, self.log_path = spec, log_path
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        command = [argument.replace("{port}", str(self.port)) for argument in self.spec.command]
        with self.log_path.open("wb") as log:
            try:
                # A session of its own: signals reach all its processes, and a Ctrl-C at the terminal none.
                self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            except OSError as error:
                raise ServerError(f"{self.spec.name}: {command[0]} does not start: {error}") from error
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_ready(self) -> None:
        give_up_s = time.monotonic() + self.spec.ready_limit_s
        while not self._is_ready():
            self.check_alive()
            if time.monotonic() > give_up_s:
                limit_s = self.spec.ready_limit_s
                raise ServerError(
                    f"{self.spec.name}: {self.spec.ready_path} not 200 within {limit_s:g} s; {self._log()}"
                )
            time.sleep(_POLL_S)

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=_PROBE_LIMIT_S)
        try:
            connection.request("GET", self.spec.ready_path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def check_alive(self) -> None:
        """Raise ServerError when the process has ended."""
        status = self._running.poll()
        if status is not None:
            raise ServerError(f"{self.spec.name}: ended with status {status}; {self._log()}")

    @property
    def pid(self) -> int:
        """Of its first process."""
        return self._running.pid

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:  # fmt: skip
        """Status and body of one answer. Raises ServerError when there is none."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=ASK_LIMIT_S)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.spec.name}: {method} {path}: {error!r}; log {self.log_path}") from error
        finally:
            connection.close()

    def cpu_s(self) -> float:
        """CPU seconds, user and system, of all its processes, those that have ended among them."""
        return self._sum(_cpu_s)

    def resident_bytes(self) -> int:
        """Resident memory of all its processes; pages that they share count for each."""
        return int(self._sum(lambda process: process.memory_info().rss))

    def _sum(self, read: Callable[[psutil.Process], float]) -> float:
        total = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):  # ended since the tree was read
                total += read(process)
        return total

    def pause(self) -> None:
        """Stop all its processes where they are."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them run again."""
        self._signal(signal.SIGCONT)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Paused inside, running after."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL to whatever is left after the limits. May be repeated, also on a dead server."""
        if self._process is None:
            return
        children = self._tree()[1:]
        self._signal(signal.SIGTERM)
        self.resume()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_LIMIT_S)
        psutil.wait_procs(children, timeout=_ORPHANS_LIMIT_S)
        self._signal(signal.SIGKILL)
        self._process.wait()

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError(f"{self.spec.name}: was not started")
        return self._process

    def _tree(self) -> list[psutil.Process]:
        """Its processes, the first one first; none when it has ended."""
        try:
            root = psutil.Process(self._running.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._running.pid, number)

    def _log(self) -> str:
        tail = self.log_path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
        return f"log {self.log_path} ends:\n{tail}"


def _cpu_s(process: psutil.Process) -> float:
    """Of the process, and of those of its children that have ended: they are in no tree any more."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class Fleet:
    """Servers by their specification, each started when first needed, of which at most one runs at a time.

    A context manager; all are stopped after.
    """

    def __init__(self, log_folder: Path) -> None:
        self._log_folder = log_folder
        self._servers: dict[ServerSpec, Server] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
        self._servers.clear()

    @contextlib.contextmanager
    def running(self, spec: ServerSpec) -> Iterator[Server]:
        """The server runs inside, alone, and is paused after. Its first start waits until it is ready."""
        server = self._servers.get(spec)
        if server is None:
            log_name = f"{len(self._servers) + 1}-{spec.name}.log"
            server = self._stack.enter_context(Server(spec, self._log_folder / log_name))
            self._servers[spec] = server
        server.resume()
        server.check_alive()
        try:
            yield server
        finally:
            server.pause()
