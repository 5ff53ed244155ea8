"""One side of a comparison: a running server under a load, or a command that measures itself."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any, Protocol

from loadtest.closed_loop import REQUEST_LIMIT_S, Load
from loadtest.figures import percentile
from loadtest.machine import busy_s
from loadtest.results import ArmRecord, Run
from loadtest.servers import Fleet, Server, ServerSpec

COMMAND_LIMIT_S = 300.0
"""How much longer than its window a command may take, to build what it measures."""
START_LIMIT_S = 60.0
"""How long the generator may take to start and read its images."""


class BenchError(RuntimeError):
    """A window that says nothing: no answer at all, or a command that failed."""


@dataclass(frozen=True, slots=True)
class Window:
    """How long one arm is measured, after a warm-up that is not counted."""

    warm_up_s: float
    seconds: float
    seed: int = 0


class Arm(Protocol):
    """What a comparison takes turns with."""

    @property
    def name(self) -> str: ...

    def record(self) -> ArmRecord:
        """What it is, without runs."""

    def measure(self, fleet: Fleet, window: Window) -> Run:
        """One window, with every server of the fleet paused but the one that it asks. Raises BenchError."""


@dataclass(frozen=True, slots=True)
class HttpArm:
    """A server under a closed loop.

    path  of the endpoint.
    mix   header values and their shares; empty for none.
    """

    name: str
    server: ServerSpec
    path: str
    images: Path
    clients: int
    images_per_request: int = 1
    mix: str = ""

    def record(self) -> ArmRecord:
        request = f"POST {self.path}"
        if self.images_per_request > 1:
            request += f", {self.images_per_request} images"
        if self.mix:
            request += f", {self.mix}"
        return ArmRecord(self.name, shown(self.server.command), request, self.clients)

    def measure(self, fleet: Fleet, window: Window) -> Run:
        with fleet.running(self.server) as server:
            load = Load(
                url=server.url + self.path, images=self.images, clients=self.clients, warm_up_s=window.warm_up_s,
                seconds=window.seconds, images_per_request=self.images_per_request, mix=self.mix, seed=window.seed,
            )  # fmt: skip
            run = _drive(load, server)
            server.check_alive()
            if not run.images:
                raise BenchError(f"{self.name}: no image was answered; failed: {run.failed}; log {server.log_path}")
            return run


@dataclass(frozen=True, slots=True)
class CommandArm:
    """A command that measures itself while all servers are paused.

    command  its arguments; ``{seconds}`` and ``{warm_up}`` in them become the window's lengths in seconds. The
             last line on its stdout is ``{"images", "seconds", "cpu_s", "p50_ms"}``, ``"p99_ms"`` if it likes.
    workers  threads that it works with, for the record.
    """

    name: str
    command: tuple[str, ...]
    workers: int

    def record(self) -> ArmRecord:
        return ArmRecord(self.name, shown(self.command), "no HTTP", self.workers)

    def measure(self, fleet: Fleet, window: Window) -> Run:
        lengths = {"{seconds}": f"{window.seconds:g}", "{warm_up}": f"{window.warm_up_s:g}"}
        command = [_filled(argument, lengths) for argument in self.command]
        limit_s = COMMAND_LIMIT_S + window.warm_up_s + window.seconds
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=True)
            said = json.loads(done.stdout.strip().splitlines()[-1])
            run = Run(
                images=int(said["images"]), seconds=float(said["seconds"]), cpu_s=float(said["cpu_s"]),
                p50_ms=float(said["p50_ms"]), p99_ms=said.get("p99_ms"),
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            raise BenchError(f"{self.name}: ended with status {error.returncode}: {error.stderr[-800:]}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BenchError(f"{self.name}: {error}") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise BenchError(f"{self.name}: last line of stdout is not the JSON expected: {error!r}") from error
        if not run.images:
            raise BenchError(f"{self.name}: no image was processed")
        return run


def shown(command: tuple[str, ...]) -> str:
    """A command for the record: paths by their last part alone, because folders are nobody's business."""
    return " ".join(PurePath(part).name if PurePath(part).is_absolute() else part for part in command)


def _filled(argument: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        argument = argument.replace(name, value)
    return argument


def _drive(load: Load, server: Server) -> Run:
    """Run the generator against the server, and read the server's CPU time when its window opens and closes."""
    with generator(load) as lines:
        expect(lines, "begin")
        server_began_s, busy_began_s = server.cpu_s(), busy_s()
        expect(lines, "end")
        server_s, machine_s = server.cpu_s() - server_began_s, busy_s() - busy_began_s
        outcome = _next(lines)
    latencies_ms = tuple(outcome["latencies_ms"])
    return Run(
        images=outcome["images"],
        seconds=outcome["seconds"],
        cpu_s=server_s,
        p50_ms=percentile(latencies_ms, 50) if latencies_ms else None,
        p99_ms=percentile(latencies_ms, 99) if latencies_ms else None,
        latencies_ms=latencies_ms,
        failed=outcome["failed"],
        served=outcome["served"],
        generator_cpu_s=outcome["cpu_s"],
        other_cpu_s=max(0.0, machine_s - server_s - outcome["cpu_s"]),
        resident_bytes=server.resident_bytes(),
    )


@contextlib.contextmanager
def generator(load: Load) -> Iterator[IO[str]]:
    """The lines that a generator process prints. It is killed when it takes far too long."""
    command = [sys.executable, "-m", "loadtest.closed_loop", *load.flags()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        limit_s = START_LIMIT_S + load.warm_up_s + load.seconds + REQUEST_LIMIT_S
        watchdog = threading.Timer(limit_s, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None, "our bug: stdout is a pipe"
            yield process.stdout
        finally:
            watchdog.cancel()
            process.kill()


def _next(lines: IO[str]) -> Any:
    line = lines.readline()
    if not line:
        raise BenchError("the load generator ended early; what it wrote to stderr says why")
    return json.loads(line)


def expect(lines: IO[str], event: str) -> None:
    """Wait for a generator's window to ``begin`` or ``end``; BenchError when it does not."""
    said = _next(lines)
    if said != event:
        raise BenchError(f"the load generator said {said!r} where {event!r} was due")
