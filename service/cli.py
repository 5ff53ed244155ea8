"""Console script ``slicewise``: serve a repository, or check one."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog
import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from pydantic_settings import CliApp

from models.checkpoint import CheckpointError, load, resolve
from models.transform import ImageError
from service import engine_study, profiler, scheduler_study, simulator
from service.api.state import ServiceState
from service.app import create_app, load_checkpoints, refuse_the_rest, wait_until_idle
from service.engine_study import EngineSettings
from service.hosting import check_policy, gate_decision
from service.http1 import server_config
from service.logs import configure
from service.profiler import ProfileSettings
from service.scheduler_study import SchedulerSettings
from service.settings import SettingError, Settings, unknown_variables
from service.simulator import SimulateSettings

log = structlog.get_logger()

FLUSH_S = 3
"""How long answers may take to leave after the drain."""

USAGE = """usage: slicewise COMMAND [flags]

commands:
  serve     answer requests (slicewise serve --help lists every setting)
  check     load and verify a model repository; exit 1 with the reasons when something is wrong
  profile   measure what the slices take on this machine, and keep it for serve
  simulate  replay traces under several policies, without a server
  scheduler measure the scheduler by itself, with many images waiting; prints JSON
  engine    measure the engine by itself: whole networks, the split, mixed batches, the gate; prints JSON
"""


class DrainingServer(uvicorn.Server):
    """Answers 503 on /readyz from SIGTERM on, finishes what is in flight, then exits with status 0."""

    def __init__(self, config: uvicorn.Config, state: ServiceState) -> None:
        super().__init__(config)
        self._state = state
        self._drain: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on the first signal, leave at once on a Ctrl-C after it; supervisors may repeat their SIGTERM."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._drain is not None:
            if number is signal.SIGINT:
                self.force_exit = self.should_exit = True
            return
        self._state.draining = True
        log.info("draining", in_flight_limit_s=self._state.settings.drain_limit_s)
        self._drain = asyncio.get_running_loop().create_task(self._drain_then_exit())

    async def _drain_then_exit(self) -> None:
        settings = self._state.settings
        await asyncio.sleep(settings.drain_delay_s)
        await wait_until_idle(self._state, settings.drain_limit_s)
        await refuse_the_rest(self._state)
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Stop as well when a model could not warm up: a service that never gets ready helps nobody."""
        return await super().on_tick(counter) or self._state.failed


def serve(arguments: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT. Status 0 after a drain, 1 when a checkpoint or the port is bad."""
    settings = CliApp.run(Settings, cli_args=list(arguments))
    configure(settings.log_format, settings.log_level)
    log.info("settings", **settings.model_dump(mode="json"))
    for name in unknown_variables():
        log.warning("unknown_variable", name=name, hint="no setting reads it; see slicewise serve --help")
    app = create_app(settings, load_checkpoints(settings))
    return run(app, settings)


def run(app: FastAPI, settings: Settings) -> int:
    """Serve ``app`` until it has drained; 1 when the port is in use or a model could not warm up."""
    config = server_config(app, settings, FLUSH_S)
    state: ServiceState = app.state.service
    server = DrainingServer(config, state)
    try:
        server.run()
    except SystemExit:  # uvicorn has logged why it could not begin
        return 1
    return 0 if server.started and not state.failed else 1


def check(arguments: Sequence[str]) -> int:
    """Load and verify every version of every model in a repository; 1 when one is bad or there is none.

    Of a model that the settings would serve, the version that would be served must have the operating point.
    """
    settings = CliApp.run(Settings, cli_args=list(arguments))
    configure(settings.log_format, "warning")
    results = [_check_version(folder, settings) for folder in _version_folders(settings.repository)]
    for line, _ in results:
        print(line)
    if not results:
        print(f"bad  {settings.repository}: no model; expected NAME/VERSION/ with model.safetensors and manifest.json")
    return 0 if results and all(good for _, good in results) else 1


def _version_folders(root: Path) -> list[Path]:
    """Every NAME/VERSION below the root, also those whose name is no version: they are reported."""
    return sorted(f for f in root.glob("*/*") if f.is_dir() and not f.name.startswith((".", "__")))


def _check_version(folder: Path, settings: Settings) -> tuple[str, bool]:
    label = f"{folder.parent.name}/{folder.name}"
    try:
        manifest = load(folder).manifest
        if manifest.name in settings.model and resolve(settings.repository, manifest.name) == folder:
            gate_decision(manifest, settings)
            check_policy(manifest, settings)
    except (CheckpointError, SettingError) as error:
        return f"bad  {label}: {error}", False
    return f"ok   {label}: {manifest.architecture}, {len(manifest.slices)} slices, {manifest.digest}", True


def profile(arguments: Sequence[str]) -> int:
    """Measure, keep and show the profile of every model that the settings name."""
    settings = CliApp.run(ProfileSettings, cli_args=list(arguments))
    configure(settings.log_format, "warning")
    profiler.profile(settings, profiler.console())
    return 0


def simulate(arguments: Sequence[str]) -> int:
    """Replay the traces that the settings name, show what became of them, and write it where they say."""
    settings = CliApp.run(SimulateSettings, cli_args=list(arguments))
    configure(settings.log_format, "warning")
    simulator.simulate(settings, simulator.console())
    return 0


def engine(arguments: Sequence[str]) -> int:
    """Measure the engine of the first model by itself; one line of JSON on stdout."""
    settings = CliApp.run(EngineSettings, cli_args=list(arguments))
    configure(settings.log_format, "warning")
    engine_study.study(settings, print)
    return 0


def scheduler(arguments: Sequence[str]) -> int:
    """Measure the scheduler by itself with the first model's profile; one line of JSON on stdout."""
    settings = CliApp.run(SchedulerSettings, cli_args=list(arguments))
    configure(settings.log_format, "warning")
    scheduler_study.study(settings, print)
    return 0


def main() -> None:
    """Entry point."""
    commands = {
        "serve": serve, "check": check, "profile": profile, "simulate": simulate, "scheduler": scheduler,
        "engine": engine,
    }  # fmt: skip
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments[0] not in commands:
        known = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if known else sys.stderr)
        sys.exit(0 if known else 2)
    try:
        sys.exit(commands[arguments[0]](arguments[1:]))
    except (CheckpointError, ImageError) as error:
        print(f"slicewise: error: {error}", file=sys.stderr)
        sys.exit(1)
    except SettingError as error:
        print(f"slicewise: error: {error}", file=sys.stderr)
        sys.exit(2)
    except ValidationError as error:
        for e in error.errors():
            given = f", given {e['input']!r}" if e["loc"] else ""
            print(f"slicewise: error: setting {'.'.join(map(str, e['loc']))}: {e['msg']}{given}", file=sys.stderr)
        sys.exit(2)
