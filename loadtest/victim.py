"""A server that is watched while it suffers: memory, descriptors, metrics, and signals to it. Linux."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil

from loadtest.arms import BenchError
from loadtest.server_state import Metrics, Sample, State
from loadtest.servers import Server

SETTLE_LIMIT_S = 30.0
"""Time for a server whose clients have all gone to have nothing in work any more."""
_SETTLE_POLL_S = 0.25


class Victim(Server):
    """A server that may be killed and started again on its port.

    pool_port  where it keeps a pool of connections, such as its Redis: these are no descriptors that it leaks.
    """

    pool_port: int | None = None

    def terminate(self) -> None:
        """Ask its first process to end."""
        self._running.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._running.wait()

    def wait_status(self, limit_s: float) -> int | None:
        """Its exit status; None when it has not ended within the limit."""
        try:
            return self._running.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None

    def log_text(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def ask_json(self, path: str) -> Any:
        """A GET that is answered 200. Raises BenchError."""
        status, body = self.ask("GET", path)
        if status != 200:
            raise BenchError(f"{self.spec.name}: GET {path} is {status}: {body[:200].decode(errors='replace')}")
        return json.loads(body)

    def metrics(self) -> Metrics:
        """All series now."""
        return Metrics.parse(self.ask("GET", "/metrics")[1].decode())

    def descriptors(self) -> int:
        """Open descriptors of all its processes, those of the pool left out."""
        return int(self._sum(lambda process: process.num_fds() - self._pooled(process)))

    def pooled(self) -> int:
        """Connections of the pool."""
        return int(self._sum(self._pooled))

    def _pooled(self, process: psutil.Process) -> int:
        if self.pool_port is None:
            return 0
        return sum(bool(each.raddr) and each.raddr.port == self.pool_port for each in process.net_connections("tcp"))

    def state(self) -> State:
        """What it holds on to now."""
        metrics = self.metrics()
        return State(
            resident_bytes=self.resident_bytes(),
            descriptors=self.descriptors(),
            queued=round(metrics.total("slicewise_queue_images")),
            in_flight=round(metrics.total("slicewise_in_flight_requests")) - 1,
        )

    def settled(self, descriptors: int, limit_s: float = SETTLE_LIMIT_S) -> State:
        """The first state with nothing in work and no more than so many descriptors; the last one at the limit."""
        give_up_s = time.monotonic() + limit_s
        while True:
            state = self.state()
            is_quiet = not state.queued and not state.in_flight and state.descriptors <= descriptors
            if is_quiet or time.monotonic() > give_up_s:
                return state
            time.sleep(_SETTLE_POLL_S)


@contextlib.contextmanager
def sampled(server: Victim, every_s: float = 1.0) -> Iterator[list[Sample]]:
    """Samples, more and more of them, of the server as long as the context is open; none while it is dead."""
    samples: list[Sample] = []
    stop, began_s = threading.Event(), time.monotonic()

    def watch() -> None:
        ticks = 0
        while not stop.wait(max(0.0, began_s + ticks * every_s - time.monotonic())):
            ticks += 1
            with contextlib.suppress(psutil.Error):
                at_s = time.monotonic() - began_s
                samples.append(Sample(at_s, server.resident_bytes(), server.descriptors()))

    watcher = threading.Thread(target=watch, name="samples", daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        stop.set()
        watcher.join()
