"""``slicewise-load pressure``: a step in the traffic, deadlines of every length, and the event loop at saturation.

Goes on from what ``slicewise-load policies`` found the machine to bear. Like it, it does nothing again that is in
--out.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.arms import BenchError, expect, generator
from loadtest.closed_loop import Load
from loadtest.comparisons import script
from loadtest.machine import describe
from loadtest.mix import Mix
from loadtest.policy_plan import Capacity
from loadtest.policy_study import (
    CAPACITY,
    SATURATING_CLIENTS,
    call,
    claim,
    evaluated,
    serve_flags,
    served,
    server_spec,
    where,
)
from loadtest.pressure_plan import (
    BUDGETS_REQUESTS,
    BUDGETS_SHARE,
    DELAY_ROUNDS,
    REST_SHARE,
    STEP_FROM_S,
    STEP_SHARE,
    STEP_TO_S,
    STEP_TRACE_S,
    Delays,
    Findings,
    budgets,
    recovered,
    refusals,
    step_budget,
)
from loadtest.pressure_report import STEP_PLOT, markdown
from loadtest.provenance import shown_command
from loadtest.run_report import WIDTHS_PLOT, RunRecord
from loadtest.servers import Server, ServerSpec
from loadtest.trace_file import Origin, fill, write_trace
from loadtest.traces import Arrivals, poisson, step

REPORT = "report.md"
POLICY = "gate_slack"
DELAY_S, LEAD_S = 8.0, 2.0


def configure_pressure(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="PATH", help="folder or zip of labelled images")
    add("--image-count", type=int, required=True, metavar="N", help="images in it, as many as were evaluated")
    add("--evaluation", type=Path, required=True, help="from slicewise-models evaluate --width all --json")
    add("--capacity", type=Path, required=True, metavar="DIR", help="--out of slicewise-load policies")
    add("--model", default="ds_resnet_cifar10")
    add("--repository", type=Path, metavar="DIR", help="its repository, if not the shipped one")
    add("--operating-point", type=int, default=0, help="of the gate (default: %(default)s, the most accurate)")
    add("--worker-priority", default="idle", help="as it was there (default: %(default)s)")
    add("--repeats", type=int, default=10, help="steps, each of its own seed")
    add("--out", type=Path, required=True, metavar="DIR")


def run_pressure(arguments: argparse.Namespace) -> None:
    """Measure what is missing, then write the report. Raises ValueError, BenchError and ServerError."""
    a = arguments
    if a.repeats < 1:
        raise ValueError(f"--repeats {a.repeats}; allowed: 1 or more")
    capacity = Capacity(**json.loads((a.capacity / CAPACITY).read_bytes()))
    if capacity.worker_priority != a.worker_priority:
        raise ValueError(f"--worker-priority {a.worker_priority}; measured in --capacity: {capacity.worker_priority}")
    claim(a.out, shown_command("pressure", a))
    (a.out / "traces").mkdir(exist_ok=True)
    rest, high = (share * capacity.images_per_s for share in (REST_SHARE, STEP_SHARE))
    steps = []
    for seed in range(a.repeats):
        arrivals = step(rest, high, (STEP_FROM_S, STEP_TO_S), STEP_TRACE_S, np.random.default_rng(seed))
        steps.append(_live(a, f"step-seed-{seed}", arrivals, STEP_TRACE_S, step_budget(capacity), seed))
    rate = BUDGETS_SHARE * capacity.images_per_s
    duration_s = BUDGETS_REQUESTS / rate
    arrivals = poisson(rate, duration_s, np.random.default_rng(0))
    _live(a, "budgets", arrivals, duration_s, budgets(capacity), 0)
    _twin(a, capacity)
    live, twin = _rows(a.out / "live" / "budgets" / "requests.csv"), _rows(a.out / "twin" / f"budgets.{POLICY}.csv")
    after = recovered(second for record in steps for second in record.seconds)
    found = Findings(after, refusals(live, twin), _scheduler(a), _delays(a, capacity))
    text = markdown(capacity, evaluated(a.evaluation), steps, found, describe())
    shutil.copy(a.out / "live" / "step-seed-0" / WIDTHS_PLOT, a.out / STEP_PLOT)
    (a.out / REPORT).write_text(text, encoding="utf-8")
    print(a.out / REPORT)


def _live(a: argparse.Namespace, name: str, arrivals: Arrivals, duration_s: float, mix: Mix, seed: int) -> RunRecord:
    trace, out = a.out / "traces" / f"{name}.csv", a.out / "live" / name
    if not trace.exists():
        origin = Origin("pressure", {}, duration_s, seed, a.image_count, (str(mix),))
        write_trace(fill(arrivals, a.image_count, [mix], seed), trace, origin)
    served(a, POLICY, trace, out, "--requests")
    return RunRecord.load(out / "results.json")


def _twin(a: argparse.Namespace, capacity: Capacity) -> None:
    out = a.out / "twin"
    if not (out / "simulation.json").exists():
        flags = {
            "--trace": a.out / "traces" / "budgets.csv", "--evaluation": a.evaluation, "--policies": POLICY,
            **capacity.twin_flags(), "--events": "true", "--out": out,
        }  # fmt: skip
        call("slicewise", "simulate", *where(a), *serve_flags(a, POLICY), *map(str, chain(*flags.items())))


def _scheduler(a: argparse.Namespace) -> dict[str, Any]:
    """What deciding costs, as ``slicewise scheduler`` says it."""
    kept = a.out / "scheduler.json"
    if not kept.exists():
        done = subprocess.run((script("slicewise"), "scheduler", *where(a)), stdout=subprocess.PIPE, check=False)
        if done.returncode:
            raise BenchError(f"slicewise scheduler ended with status {done.returncode}; what it wrote says why")
        kept.write_bytes(done.stdout)
    found: dict[str, Any] = json.loads(kept.read_bytes())
    return found


def _delays(a: argparse.Namespace, capacity: Capacity) -> Delays:
    """Of a server with busy threads and of the service under saturating clients, in turns."""
    kept = a.out / "delays.json"
    if not kept.exists():
        module = (sys.executable, "-m", "loadtest.peers.busy", "--port", "{port}", "--threads", str(capacity.workers))
        floor, service, spec = [], [], server_spec(a, POLICY)
        with tempfile.TemporaryDirectory(prefix="slicewise-load-") as work:
            for number in range(DELAY_ROUNDS):
                with Server(ServerSpec("busy", module, "/healthz"), Path(work) / f"busy-{number}.log") as server:
                    floor += _asked(server)
                with (
                    Server(spec, Path(work) / f"service-{number}.log") as server,
                    _saturated(a, server),
                ):
                    service += _asked(server)
        kept.write_text(json.dumps(asdict(Delays(tuple(floor), tuple(service)))), encoding="utf-8")
    found = json.loads(kept.read_bytes())
    return Delays(tuple(found["floor_ms"]), tuple(found["service_ms"]))


def _asked(server: Server) -> list[float]:
    """By a process of its own, so that nothing here makes it late."""
    flags = ("--url", f"{server.url}/healthz", "--seconds", f"{DELAY_S:g}")
    done = subprocess.run(
        [sys.executable, "-m", "loadtest.loop_delay", *flags], stdout=subprocess.PIPE, text=True, check=True
    )
    found: list[float] = json.loads(done.stdout)
    return found


@contextmanager
def _saturated(a: argparse.Namespace, server: Server) -> Iterator[None]:
    """Clients at work inside."""
    load = Load(f"{server.url}/v1/classify", a.images, SATURATING_CLIENTS, LEAD_S, DELAY_S + LEAD_S)
    with generator(load) as lines:
        expect(lines, "begin")
        yield


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))
