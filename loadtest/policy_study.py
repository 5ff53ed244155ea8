"""``slicewise-load policies``: policies under the same bursts, on a live server and in the offline twin.

Everything goes to --out and is not done again when it is there, so that a study that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.account_readings import read_process
from loadtest.arms import BenchError, HttpArm, Window
from loadtest.comparisons import Network, script, slicewise_server
from loadtest.machine import describe, usable_cores
from loadtest.mix import Mix
from loadtest.outcomes import Figures
from loadtest.policy_plan import (
    CALM_SHARE,
    MEAN_SHARE,
    SUSTAINED_LIMIT_MS,
    SUSTAINED_RUNS,
    SUSTAINED_S,
    SUSTAINED_SHARE,
    TAUS,
    Capacity,
    Evaluated,
    Loads,
    Outcome,
    Spent,
    base_share,
    draw,
    median_of,
    parse_trace_name,
    quietest,
    sustained,
    trace_name,
)
from loadtest.policy_plan import capacity as capacity_of
from loadtest.policy_report import Findings, markdown
from loadtest.provenance import shown_command
from loadtest.run_report import RunRecord
from loadtest.servers import Fleet, Server, ServerSpec
from loadtest.trace_file import Origin, fill, write_trace
from loadtest.traces import poisson
from loadtest.victim import Victim

CAPACITY, REPORT = "capacity.json", "report.md"
SATURATING_CLIENTS, PROBE_S = 32, 8.0
LOAD_REPEATS = 3
NARROWEST = "fixed:0"


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
    add("--repeats", type=int, default=3, help="runs of each of them under each policy (default: %(default)s)")
    add("--twin-seeds", type=int, default=20, help="traces of each CV2 that are simulated")
    add("--duration-s", type=float, default=20.0, help="length of each trace")
    add("--out", type=Path, required=True, metavar="DIR")


def run_policies(arguments: argparse.Namespace) -> None:
    """Measure what is missing, then write the report. Raises ValueError, BenchError and ServerError."""
    a = arguments
    if min(a.seeds, a.twin_seeds) < 1 or a.seeds > a.twin_seeds:
        raise ValueError(f"--seeds {a.seeds} and --twin-seeds {a.twin_seeds}; allowed: 1 <= seeds <= twin seeds")
    if a.repeats < 1:
        raise ValueError(f"--repeats {a.repeats}; allowed: 1 or more")
    claim(a.out, shown_command("policies", a))
    capacity = _capacity(a)
    _write_traces(a, capacity)
    live, same = _live(a, capacity, a.live.split(","))
    twin, comparisons = _twin(a, capacity)
    found = Findings(evaluated(a.evaluation), live, same, twin, comparisons, a.duration_s, a.repeats)
    text = markdown(capacity, found, describe())
    (a.out / REPORT).write_text(text, encoding="utf-8")
    print(a.out / REPORT)


def evaluated(path: Path) -> Evaluated:
    """Which network an evaluation is of."""
    found = json.loads(path.read_bytes())
    return Evaluated(f"{found['model']}/{found['version']}", tuple(found["madds_served"]), tuple(found["top1"]))


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
    """C0, the sustained rate of the narrowest width through HTTP with the generator running, and what images cost."""
    kept = a.out / CAPACITY
    if not kept.exists():
        work = Path(tempfile.mkdtemp(prefix="slicewise-load-"))
        rate = _sustained(a, work)
        loads = _loads(a, work, rate)
        profile = work / "profile.json"
        call("slicewise", "profile", *where(a), "--json-out", str(profile))
        (measured,) = json.loads(profile.read_bytes())
        found = capacity_of(rate, usable_cores(), measured["timings"], loads)
        found = replace(found, worker_priority=a.worker_priority)
        kept.write_text(json.dumps(asdict(found)) + "\n", encoding="utf-8")
        say(f"{found}, tau0 {found.tau0_ms:.2f} ms; {loads}")
    return Capacity(**json.loads(kept.read_bytes()))


def _loads(a: argparse.Namespace, work: Path, rate_per_s: float) -> Loads:
    """What is spent at a rate of the narrowest width, and at less than that, where the gate is not asked and is.

    Budgets leave slice 0 alone, so that an early exit has the answer and no body follows the gate.
    """
    budget = f"Compute-Budget={_slices(a, work)[0]['madds_served']}"
    calm_per_s = CALM_SHARE * rate_per_s
    busy, calm, asked = [], [], []
    for number in range(LOAD_REPEATS):
        busy.append(_spent(a, work, f"busy-{number}", rate_per_s, NARROWEST))
        calm.append(_spent(a, work, f"calm-{number}", calm_per_s, NARROWEST))
        asked.append(_spent(a, work, f"asked-{number}", calm_per_s, "gate", budget))
    return Loads(quietest(busy), quietest(calm), quietest(asked))


def _slices(a: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    with Victim(server_spec(a, "gate"), work / "slices.log") as server:
        (model,) = server.ask_json("/v1/models")["models"]
    slices: list[dict[str, Any]] = model["slices"]
    return slices


def _sustained(a: argparse.Namespace, work: Path) -> float:
    """Of Poisson arrivals, with the generator that runs the traces; not above what saturating clients get."""
    spec = server_spec(a, NARROWEST)
    arm = HttpArm("capacity", spec, "/v1/classify", a.images, SATURATING_CLIENTS)
    with Fleet(work) as fleet:
        most = arm.measure(fleet, Window(3.0, 10.0)).images_per_s
    with Server(spec, work / "server.log") as server:

        def holds(rate_per_s: float) -> bool:
            return all(holds_once(rate_per_s, number) for number in range(SUSTAINED_RUNS))

        def holds_once(rate_per_s: float, number: int) -> bool:
            trace, out = _poisson(a, work, f"{rate_per_s:.1f}-{number}", rate_per_s, SUSTAINED_S)
            attainment = _run(a, server.url, trace, NARROWEST, out).figures.attainment
            say(f"{NARROWEST}, {rate_per_s:.1f} images/s: {attainment or 0:.4f} within {SUSTAINED_LIMIT_MS:g} ms")
            return (attainment or 0.0) >= SUSTAINED_SHARE

        rate = sustained(holds, most)
    if not rate:
        raise BenchError(f"{most:.1f} images/s with {SATURATING_CLIENTS} clients, and no open loop is sustained")
    return rate


def _spent(a: argparse.Namespace, work: Path, name: str, rate_per_s: float, policy: str, *budgets: str) -> Spent:
    """By images that come at this rate."""
    trace, out = _poisson(a, work, name, rate_per_s, PROBE_S, *budgets)
    return _watched(a, policy, trace, out)[1]


def _watched(a: argparse.Namespace, policy: str, trace: Path, out: Path) -> tuple[Figures, Spent]:
    """What became of a trace under a policy, on a server of its own, and what it took; not again when it is in ``out``.

    uvicorn's event loop runs in the first thread of its process; before the run it has hardly done anything.
    """
    kept = out / "spent.json"
    if not kept.exists():
        log = Path(tempfile.mkdtemp(prefix="slicewise-load-")) / "server.log"
        with Victim(server_spec(a, policy), log) as server:
            began_s = _loop_cpu_s(server), server.cpu_s()
            record = _run(a, server.url, trace, policy, out)
            loop_s, process_s = _loop_cpu_s(server) - began_s[0], server.cpu_s() - began_s[1]
            batches = server.metrics().total("slicewise_batch_size_count", width="trunk")
        images, client_ms = record.trace.requests, record.generator.cpu_ms_per_request
        spent = Spent(loop_s / images * 1e3, process_s / images * 1e3, client_ms, batches / images)
        kept.write_text(json.dumps(asdict(spent)) + "\n", encoding="utf-8")
        say(f"live {out.name}: {record.figures.attainment or 0:.4f}, {spent}")
    return RunRecord.load(out / "results.json").figures, Spent(**json.loads(kept.read_bytes()))


def _loop_cpu_s(server: Server) -> float:
    return read_process(server.pid).threads[server.pid].cpu_s


def _poisson(
    a: argparse.Namespace, work: Path, name: str, rate_per_s: float, duration_s: float, *budgets: str
) -> tuple[Path, Path]:
    """A new trace of requests that probe what is sustained, and where its run goes."""
    trace = work / f"{name}.csv"
    mixes = [Mix.parse(text) for text in (f"Latency-Budget={SUSTAINED_LIMIT_MS:g}ms", *budgets)]
    origin = Origin("poisson", {"rate_per_s": rate_per_s}, duration_s, 0, a.image_count, tuple(map(str, mixes)))
    arrivals = poisson(rate_per_s, duration_s, np.random.default_rng(0))
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


def _live(a: argparse.Namespace, capacity: Capacity, policies: Sequence[str]) -> tuple[list[Outcome], list[Outcome]]:
    """Every policy on every live trace, and the same in the twin; of several runs of each the medians.

    First all that needs an idle machine.
    """
    traces = [(cv2, seed) for cv2 in TAUS for seed in range(a.seeds)]
    rounds = {trace: [_round(a, capacity, *trace, policies, number) for number in range(a.repeats)] for trace in traces}
    live, twin = [], []
    for trace, measured in rounds.items():
        simulated = [_twin_round(a, capacity, *trace, found, number) for number, found in enumerate(measured)]
        live += [median_of([found[policy] for found in measured]) for policy in policies]
        twin += [median_of([found[policy] for found in simulated]) for policy in policies]
    return live, twin


def _round(
    a: argparse.Namespace, capacity: Capacity, cv2: int, seed: int, policies: Sequence[str], number: int
) -> dict[str, Outcome]:  # fmt: skip
    """Every policy once, one after the other; how slow the machine was meanwhile, the narrowest width says."""
    runs, name = {}, f"{trace_name(cv2, seed)}-{number}"
    for policy in policies[:: -1 if number % 2 else 1]:
        out = a.out / "live" / f"{name}-{policy.replace(':', '-')}"
        runs[policy] = _watched(a, policy, _trace(a, cv2, seed), out)
    slower = 1.0
    if NARROWEST in runs:
        figures, spent = runs[NARROWEST]
        slower = spent.loop_ms / capacity.loop_ms(spent.batches, 1.0 - figures.refused / figures.requests)
    found = {policy: figures for policy, (figures, _) in runs.items()}
    return {p: Outcome(cv2, seed, p, f.attainment or 0.0, f.top1, f.late_sends, slower) for p, f in found.items()}


def _twin_round(
    a: argparse.Namespace, capacity: Capacity, cv2: int, seed: int, live: Mapping[str, Outcome], number: int
) -> dict[str, Outcome]:  # fmt: skip
    """The same in the twin, on a machine that is as slow."""
    out, slower = a.out / "twin-live" / f"{trace_name(cv2, seed)}-{number}", next(iter(live.values())).slower
    runs = _simulated(a, capacity, [_trace(a, cv2, seed)], list(live), out, slower)["runs"]
    return {one.policy: replace(one, slower=slower) for one in _outcomes(runs)}


def _twin(a: argparse.Namespace, capacity: Capacity) -> tuple[list[Outcome], Sequence[dict[str, object]]]:
    traces = [_trace(a, cv2, seed) for cv2 in TAUS for seed in range(a.twin_seeds)]
    found = _simulated(a, capacity, traces, a.twin.split(","), a.out / "twin", 1.0, "--against", "slackfit")
    return list(_outcomes(found["runs"])), found["comparisons"]


def _simulated(
    a: argparse.Namespace, capacity: Capacity, traces: Sequence[Path], policies: Sequence[str], out: Path,
    slower: float, *flags: str,
) -> dict[str, Any]:  # fmt: skip
    """What the twin makes of them; not again when it is in ``out``."""
    if not (out / "simulation.json").exists():
        call(
            "slicewise", "simulate", *where(a), "--operating-point", str(a.operating_point), "--trace",
            ",".join(map(str, traces)), "--evaluation", str(a.evaluation), "--policies", ",".join(policies),
            *chain(*capacity.twin_flags(slower).items()), "--worker-priority", capacity.worker_priority,
            "--out", str(out), *flags,
        )  # fmt: skip
    found: dict[str, Any] = json.loads((out / "simulation.json").read_bytes())
    return found


def _outcomes(runs: Iterable[dict[str, object]]) -> list[Outcome]:
    """The simulator calls the widest by its index; here it keeps the name it was asked for by."""
    fixed = {str(run["policy"]) for run in runs if str(run["policy"]).startswith("fixed:")} - {NARROWEST}
    widest = max(fixed, key=lambda policy: int(policy.partition(":")[2]), default="")
    found = []
    for run in runs:
        cv2, seed = parse_trace_name(str(run["trace"]))
        policy, attainment, top1 = str(run["policy"]), run["attainment"], run["top1"]
        assert isinstance(attainment, float | int), "what the simulator writes: this is a bug"
        right = float(top1) if isinstance(top1, float | int) else None
        found.append(Outcome(cv2, seed, "fixed:widest" if policy == widest else policy, float(attainment), right))
    return found


def call(command: str, *arguments: str) -> None:
    """Run one of our console scripts; BenchError unless it ends with status 0."""
    done = subprocess.run([script(command), *arguments], stdout=sys.stderr, check=False)
    if done.returncode:
        raise BenchError(f"{command} {arguments[0]} ended with status {done.returncode}; what it wrote says why")


def say(line: str) -> None:
    """Progress, to stderr."""
    print(line, file=sys.stderr, flush=True)
