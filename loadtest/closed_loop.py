"""The closed-loop generator: clients that each send their next request as soon as the last is answered.

A process of its own (``python -m loadtest.closed_loop``), so that its CPU time is not the server's and
not the harness's. On stdout it writes one JSON document per line: ``"begin"`` when the warm-up is over,
``"end"`` when the window closes, then the outcome. A requester that wants the server's CPU time over
the same window reads it at the first two.

A closed loop finds the throughput of a saturated server. It says little about latency under a given
arrival rate, because slow answers slow the arrivals.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import httptools
import uvloop

from loadtest.corpus import Body, batch_bodies, endless, read_images, single_bodies
from loadtest.http_client import Client
from loadtest.mix import Mix

SUMMARY = "Send images from clients that each wait for one answer before the next request; print JSON."
REQUEST_LIMIT_S = 60.0
"""A request that takes longer counts as failed."""
PAUSE_AFTER_ERROR_S = 0.05
"""A server that refuses connections is not asked in a busy loop."""
LIMIT_IMAGES = 2048
"""Images held in memory; more would be read and hardly sent within one window."""
_ITEM_ERROR = b'"error_type":'
"""What a failed item of a batch answer holds, and no other."""


@dataclass(frozen=True, slots=True)
class Load:
    """What to send to whom.

    url                 where requests are posted.
    images              folder or zip file of encoded images.
    clients             connections, each with at most one request in flight.
    warm_up_s, seconds  how long answers are ignored, then counted.
    images_per_request  1 sends raw bodies; more, multipart bodies of parts ``image``.
    mix                 header values and their shares, as ``Mix.parse`` reads them; empty for none.
    tally               answer header whose values are counted.
    """

    url: str
    images: Path
    clients: int = 8
    warm_up_s: float = 2.0
    seconds: float = 10.0
    images_per_request: int = 1
    mix: str = ""
    seed: int = 0
    tally: str = "Slice-Width"

    def flags(self) -> list[str]:
        """The command line that ``parse`` turns into this again."""
        values = ((f.name.replace("_", "-"), getattr(self, f.name)) for f in dataclasses.fields(self))
        return [f"--{name}={value}" for name, value in values]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came back within the window.

    images        answered with status 200 and without an error of their own.
    failed        requests by status or exception, and under ``item`` the failed items of batch answers.
    seconds       length of the window as it was.
    latencies_ms  of every request answered with 200, from the first byte sent to the last received.
    cpu_s         spent by this generator.
    served        answers by the value of the tallied header.
    """

    images: int
    failed: dict[str, int]
    seconds: float
    latencies_ms: list[float]
    cpu_s: float
    served: dict[str, int]


class Request(NamedTuple):
    """What one POST carries."""

    body: Body
    headers: dict[str, str]


class Recorder:
    """Counts answers from ``begin`` to ``end`` and ignores those before and after."""

    def __init__(self) -> None:
        self.finished = False
        self._counting = False
        self._images = 0
        self._failed: Counter[str] = Counter()
        self._served: Counter[str] = Counter()
        self._latencies_ms: list[float] = []
        self._began_s = self._began_cpu_s = 0.0

    def begin(self) -> None:
        self._counting = True
        self._began_s, self._began_cpu_s = time.perf_counter(), time.process_time()

    def end(self) -> Outcome:
        self._counting, self.finished = False, True
        return Outcome(
            self._images, dict(self._failed), time.perf_counter() - self._began_s, self._latencies_ms,
            time.process_time() - self._began_cpu_s, dict(self._served),
        )  # fmt: skip

    def answered(self, images: int, item_errors: int, latency_s: float, served: str | None) -> None:
        if not self._counting:
            return
        self._images += images - item_errors
        self._latencies_ms.append(round(latency_s * 1e3, 2))
        if item_errors:
            self._failed["item"] += item_errors
        if served is not None:
            self._served[served] += 1

    def failed(self, reason: str) -> None:
        if self._counting:
            self._failed[reason] += 1


def requests_of(bodies: list[Body], mix: Mix | None, seed: int) -> Iterator[Request]:
    """Requests without end, in the order in which the clients, together, send them."""
    values = mix.endless(seed) if mix else None
    for body in endless(bodies, seed + 1):
        headers = {"Content-Type": body.content_type}
        if mix and values:
            headers[mix.header] = next(values)
        yield Request(body, headers)


async def _client(client: Client, load: Load, requests: Iterator[Request], recorder: Recorder) -> None:
    """One connection's requests, one after another, until the window has closed."""
    while not recorder.finished:
        body, headers = next(requests)
        sent_s = time.perf_counter()
        try:
            reply = await client.post(headers, body.data)
        except (OSError, httptools.HttpParserError) as error:
            recorder.failed(type(error).__name__)
            await asyncio.sleep(PAUSE_AFTER_ERROR_S)
            continue
        latency_s = time.perf_counter() - sent_s
        if reply.status != 200:
            recorder.failed(str(reply.status))
            continue
        errors = reply.body.count(_ITEM_ERROR) if body.images > 1 else 0
        recorder.answered(body.images, errors, latency_s, reply.headers.get(load.tally))


async def drive(load: Load, bodies: list[Body], announce: Callable[[str], None]) -> Outcome:
    """Send ``bodies`` for the warm-up and the window; ``announce`` hears ``begin`` and ``end``."""
    mix = Mix.parse(load.mix) if load.mix else None
    recorder, requests = Recorder(), requests_of(bodies, mix, load.seed)
    async with Client(load.url, REQUEST_LIMIT_S) as client, asyncio.TaskGroup() as group:
        for _ in range(load.clients):
            group.create_task(_client(client, load, requests, recorder))
        await asyncio.sleep(load.warm_up_s)
        recorder.begin()
        announce("begin")
        await asyncio.sleep(load.seconds)
        outcome = recorder.end()
        announce("end")
    return outcome


def parse(argv: list[str]) -> Load:
    """The load that a command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.closed_loop", description=SUMMARY, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--url", required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder or zip file")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--warm-up-s", type=float)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--images-per-request", type=int)
    parser.add_argument("--mix", metavar="HEADER=VALUE:SHARE,...")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--tally", metavar="HEADER", help="answer header to count by value")
    return Load(**vars(parser.parse_args(argv)))


def _announce(event: object) -> None:
    print(json.dumps(event), flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run one load and print what came back."""
    load = parse(sys.argv[1:] if argv is None else argv)
    try:
        images = read_images(load.images, LIMIT_IMAGES, load.seed)
        single = load.images_per_request == 1
        bodies = single_bodies(images) if single else batch_bodies(images, load.images_per_request)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            outcome = runner.run(drive(load, bodies, _announce))
    except ValueError as error:
        print(f"closed_loop: error: {error}", file=sys.stderr)
        return 1
    _announce(dataclasses.asdict(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
