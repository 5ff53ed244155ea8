"""Profiles: what a checkpoint's slices take on this machine, measured once and kept on disk.

A profile holds for one checkpoint on one processor with one version of one engine; everything else is
another profile. Without one the service measures at start, within its bound, and keeps that.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog
from pydantic import ConfigDict, TypeAdapter, ValidationError

from models.checkpoint import Checkpoint
from models.machine import processor_id
from service.engine.base import Engine
from service.engine.measure import PROBES, Timing, Work, measure
from service.latency import LatencyTable

log = structlog.get_logger()

UNUSED_DAYS = 30
"""How long profiles and graphs outlive their last use."""


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """What a profile holds for. network: its id (``Manifest.network_id``). engine: name and version."""

    network: str
    engine: str
    device: str
    processor: str

    @classmethod
    def of(cls, network: str, engine: Engine) -> ProfileKey:
        return cls(network, f"{engine.name} {engine.version}", engine.device, processor_id())

    def file(self, folder: Path) -> Path:
        text = "\n".join((self.network, self.engine, self.device, self.processor))
        return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


@dataclass(frozen=True, slots=True)
class Profile:
    """Timings of every part at every batch size that may pay. measured_unix_s: seconds since the epoch."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    key: ProfileKey
    measured_unix_s: float
    timings: tuple[Timing, ...]
    format: Literal[1] = 1

    @property
    def is_steady(self) -> bool:
        """Whether every batch was timed often enough for a median to mean something."""
        return min(timing.runs for timing in self.timings) >= PROBES

    def table(self) -> LatencyTable:
        return LatencyTable({(timing.width, timing.batch): timing.p50_s for timing in self.timings})


_JSON = TypeAdapter(Profile)


def measured(
    checkpoint: Checkpoint, engine: Engine, limit_s: float, cancelled: threading.Event, runs: int = 15
) -> Profile:
    """Measure now; errors as ``measure``."""
    timings = measure(Work(engine, checkpoint), len(checkpoint.net.ladder), limit_s, cancelled, runs)
    return Profile(ProfileKey.of(checkpoint.manifest.network_id, engine), time.time(), tuple(timings))


def run_once(engine: Engine, checkpoint: Checkpoint, timings: Iterable[Timing], cancelled: threading.Event) -> None:
    """Run every batch of a profile once, so that no request is the first to touch its memory.

    Raises InterruptedError between two batches once ``cancelled`` is set.
    """
    work = Work(engine, checkpoint)
    for timing in timings:
        if cancelled.is_set():
            raise InterruptedError("the warm-up was cancelled")
        work.seconds((timing.width, timing.batch))


def kept_profile(folder: Path | None, key: ProfileKey, widths: int) -> Profile | None:
    """The profile in ``folder``, or None where there is none that holds; a damaged one is logged."""
    if folder is None:
        return None
    file = key.file(folder)
    try:
        profile = _JSON.validate_json(file.read_bytes())
        profile.table()
        with contextlib.suppress(OSError):
            os.utime(file)  # it is in use
        if {timing.width for timing in profile.timings} != {None, *range(widths)}:
            raise ValueError(f"its slices are not the model's {widths}")
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, ValueError) as error:
        log.warning("profile_unreadable", file=str(file), error=str(error))
        return None
    return profile if profile.key == key else None


def forget_unused(folder: Path) -> None:
    """Remove what lies in ``folder`` and was not used for ``UNUSED_DAYS``: other checkpoints, versions, machines."""
    oldest = time.time() - UNUSED_DAYS * 86_400
    try:
        for entry in folder.iterdir():
            if entry.stat().st_mtime < oldest:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except OSError as error:
        log.debug("nothing_forgotten", folder=str(folder), error=str(error))


def keep_profile(folder: Path | None, profile: Profile) -> Path | None:
    """Write it whole or not at all; None, and a log line, where that is not possible."""
    if folder is None:
        return None
    file = profile.key.file(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=folder, suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(_JSON.dump_json(profile, indent=1))
            Path(partial).replace(file)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except OSError as error:
        log.warning("profile_not_kept", file=str(file), error=str(error))
        return None
    return file
