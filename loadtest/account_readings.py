"""Reads servers thread by thread, and loops by what they say, for ``loadtest.account``. Linux only."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil

from loadtest.account import Reading, ThreadReading
from loadtest.arms import COMMAND_LIMIT_S, BenchError, Window
from loadtest.servers import Fleet, Server, ServerSpec

BURST_CLIENTS, BURST_REQUESTS = 8, 6
"""Connections of a burst of damaged pictures, and requests of each: all decoding threads have work at once."""
DECODED_S = 0.001
"""A thread that spent as much during the burst decodes; the others sleep meanwhile."""
SETTLE_S = 0.3
"""After a window, until a server without requests is read: what was in work is done by then."""
_SPIN = """
import os
parent = os.getppid()
while os.getppid() == parent:  # never longer than who started it
    for _ in range(1_000_000):
        pass
"""
_SAMPLE = re.compile(r"^(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)

Counters = Callable[[bytes], dict[str, float]]


def read_process(pid: int) -> Reading:
    """Threads and totals of a process now; BenchError where the kernel does not tell."""
    folder, threads = Path(f"/proc/{pid}"), {}
    try:
        for task in (folder / "task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended since they were listed
                ran_ns, waited_ns, turns = map(int, (task / "schedstat").read_text().split())
                threads[int(task.name)] = ThreadReading(ran_ns / 1e9, waited_ns / 1e9, turns)
        faults = int((folder / "stat").read_text().rpartition(")")[2].split()[7])
        system_s = psutil.Process(pid).cpu_times().system
    except (OSError, psutil.Error) as error:
        raise BenchError(f"the threads of process {pid} cannot be read, which needs Linux: {error}") from error
    if pid not in threads:
        raise BenchError(f"/proc/{pid}/task/*/schedstat is missing; this kernel does not keep the time of threads")
    return Reading(threads, float(system_s), faults, float(psutil.cpu_times().steal))


def account_counters(answer: bytes) -> dict[str, float]:
    """What the tuned server says of itself, by the names that ``Observation`` knows."""
    totals = json.loads(answer)
    stages = {f"cpu_s {stage}": float(seconds) for stage, seconds in totals["cpu_s"].items()}
    return {"images": float(totals["images"]), "engine_wall_s": float(totals["wall_s"]["engine"]), **stages}


def metrics_counters(answer: bytes) -> dict[str, float]:
    """The same of slicewise's metrics, summed over their labels."""
    names = {
        "slicewise_images_total": "images", "slicewise_compute_seconds_total": "engine_wall_s",
        "slicewise_batch_size_sum": "batched_images", "slicewise_batch_size_count": "batches",
    }  # fmt: skip
    found = dict.fromkeys(names.values(), 0.0)
    for name, value in _SAMPLE.findall(answer.decode()):
        if name in names:
            found[names[name]] += float(value)
    return found


class WatchedServer(Server):
    """A server that is running already, whose threads are read whenever its CPU time is: at a window's two ends."""

    def __init__(self, server: Server, counters: tuple[str, Counters] | None) -> None:
        self.spec, self.log_path, self.port, self._process = server.spec, server.log_path, server.port, server._process
        self._counters = counters
        self.readings: list[Reading] = []

    def cpu_s(self) -> float:
        cpu_s, reading = super().cpu_s(), read_process(self.pid)
        if self._counters is not None:
            path, parse = self._counters
            reading = replace(reading, counters=parse(self.ask("GET", path)[1]))
        self.readings.append(reading)
        return cpu_s


class WatchedFleet(Fleet):
    """A fleet of watched servers. watched: the one that runs, or ran last."""

    def __init__(self, log_folder: Path, counters: Mapping[ServerSpec, tuple[str, Counters]]) -> None:
        super().__init__(log_folder)
        self._counters = counters
        self.watched: WatchedServer | None = None

    @contextlib.contextmanager
    def running(self, spec: ServerSpec) -> Iterator[WatchedServer]:
        with super().running(spec) as server:
            self.watched = WatchedServer(server, self._counters.get(spec))
            yield self.watched

    def spent(self) -> Reading:
        """What the server that ran last spent between the two readings of its window."""
        assert self.watched is not None, "asked before any window: this is a bug"
        began, ended = self.watched.readings
        return ended.since(began)


def decoding_threads(server: WatchedServer, path: str) -> frozenset[int]:
    """Ids of the threads that work on pictures which do not decode, but the event loop's."""
    picture = _damaged_picture()

    def burst(_: int) -> list[int]:
        headers = {"Content-Type": "image/jpeg"}
        return [server.ask("POST", path, picture, headers)[0] for _ in range(BURST_REQUESTS)]

    before = read_process(server.pid)
    with ThreadPoolExecutor(BURST_CLIENTS) as pool:
        statuses = {status for one in pool.map(burst, range(BURST_CLIENTS)) for status in one}
    if statuses != {400}:
        raise BenchError(f"{server.spec.name}: a damaged picture was answered {sorted(statuses)}; expected 400")
    threads = read_process(server.pid).since(before).threads
    return frozenset(tid for tid, thread in threads.items() if tid != server.pid and thread.cpu_s > DECODED_S)


def _damaged_picture() -> bytes:
    """A JPEG that ends early: it is decoded for milliseconds before that is noticed."""
    pixels = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    _, jpeg = cv2.imencode(".jpg", pixels)
    return bytes(jpeg.tobytes()[: -len(jpeg) // 8])


def idle_ms_per_s(pid: int, seconds: float) -> float:
    """CPU milliseconds that a process without a request spends in a second."""
    time.sleep(SETTLE_S)
    before, began_s = read_process(pid), time.perf_counter()
    time.sleep(seconds)
    spent = read_process(pid).since(before)
    return sum(thread.cpu_s for thread in spent.threads.values()) / (time.perf_counter() - began_s) * 1e3


@contextlib.contextmanager
def spinning(processes: int) -> Iterator[None]:
    """As many processes compute inside, in so little memory that they take no cache from anybody."""
    with contextlib.ExitStack() as stack:
        for _ in range(processes):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", _SPIN]))
            stack.callback(process.kill)
        yield


def run_loop(command: Sequence[str], window: Window) -> dict[str, Any]:
    """What a loop without HTTP says on its last line, with at least one image. Raises BenchError."""
    limit_s = COMMAND_LIMIT_S + window.warm_up_s + window.seconds
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=True)
        said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.CalledProcessError as error:
        raise BenchError(f"{command[0]}: ended with status {error.returncode}: {error.stderr[-800:]}") from error
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise BenchError(f"{command[0]}: {error}") from error
    if not said.get("images"):
        raise BenchError(f"{command[0]}: no image was processed")
    return said
