"""``slicewise-load policies``: policies under the same bursts, on a live server and in the offline twin.

Everything goes to --out and is not done again when it is there, so that a study that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np

from loadtest.account_readings import read_process
from loadtest.arms import BenchError, CommandArm, HttpArm, Window
from loadtest.comparisons import Network, script, slicewise_server
from loadtest.machine import describe, usable_cores
from loadtest.mix import Mix
from loadtest.outcomes import Figures
from loadtest.policy_plan import (
    MEAN_SHARE,
    SUSTAINED_LIMIT_MS,
    SUSTAINED_SHARE,
    TAUS,
    Capacity,
    Outcome,
    base_share,
    draw,
    look_ms,
    parse_trace_name,
    slice_1_alone,
    sustained,
    trace_name,
)
from loadtest.policy_plan import capacity as capacity_of
from loadtest.policy_report import markdown
from loadtest.provenance import shown_command
from loadtest.run_report import RunRecord
from loadtest.servers import Fleet, Server, ServerSpec
from loadtest.trace_file import Origin, Trace, fill, read_origin, read_trace, write_trace
from loadtest.traces import poisson
from loadtest.victim import Victim

CAPACITY, REPORT = "capacity.json", "report.md"
SATURATING_CLIENTS, PROBE_S = 32, 8.0
SPEED_WINDOW = Window(0.5, 2.0)
NARROWEST = "fixed:0"
T = TypeVar("T")


def configure_policies(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="PATH", help="folder or zip of labelled images")
    add("--image-count", type=int, required=True, metavar="N", help="images in it, as many as were evaluated")
    add(
        "--evaluation",
        type=Path,
        required=True,
        help="from slicewise-models evaluate --width all --json, of these images",
    )
    add("--model", default="ds_resnet_cifar10")
    add("--repository", type=Path, metavar="DIR", help="its repository, if not the shipped one")
    add("--operating-point", type=int, default=0, help="of the gate (default: %(default)s, the most accurate)")
    add("--worker-priority", default="idle", help="the service's setting (default: %(default)s: nothing else runs)")
    add("--live", default="gate_slack,slackfit,fixed:0,fixed:widest", metavar="POLICY,...")
    add("--twin", default="gate_slack,gate,slackfit,maxbatch,maxacc,fixed:0,fixed:widest", metavar="POLICY,...")
    add("--seeds", type=int, default=3, help="traces of each CV2 that are run live")
    add("--twin-seeds", type=int, default=20, help="traces of each CV2 that are simulated")
    add("--duration-s", type=float, default=20.0, help="length of each trace")
    add("--out", type=Path, required=True, metavar="DIR")


def run_policies(arguments: argparse.Namespace) -> None:
    """Measure what is missing, then write the report. Raises ValueError, BenchError and ServerError."""
    a = arguments
    if min(a.seeds, a.twin_seeds) < 1 or a.seeds > a.twin_seeds:
        raise ValueError(f"--seeds {a.seeds} and --twin-seeds {a.twin_seeds}; allowed: 1 <= seeds <= twin seeds")
    claim(a.out, shown_command("policies", a))
    capacity = _capacity(a)
    _write_traces(a, capacity)
    policies = a.live.split(",")
    live = [_live(a, capacity, cv2, seed, p) for cv2 in TAUS for seed in range(a.seeds) for p in policies]
    twin, comparisons = _twin(a, capacity)
    text = markdown(capacity, live, twin, comparisons, describe(), a.duration_s)
    (a.out / REPORT).write_text(text, encoding="utf-8")
    print(a.out / REPORT)


def claim(folder: Path, command: str) -> None:
    """Make ``folder`` the place of this command's results; ValueError where it holds those of another one."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "command.txt"
    if kept.exists() and kept.read_text(encoding="utf-8") != command:
        raise ValueError(f"{folder} holds results of `{kept.read_text(encoding='utf-8')}`; needed: another --out")
    kept.write_text(command, encoding="utf-8")


def serve_flags(a: argparse.Namespace, policy: str) -> tuple[str, ...]:
    """Of ``slicewise serve``."""
    own = ("--operating-point", str(a.operating_point), "--worker-priority", a.worker_priority)
    return (*own, "--policy", policy)


def server_spec(a: argparse.Namespace, policy: str) -> ServerSpec:
    """The service under a policy."""
    return slicewise_server(Network(a.model, a.images, a.repository), serve_flags(a, policy))


def _capacity(a: argparse.Namespace) -> Capacity:
    """C0, the sustained rate of the narrowest width through HTTP with the generator running, and what images cost.

    The cost of asking is what slice 1 takes more when budgets overrule the gate than when nobody asks it: behind
    slice 0 there may be no second batch.
    """
    kept = a.out / CAPACITY
    if not kept.exists():
        work = Path(tempfile.mkdtemp(prefix="slicewise-load-"))
        rate, loop_per_s = _paced(a, partial(_sustained, a, work, NARROWEST))
        unasked, pace_unasked = _paced(a, partial(_sustained, a, work, "fixed:1"))
        alone = slice_1_alone(_slices(a, work))
        looked, pace_looked = _paced(a, partial(_sustained, a, work, "gate", *alone))
        (loop_ms, client_ms), pace_around = _paced(a, partial(_around_batches, a, work, rate))
        profile, cores = work / "profile.json", usable_cores()
        call("slicewise", "profile", *where(a), "--json-out", str(profile))
        (measured,) = json.loads(profile.read_bytes())
        unasked, looked = unasked * loop_per_s / pace_unasked, looked * loop_per_s / pace_looked
        slower = pace_around / loop_per_s
        asking_ms = look_ms(unasked, looked, cores)
        found = capacity_of(rate, cores, measured["timings"], asking_ms, loop_ms * slower, client_ms * slower)
        found = replace(found, worker_priority=a.worker_priority, loop_per_s=loop_per_s)
        kept.write_text(json.dumps(asdict(found)) + "\n", encoding="utf-8")
        at_1 = f"at slice 1 {unasked:.1f} images/s, asked {looked:.1f}"
        around = f"event loop {found.loop_ms:.3f} ms, generator {found.client_ms:.3f} ms"
        say(f"C0 {found.images_per_s:.1f} images/s, tau0 {found.tau0_ms:.2f} ms, {around}; {at_1}")
    return Capacity(**json.loads(kept.read_bytes()))


def _paced(a: argparse.Namespace, measure: Callable[[], T]) -> tuple[T, float]:
    """What it finds, and how fast the machine was, just before and just after."""
    before = _loop_per_s(a)
    found = measure()
    return found, fmean((before, _loop_per_s(a)))


def _loop_per_s(a: argparse.Namespace) -> float:
    """Images per second of a loop without HTTP at the narrowest width, on all cores: how fast the machine is now."""
    workers = usable_cores()
    loop = (
        script("slicewise"), "profile", *where(a), "--workers", str(workers), "--loop-only", "true", "--loop-s",
        "{seconds}", "--loop-warm-up-s", "{warm_up}", "--loop-images", str(a.images), "--loop-mix", "0:1",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="slicewise-load-") as work, Fleet(Path(work)) as fleet:
        return CommandArm("bare loop", loop, workers).measure(fleet, SPEED_WINDOW).images_per_s


def _slices(a: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    with Victim(server_spec(a, "gate"), work / "slices.log") as server:
        (model,) = server.ask_json("/v1/models")["models"]
    slices: list[dict[str, Any]] = model["slices"]
    return slices


def _sustained(a: argparse.Namespace, work: Path, policy: str, *budgets: str) -> float:
    """Of Poisson arrivals, with the generator that runs the traces; not above what saturating clients get."""
    spec = server_spec(a, policy)
    mixes = _probe_mixes(*budgets)
    arm = HttpArm("capacity", spec, "/v1/classify", a.images, SATURATING_CLIENTS, mix=budgets[0] if budgets else "")
    with Fleet(work) as fleet:
        most = arm.measure(fleet, Window(3.0, 10.0)).images_per_s
    with Server(spec, work / "server.log") as server:

        def holds(rate_per_s: float) -> bool:
            trace, out = _poisson(a, work, f"{policy[:4]}-{rate_per_s:.1f}", rate_per_s, mixes)
            attainment = _run(a, server.url, trace, policy, out).figures.attainment
            say(f"{policy}, {rate_per_s:.1f} images/s: {attainment or 0:.4f} within {SUSTAINED_LIMIT_MS:g} ms")
            return (attainment or 0.0) >= SUSTAINED_SHARE

        rate = sustained(holds, most)
    if not rate:
        raise BenchError(f"{most:.1f} images/s with {SATURATING_CLIENTS} clients, and no open loop is sustained")
    return rate


def _around_batches(a: argparse.Namespace, work: Path, rate_per_s: float) -> tuple[float, float]:
    """CPU milliseconds per image, at this rate of the narrowest width, of the event loop and of the generator.

    uvicorn's event loop runs in the first thread of its process; before the run it has hardly done anything.
    """
    with Server(server_spec(a, NARROWEST), work / "around.log") as server:
        trace, out = _poisson(a, work, "around", rate_per_s, _probe_mixes())
        before_s = _loop_cpu_s(server)
        record = _run(a, server.url, trace, "around", out)
        loop_s = _loop_cpu_s(server) - before_s
    return loop_s / record.trace.requests * 1e3, record.generator.cpu_ms_per_request


def _loop_cpu_s(server: Server) -> float:
    return read_process(server.pid).threads[server.pid].cpu_s


def _probe_mixes(*budgets: str) -> list[Mix]:
    """Of requests that probe what is sustained."""
    return [Mix.parse(text) for text in (f"Latency-Budget={SUSTAINED_LIMIT_MS:g}ms", *budgets)]


def _poisson(a: argparse.Namespace, work: Path, name: str, rate_per_s: float, mixes: list[Mix]) -> tuple[Path, Path]:
    """A new trace, and where its run goes."""
    trace = work / f"{name}.csv"
    origin = Origin("poisson", {"rate_per_s": rate_per_s}, PROBE_S, 0, a.image_count, tuple(map(str, mixes)))
    arrivals = poisson(rate_per_s, PROBE_S, np.random.default_rng(0))
    write_trace(fill(arrivals, a.image_count, mixes, 0), trace, origin)
    return trace, work / name


def _run(a: argparse.Namespace, url: str, trace: Path, label: str, out: Path, *flags: str) -> RunRecord:
    call(
        "slicewise-load", "run", "--url", f"{url}/v1/classify", "--trace", str(trace), "--images", str(a.images),
        "--label", label, "--out", str(out), *flags,
    )  # fmt: skip
    return RunRecord.load(out / "results.json")


def served(a: argparse.Namespace, policy: str, trace: Path, out: Path, *flags: str) -> Figures:
    """What became of a trace under a policy, on a server of its own; not again when it is in ``out``."""
    if (out / "results.json").exists():
        return RunRecord.load(out / "results.json").figures
    log = Path(tempfile.mkdtemp(prefix="slicewise-load-")) / "server.log"
    with Server(server_spec(a, policy), log) as server:
        found = _run(a, server.url, trace, policy, out, *flags).figures
    say(f"live {out.name}")
    return found


def where(a: argparse.Namespace) -> list[str]:
    """The flags of other commands that name the network."""
    return ["--model", a.model, *([] if a.repository is None else ["--repository", str(a.repository)])]


def _trace(a: argparse.Namespace, cv2: int, seed: int) -> Path:
    folder: Path = a.out / "traces"
    return folder / f"{trace_name(cv2, seed)}.csv"


def _write_traces(a: argparse.Namespace, capacity: Capacity) -> None:
    (a.out / "traces").mkdir(exist_ok=True)
    for cv2 in TAUS:
        if all(_trace(a, cv2, seed).exists() for seed in range(a.twin_seeds)):
            continue
        base = base_share(cv2, capacity.images_per_s, a.duration_s, range(a.twin_seeds))
        mix = Mix.parse(f"Latency-Budget={capacity.slo_ms(cv2)}ms:1")
        for seed in range(a.twin_seeds):
            arrivals = draw(cv2, base, capacity.images_per_s, a.duration_s, seed)
            rate = MEAN_SHARE * capacity.images_per_s
            drawn = {"rate_per_s": rate, "base_rate_per_s": base * rate, "cv2": cv2}
            origin = Origin("bursty", drawn, a.duration_s, seed, a.image_count, (str(mix),))
            write_trace(fill(arrivals, a.image_count, [mix], seed), _trace(a, cv2, seed), origin)


def _live(a: argparse.Namespace, capacity: Capacity, cv2: int, seed: int, policy: str) -> Outcome:
    """On the trace as it is on a machine that is as fast as this one is now."""
    name = f"{trace_name(cv2, seed)}-{policy.replace(':', '-')}"
    stretched, out = a.out / "traces" / "live" / f"{name}.csv", a.out / "live" / name
    if not (out / "results.json").exists():
        speed = _loop_per_s(a) / capacity.loop_per_s if capacity.loop_per_s else 1.0
        stretched.parent.mkdir(exist_ok=True)
        _stretch(_trace(a, cv2, seed), stretched, speed, capacity.slo_ms(cv2, speed))
    figures, origin = served(a, policy, stretched, out), read_origin(stretched)
    speed = 1.0 if origin is None else origin.parameters["speed"]
    return Outcome(cv2, seed, policy, figures.attainment or 0.0, figures.top1, figures.late_sends, speed)


def _stretch(path: Path, stretched: Path, speed: float, slo_ms: float) -> None:
    """The same requests, so many times as fast, each with this budget."""
    trace, origin, mix = read_trace(path), read_origin(path), Mix.parse(f"Latency-Budget={slo_ms}ms:1")
    assert origin is not None, "written by this study: this is a bug"
    at_s = tuple(at_s / speed for at_s in trace.at_s)
    drawn = origin.parameters | {"speed": speed}
    origin = replace(origin, parameters=drawn, duration_s=origin.duration_s / speed, mixes=(str(mix),))
    write_trace(Trace(at_s, trace.image, {mix.header: (mix.shares[0][0],) * len(at_s)}), stretched, origin)


def _twin(a: argparse.Namespace, capacity: Capacity) -> tuple[list[Outcome], Sequence[dict[str, object]]]:
    out = a.out / "twin"
    if not (out / "simulation.json").exists():
        traces = ",".join(str(_trace(a, cv2, seed)) for cv2 in TAUS for seed in range(a.twin_seeds))
        call(
            "slicewise", "simulate", *where(a), "--operating-point", str(a.operating_point), "--trace", traces,
            "--evaluation", str(a.evaluation), "--policies", a.twin, "--against", "slackfit",
            *chain(*capacity.twin_flags().items()), "--worker-priority", capacity.worker_priority, "--out", str(out),
        )  # fmt: skip
    found = json.loads((out / "simulation.json").read_bytes())
    fixed = {str(run["policy"]) for run in found["runs"] if str(run["policy"]).startswith("fixed:")}
    widest = max(fixed, key=lambda policy: int(policy.partition(":")[2]), default="")
    return list(_outcomes(found["runs"], widest)), found["comparisons"]


def _outcomes(runs: Iterable[dict[str, object]], widest: str) -> Iterable[Outcome]:
    """The simulator calls the widest by its index; here it keeps the name it was asked for by."""
    for run in runs:
        cv2, seed = parse_trace_name(str(run["trace"]))
        policy, top1 = str(run["policy"]), run["top1"]
        attainment = run["attainment"]
        assert isinstance(attainment, float | int), "what the simulator writes: this is a bug"
        yield Outcome(
            cv2, seed, "fixed:widest" if policy == widest and policy != "fixed:0" else policy, float(attainment),
            float(top1) if isinstance(top1, float | int) else None,
        )  # fmt: skip


def call(command: str, *arguments: str) -> None:
    """Run one of our console scripts; BenchError unless it ends with status 0."""
    done = subprocess.run([script(command), *arguments], stdout=sys.stderr, check=False)
    if done.returncode:
        raise BenchError(f"{command} {arguments[0]} ended with status {done.returncode}; what it wrote says why")


def say(line: str) -> None:
    """Progress, to stderr."""
    print(line, file=sys.stderr, flush=True)
