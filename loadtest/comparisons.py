"""The comparisons that the benchmark is made of, and the bars of each."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from loadtest.arms import CommandArm, HttpArm
from loadtest.bench import Comparison
from loadtest.machine import usable_cores
from loadtest.mix import Mix
from loadtest.results import Bar, Metric, Side
from loadtest.servers import ServerSpec

WIDTH_HEADER = "Slice-Width"
IMAGES_PER_BATCH = 32
BATCH_CLIENTS = 2
"""Two batches of 32 keep every core busy while one of them is received and decoded."""
P99_REQUESTS = 2000
"""Requests of each arm without which a p99 is not worth stating."""

FASTAPI, LITSERVE = "FastAPI + ONNX Runtime", "LitServe + ONNX Runtime"
FIXED_FASTAPI, FIXED_LITSERVE, MIX = "fixed_widest_fastapi", "fixed_widest_litserve", "width_mix"
LOOP_SATURATED, LOOP_ONE_CLIENT = "loop_saturated", "loop_one_client"
GATE_BATCH, GATE_SINGLE = "gate_batch", "gate_single"
NAMES = (FIXED_FASTAPI, FIXED_LITSERVE, MIX, LOOP_SATURATED, LOOP_ONE_CLIENT, GATE_BATCH, GATE_SINGLE)

LOOP_COMMAND = (
    "slicewise profile --repository {repository} --model {model} --workers {workers} --loop-only true "
    "--loop-s {seconds} --loop-warm-up-s {warm_up} --loop-images {images} --loop-mix {mix}"
)


@dataclass(frozen=True, slots=True)
class Network:
    """A model of a repository, and images to send to it. repository: None for the one slicewise ships with."""

    model: str
    images: Path
    repository: Path | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What there is to compare with.

    photos        the network at photograph size, None to leave out what needs it.
    cifar         the network with the trained gate, likewise.
    width_mix     ``WIDTH:SHARE,...`` of the mixed load.
    clients       connections that saturate the machine.
    loop_command  the bare loop, see ``CommandArm``; ``{mix}``, ``{workers}``, ``{images}``, ``{repository}`` and
                  ``{model}`` are filled in as well.
    serve_flags   more flags for ``slicewise serve``.
    """

    photos: Network | None
    cifar: Network | None
    width_mix: str
    clients: int
    loop_command: str = LOOP_COMMAND
    serve_flags: tuple[str, ...] = ()


def comparisons(plan: Plan, names: tuple[str, ...], work: Path) -> list[Comparison]:
    """The comparisons of these names that the plan has the means for. Peers' files are written below ``work``."""
    found: list[Comparison] = []
    if plan.photos is not None:
        found += _against_peers(plan, plan.photos, names, work)
        if plan.loop_command:
            found += _against_loop(plan, plan.photos)
    if plan.cifar is not None:
        found += _gate(plan, plan.cifar)
    return [comparison for comparison in found if comparison.name in names]


def _against_peers(plan: Plan, network: Network, names: tuple[str, ...], work: Path) -> list[Comparison]:
    if not {FIXED_FASTAPI, FIXED_LITSERVE, MIX} & set(names):
        return []
    flags = peer_flags(network, work)
    fastapi = _peer(FASTAPI, "fastapi_onnx", "/classify", plan, network, flags)
    litserve = _peer(LITSERVE, "litserve_onnx", "/predict", plan, network, flags)
    widest = _slicewise(plan, network, "slicewise, widest", f"{WIDTH_HEADER}=widest")
    mixed = _slicewise(plan, network, "slicewise, width mix", _mix(plan))
    p99 = Bar(Metric.P99, Side.AT_MOST, 1.10, P99_REQUESTS)
    return [
        Comparison(
            FIXED_FASTAPI, f"Widest slice, {plan.clients} clients, against a tuned FastAPI server", widest, fastapi,
            (Bar(Metric.THROUGHPUT, Side.AT_LEAST, 1.15), p99),
        ),
        Comparison(
            FIXED_LITSERVE, f"Widest slice, {plan.clients} clients, against LitServe", widest, litserve,
            (Bar(Metric.THROUGHPUT, Side.AT_LEAST, 1.35), p99),
        ),
        Comparison(
            MIX, f"Width mix {plan.width_mix}, {plan.clients} clients, against the widest slice on FastAPI", mixed,
            fastapi, (Bar(Metric.THROUGHPUT, Side.AT_LEAST, 1.8),),
        ),
    ]  # fmt: skip


def _against_loop(plan: Plan, network: Network) -> list[Comparison]:
    served = _slicewise(plan, network, "slicewise, width mix", _mix(plan))
    alone = _slicewise(plan, network, "slicewise, width mix", _mix(plan), clients=1)
    return [
        Comparison(
            LOOP_SATURATED, f"Cost of serving: width mix, {plan.clients} clients, against a bare loop", served,
            _loop(plan, network, usable_cores()), (Bar(Metric.CPU, Side.AT_MOST, 1.15),),
        ),
        Comparison(
            LOOP_ONE_CLIENT, "Latency of serving: width mix, one client, against a bare loop of one thread", alone,
            _loop(plan, network, 1), (Bar(Metric.P50_EXCESS, Side.AT_MOST, 2.5),),
        ),
    ]  # fmt: skip


def _gate(plan: Plan, network: Network) -> list[Comparison]:
    def arm(name: str, mix: str, images_per_request: int) -> HttpArm:
        batched = images_per_request > 1
        return HttpArm(
            name, slicewise_server(network, plan.serve_flags), "/v1/classify/batch" if batched else "/v1/classify",
            network.images, BATCH_CLIENTS if batched else plan.clients, images_per_request, mix,
        )  # fmt: skip

    gate, widest, forced = "slicewise, gate", "slicewise, widest", f"{WIDTH_HEADER}=widest"
    return [
        Comparison(
            GATE_BATCH, f"Trained gate against the widest slice, {IMAGES_PER_BATCH} images per request",
            arm(gate, "", IMAGES_PER_BATCH), arm(widest, forced, IMAGES_PER_BATCH),
            (Bar(Metric.THROUGHPUT, Side.AT_LEAST, 1.5),),
        ),
        Comparison(
            GATE_SINGLE, f"Trained gate against the widest slice, one image per request, {plan.clients} clients",
            arm(gate, "", 1), arm(widest, forced, 1),
        ),
    ]  # fmt: skip


def _mix(plan: Plan) -> str:
    return str(Mix.parse(f"{WIDTH_HEADER}={plan.width_mix}"))


def _slicewise(plan: Plan, network: Network, name: str, mix: str, clients: int | None = None) -> HttpArm:
    server = slicewise_server(network, plan.serve_flags)
    return HttpArm(name, server, "/v1/classify", network.images, clients or plan.clients, mix=mix)


def slicewise_server(network: Network, serve_flags: tuple[str, ...] = ()) -> ServerSpec:
    """``slicewise serve`` of a network, with more flags."""
    repository = [] if network.repository is None else ["--repository", str(network.repository.absolute())]
    command = [
        script("slicewise"), "serve", *repository, "--model", network.model, "--port", "{port}",
        "--log-level", "warning", *serve_flags,
    ]  # fmt: skip
    return ServerSpec(f"slicewise-{network.model}", tuple(command), "/readyz")


def _peer(name: str, module: str, path: str, plan: Plan, network: Network, flags: list[str]) -> HttpArm:
    command = (sys.executable, "-m", f"loadtest.peers.{module}", "--port", "{port}", *flags)
    return HttpArm(name, ServerSpec(module, command, "/health"), path, network.images, plan.clients)


def _loop(plan: Plan, network: Network, workers: int) -> CommandArm:
    assert network.repository is not None, "checked when the peers' files were asked for: this is a bug"
    values = {
        "{mix}": plan.width_mix, "{workers}": str(workers), "{images}": str(network.images.absolute()),
        "{repository}": str(network.repository.absolute()), "{model}": network.model,
    }  # fmt: skip
    first, *rest = shlex.split(plan.loop_command)
    command = [script(first), *rest]
    for name, value in values.items():
        command = [argument.replace(name, value) for argument in command]
    return CommandArm(
        f"bare loop, {workers} threads" if workers > 1 else "bare loop, 1 thread", tuple(command), workers
    )


def peer_flags(network: Network, work: Path, width: int | None = None) -> list[str]:
    """Write one slice, the widest by default, as an ONNX graph; the flags that tell a peer where it is.

    Raises ValueError when the network is in no repository of its own, lacks the slice, or does not export.
    """
    manifest, widest = _manifest(network), widest_slice(network)
    chosen = widest if width is None else width
    if not 0 <= chosen <= widest:
        raise ValueError(f"model {network.model} has no width {chosen}; allowed: 0..{widest}")
    graph = work.absolute() / f"{network.model}-{chosen}.onnx"
    export = [script("slicewise-models"), "export", str(manifest.parent), "--width", str(chosen), str(graph)]
    done = subprocess.run(export, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"slicewise-models export of {network.model} failed: {done.stderr.strip()}")
    return ["--graph", str(graph), "--manifest", str(manifest.absolute())]


def widest_slice(network: Network) -> int:
    """Ladder index of the widest slice. Raises ValueError when the network is in no repository of its own."""
    return len(json.loads(_manifest(network).read_bytes())["slices"]) - 1


def _manifest(network: Network) -> Path:
    if network.repository is None:
        raise ValueError(f"model {network.model}: comparisons with peers need --repository")
    return newest_version(network.repository / network.model) / "manifest.json"


def newest_version(folder: Path) -> Path:
    """The version folder with the highest number, as slicewise picks it. Raises ValueError when there is none."""
    versions = [f for f in folder.glob("*") if f.name.isascii() and f.name.isdigit()] if folder.is_dir() else []
    if not versions:
        raise ValueError(f"{folder}: no version; expected NAME/VERSION/ with manifest.json")
    return max(versions, key=lambda version: int(version.name))


def script(name: str) -> str:
    """A console script that is installed beside this Python, or on the PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or name
