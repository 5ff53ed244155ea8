"""``slicewise simulate``: traces through the service's own scheduler, policies and admission, without a server.

Every policy is replayed on every trace by the offline twin (``service.simulate``), and set beside the others.
"""

from __future__ import annotations

import csv
import json
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode
from rich import box
from rich.console import Console
from rich.table import Table

from models.checkpoint import Checkpoint
from service.app import load_checkpoints
from service.hosting import asking_on, batches_ahead, build_engine, curve_of, gate_decision, slice_facts
from service.latency import LatencyTable, LiveTimes, Overhead
from service.policies import Policy, policy_named
from service.profiling import ProfileKey, kept_profile
from service.request import Look
from service.scheduler import Scheduler
from service.settings import ZOO, SettingError, Settings, usable_cores
from service.simulate import Machine, Run
from service.simulation_figures import Known, Replay, compare, dominated, figures, means
from service.simulation_inputs import AT, IMAGE, read_evaluation, read_profile, read_trace
from service.simulation_report import Sheet, markdown, sheets

CostMs = Annotated[float, Field(ge=0, allow_inf_nan=False)]
TABLE_COLUMNS = 200
"""More than the widest table needs."""


class SimulateSettings(Settings):
    """Replay traces under several policies, without a server, and set the policies beside each other."""

    trace: Annotated[list[Path], NoDecode] = Field(
        [], description="traces from slicewise-load trace (CSV), repeated or separated by commas"
    )
    evaluation: Path | None = Field(
        None,
        description="from slicewise-models evaluate --width all --json, on the images that the traces count; without "
        "it only policies that never look at images can be replayed, and answers are not judged",
    )
    policies: Annotated[list[str], NoDecode] = Field(
        ["gate_slack", "gate", "slackfit"],
        min_length=1,
        description="policies to replay, as the setting policy spells them, repeated or separated by commas",
    )
    profile: Path | None = Field(
        None,
        description="what batches take: a kept profile, or what slicewise profile --json-out wrote, also on another "
        "machine; the profile kept for this one when absent",
    )
    overhead_ms: CostMs = Field(0.0, description="worker time that each image costs beside the network")
    ask_ms: CostMs = Field(0.0, description="what each image costs beside that when the gate is asked")
    ask_loop_ms: CostMs = Field(0.0, description="event loop time that each image costs more when the gate is asked")
    front_ms: CostMs = Field(
        0.0, description="event loop time of each image until it is admitted: HTTP, decoding; no worker's time"
    )
    back_ms: CostMs = Field(0.0, description="event loop time of each answer")
    handover_ms: CostMs = Field(
        0.0, description="event loop time of each batch, between its end and the beginning of the worker's next one"
    )
    client_ms: CostMs = Field(
        0.0,
        description="time of the client for each image, half of it to send and half to read, in one thread for all",
    )
    cores: int | None = Field(
        None, ge=1, description="that workers, event loop and client share; each has its own when absent"
    )
    against: str | None = Field(None, description="policy that the others are compared with; none when absent")
    out: Path | None = Field(None, description="folder for simulation.json and simulation.md; made when missing")
    events: bool = Field(False, description="also write what became of every image to out, a CSV per trace and policy")

    @field_validator("trace", "policies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        given = value if isinstance(value, list) else [value]
        return [part.strip() for text in given for part in str(text).split(",") if part.strip()]

    @model_validator(mode="after")
    def _a_run_is_whole(self) -> Self:
        if len(self.model) != 1:
            raise ValueError(f"model is {', '.join(self.model)}; allowed: one model at a time")
        if not self.trace:
            raise ValueError("trace names no file; allowed: at least one CSV file")
        names = [path.stem for path in self.trace]
        if len(set(names)) < len(names):
            raise ValueError(f"trace names {', '.join(names)}; allowed: files of different names")
        if self.events and self.out is None:
            raise ValueError("events needs out, a folder")
        return self


def _times(checkpoint: Checkpoint, settings: SimulateSettings) -> tuple[ProfileKey | None, LatencyTable]:
    """What batches take: of the file that is named, else as ``serve`` would find it on this machine."""
    if settings.profile is not None:
        return read_profile(settings.profile, checkpoint.manifest)
    return profiled_times(checkpoint, settings)


def profiled_times(checkpoint: Checkpoint, settings: Settings) -> tuple[ProfileKey, LatencyTable]:
    """What batches take by the profile that is kept for this machine. Raises SettingError when there is none."""
    manifest = checkpoint.manifest
    key = ProfileKey.of(manifest.network_id, build_engine(checkpoint, settings, threading.Event()))
    profile = kept_profile(settings.cache_folder / "profiles", key, len(manifest.slices))
    if profile is None:
        raise SettingError(
            f"no profile of {manifest.name}/{manifest.version} is kept for this machine; allowed: run slicewise "
            "profile first, or, to simulate, name a file with the setting profile"
        )
    return key, profile.table()


class Simulation:
    """What the settings ask for, read and checked; ``run`` replays it. Errors as those who read."""

    def __init__(self, settings: SimulateSettings) -> None:
        (checkpoint,) = load_checkpoints(settings).values()
        self._settings, self.manifest = settings, checkpoint.manifest
        self.known = Known(slice_facts(self.manifest))
        if settings.evaluation is not None:
            self.known = read_evaluation(settings.evaluation, self.manifest)
        images = None if self.known.correct_IL is None else len(self.known.correct_IL)
        self.traces = [read_trace(path, self.known.slices, images) for path in settings.trace]
        self.key, table = _times(checkpoint, settings)
        self._device = "cpu" if self.key is None else self.key.device
        one_per_device = self._device != "cpu"
        self.machine = Machine(
            times=table,
            workers=settings.workers or (1 if one_per_device else usable_cores()),
            capacity_images=settings.queue_capacity_images,
            default_slo_s=settings.default_slo_ms / 1e3,
            overhead_s=settings.overhead_ms / 1e3,
            ask_s=settings.ask_ms / 1e3,
            ask_loop_s=settings.ask_loop_ms / 1e3,
            front_s=settings.front_ms / 1e3,
            back_s=settings.back_ms / 1e3,
            handover_s=settings.handover_ms / 1e3,
            client_s=settings.client_ms / 1e3,
            cores=settings.cores,
            worker_priority=settings.worker_priority,
        )
        if self.machine.has_loop:  # else nothing is worth being ready for
            ahead = batches_ahead(self._device, table.image_seconds(0))
            self.machine = replace(self.machine, ahead=ahead)
        self.policies = [self._checked(name) for name in settings.policies]
        self.against = None if settings.against is None else self._policy(settings.against, "against").name
        if len(set(self.policies)) < len(self.policies) or (self.against or self.policies[0]) not in self.policies:
            raise SettingError(
                f"setting policies: {', '.join(self.policies)}"
                + (f", against {self.against}" if self.against else "")
                + "; allowed: each once, with the one that the others are compared with among them"
            )

    def _policy(self, name: str, setting: str = "policies", times: LiveTimes | None = None) -> Policy:
        try:
            curve = curve_of(self.manifest, gate_decision(self.manifest, self._settings))
            return policy_named(
                name, self.manifest.gate.choices, times or LiveTimes(self.machine.times), curve, asking_on(self._device)
            )
        except ValueError as error:
            raise SettingError(f"setting {setting}, model {self.manifest.name}: {error}") from error

    def _checked(self, name: str) -> str:
        """The policy's own name; SettingError when the evaluation does not say what it has to know."""
        policy = self._policy(name)
        if policy.asks_gate and self.known.p_right_IL is None:
            lacks = "there is no evaluation" if self._settings.evaluation is None else "the evaluation has no p_right"
            raise SettingError(
                f"setting policies: {policy.name} asks the gate and {lacks}; allowed: slackfit, maxbatch, maxacc, "
                "fixed:INDEX, or an evaluation of a model with a calibrated gate"
            )
        return policy.name

    def _looks(self, policy: Policy) -> list[Look]:
        """What the policy remembers of every image that was evaluated, at the operating point of the settings."""
        if not policy.asks_gate or self.known.p_right_IL is None:
            return []
        decision = gate_decision(self.manifest, self._settings)
        choices = np.asarray(decision.choices)
        cost_G = decision.lambda_ * np.asarray(decision.madds)[choices] / decision.madds[-1]
        utility_NG = self.known.p_right_IL[:, choices] - cost_G.astype(np.float32)
        return policy.looks(utility_NG, decision.widths_of(utility_NG), decision.best_of(utility_NG))

    def run(self) -> Iterator[Replay]:
        """Every trace under every policy, each beginning with the profile's times and empty queues."""
        for trace in self.traces:
            for name in self.policies:
                process = Overhead() if self.machine.has_loop else None
                times = LiveTimes(self.machine.times, process if self.machine.plans_count_loop else None)
                policy = self._policy(name, times=times)
                scheduler = Scheduler(policy, times, self.machine.workers, has_exit=self.manifest.has_exit)
                run = Run(scheduler, self.machine, self._looks(policy), process)
                began_s = time.perf_counter()
                served = run.replay(trace.arrivals)
                wall_s = time.perf_counter() - began_s
                yield Replay(trace.name, policy.name, trace.arrivals, served, trace.infeasible, wall_s)

    def assumptions(self) -> dict[str, Any]:
        """What the figures hold for, ready for JSON."""
        s, m, machine = self._settings, self.manifest, self.machine
        point = m.gate.default_point if s.operating_point is None else s.operating_point
        return {
            "model": f"{m.name}/{m.version}",
            "digest": m.digest,
            "operating_point": point,
            "evaluated_images": None if self.known.correct_IL is None else len(self.known.correct_IL),
            "profile": None if self.key is None else asdict(self.key),
            "workers": machine.workers,
            "overhead_ms": s.overhead_ms,
            "ask_ms": s.ask_ms,
            "ask_loop_ms": s.ask_loop_ms,
            "front_ms": s.front_ms,
            "back_ms": s.back_ms,
            "handover_ms": s.handover_ms,
            "client_ms": s.client_ms,
            "cores": s.cores,
            "worker_priority": s.worker_priority,
            "queue_capacity_images": machine.capacity_images,
            "default_slo_ms": s.default_slo_ms,
            "traces": {trace.name: f"sha256:{trace.sha256}" for trace in self.traces},
        }


def command(settings: SimulateSettings) -> str:
    """The command line with all that matters to the figures; of files and folders only the names."""
    given: list[tuple[str, object]] = [("model", settings.model[0])]
    if settings.repository != ZOO:
        given.append(("repository", settings.repository.name))
    given += [("trace", path.name) for path in settings.trace]
    given += [(name, path.name) for name in ("evaluation", "profile") if (path := getattr(settings, name))]
    given.append(("policies", ",".join(settings.policies)))
    optional = (
        "operating_point",
        "workers",
        "overhead_ms",
        "ask_ms",
        "ask_loop_ms",
        "front_ms",
        "back_ms",
        "handover_ms",
        "client_ms",
        "cores",
        "worker_priority",
        "queue_capacity_images",
        "default_slo_ms",
        "against",
    )
    default = {name: SimulateSettings.model_fields[name].default for name in optional}
    given += [(name, value) for name in optional if (value := getattr(settings, name)) != default[name]]
    flags = [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in given]
    return "slicewise simulate " + " \\\n    ".join([*flags, "--out DIR"])


def simulate(settings: SimulateSettings, say: Callable[[object], None]) -> None:
    """Replay, compare, show, and write what the settings ask for. Raises SettingError and CheckpointError."""
    simulation = Simulation(settings)
    if settings.out is not None:
        _make_folder(settings.out)
    replays = list(simulation.run())
    every = [figures(replay, simulation.known) for replay in replays]
    comparisons = [] if simulation.against is None else compare(replays, simulation.against, simulation.known)
    beaten = dominated(every)
    tables = sheets(every, comparisons, beaten)
    for sheet in tables:
        say(_rich(sheet))
    if settings.out is None:
        return
    facts = simulation.assumptions()
    found = facts | {
        "command": command(settings),
        "runs": [asdict(one) for one in every],
        "means": [asdict(one) for one in means(every)],
        "comparisons": [asdict(one) for one in comparisons],
        "dominated": [asdict(one) for one in beaten],
    }
    (settings.out / "simulation.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    title, lines = f"Simulation of {facts['model']}", [(name, _shown(value)) for name, value in facts.items()]
    (settings.out / "simulation.md").write_text(markdown(title, lines, command(settings), tables))
    if settings.events:
        for replay in replays:
            _write_events(settings.out / f"{replay.trace}.{replay.policy.replace(':', '-')}.csv", replay)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"setting out: {out} is no folder and cannot be made one: {error.strerror}") from error


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {part}" for name, part in value.items())
    return "-" if value is None else str(value)


def _write_events(path: Path, replay: Replay) -> None:
    """What became of every image that some slice was allowed for."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([AT, IMAGE, "outcome", "width", "reason", "finish_s", "predicted_s"])
        for arrival, end in zip(replay.arrivals, replay.served, strict=True):
            writer.writerow(
                [arrival.at_s, arrival.image, end.outcome, end.width, end.reason, end.finish_s, end.predicted_s]
            )


def _rich(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, box=box.SIMPLE, pad_edge=False, title_justify="left")
    for number, column in enumerate(sheet.columns):
        table.add_column(column, justify="left" if number < sheet.labels else "right", no_wrap=True)
    for row in sheet.rows:
        table.add_row(*row)
    return table


def console() -> Callable[[object], None]:
    """Prints tables to stdout as wide as they are, also into a file or a narrow window."""
    return Console(highlight=False, markup=False, soft_wrap=True, width=TABLE_COLUMNS).print
