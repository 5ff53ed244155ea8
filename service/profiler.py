"""``slicewise profile``: measure a model's slices on this machine, keep the profile, and show it.

With ``--loop-s`` the model also runs without HTTP, queues and routing: as many threads as worker slots
decode images and run trunk and body one after the other. No server can be faster; what it loses
against this is what serving costs.
"""

from __future__ import annotations

import json
import resource
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from pydantic import Field, field_validator
from rich import box
from rich.console import Console
from rich.table import Table

from models.checkpoint import Checkpoint
from models.transform import load_pixels
from service.app import load_checkpoints
from service.engine.base import Engine
from service.engine.measure import Timing
from service.hosting import build_engine
from service.profiling import Profile, keep_profile, measured
from service.settings import SettingError, Settings

MIB = 2**20


class ProfileSettings(Settings):
    """Measure seconds per (trunk | width, batch) of the served models and keep them for ``serve``."""

    profile_limit_s: float = Field(60.0, gt=0, le=3600, description="time to measure each model")
    profile_runs: int = Field(200, ge=1, description="most runs of each batch")
    loop_s: float = Field(0.0, ge=0, description="seconds of the loop without HTTP; 0 = none")
    loop_images: Path | None = Field(None, description="folder or zip of images for the loop")
    loop_mix: dict[int, int] = Field(
        {}, description='images at each width, as JSON: {"0": 10, "3": 3}; the gate\'s wish when empty'
    )
    json_out: Path | None = Field(None, description="write what was measured to this file")

    @field_validator("loop_mix")
    @classmethod
    def _counts(cls, mix: dict[int, int]) -> dict[int, int]:
        if any(count < 1 for count in mix.values()):
            raise ValueError("every width needs at least 1 image")
        return mix


@dataclass(frozen=True, slots=True)
class LoopResult:
    """What the loop did. cpu_s: processor seconds of this process meanwhile."""

    threads: int
    images: int
    seconds: float
    cpu_s: float
    p50_ms: float
    p99_ms: float


def read_images(path: Path) -> list[bytes]:
    """All images of a folder or zip, by name. Raises SettingError when there is none."""
    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
    if path.is_dir():
        images = [f.read_bytes() for f in sorted(path.rglob("*")) if f.suffix.lower() in suffixes]
    else:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if n.lower().endswith(suffixes))
            images = [archive.read(name) for name in names]
    if not images:
        raise SettingError(f"{path} holds no images ({', '.join(suffixes)})")
    return images


def spread(mix: dict[int, int], seed: int = 0) -> Iterator[int]:
    """Widths for ever, each cycle holding exactly the counts of ``mix`` in a new random order."""
    rng = np.random.default_rng(seed)
    widths = np.repeat(list(mix), list(mix.values()))
    while True:
        yield from rng.permutation(widths).tolist()


def run_loop(
    checkpoint: Checkpoint, engine: Engine, images: Sequence[bytes], mix: dict[int, int], threads: int, limit_s: float
) -> LoopResult:
    """Decode, trunk and body of one image after the other on every thread, for ``limit_s`` seconds."""
    spec, wish = checkpoint.manifest.input, checkpoint.manifest.decision().widths
    latencies: list[list[float]] = [[] for _ in range(threads)]

    def work(number: int, began_s: float) -> None:
        widths = spread(mix, number) if mix else None
        for data in islice(cycle(images), number * len(images) // threads, None):
            start_s = time.monotonic()
            if start_s - began_s >= limit_s:
                return
            features, gate_inputs = engine.trunk([load_pixels(data, spec)])
            width = int(wish(engine.gate(gate_inputs))[0]) if widths is None else next(widths)
            engine.body(width, [features[0]])
            latencies[number].append(time.monotonic() - start_s)

    cpu_s, began_s = time.process_time(), time.monotonic()
    workers = [threading.Thread(target=work, args=(number, began_s)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds, cpu_s = time.monotonic() - began_s, time.process_time() - cpu_s
    every_s = [latency for mine in latencies for latency in mine]
    p50_s, p99_s = np.quantile(every_s, (0.5, 0.99)) if every_s else (0.0, 0.0)
    return LoopResult(threads, len(every_s), seconds, cpu_s, float(p50_s) * 1e3, float(p99_s) * 1e3)


def _resident_mib() -> float:
    """Memory of this process that is in use now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * resource.getpagesize() / MIB


def profile(settings: ProfileSettings, say: Callable[[object], None]) -> list[dict[str, object]]:
    """Profile every model of ``settings``; one JSON-ready result each."""
    results = []
    for name, checkpoint in load_checkpoints(settings).items():
        before_mib, began_s = _resident_mib(), time.monotonic()
        engine = build_engine(checkpoint, settings)
        build_s = time.monotonic() - began_s
        found = measured(checkpoint, engine, settings.profile_limit_s, threading.Event(), settings.profile_runs)
        file = keep_profile(settings.cache_folder / "profiles", found)
        resident_mib = _resident_mib() - before_mib
        facts = {"model": name, "build_s": round(build_s, 3), "resident_mib": round(resident_mib, 1)}
        say(_table(facts, found))
        parts_mib = {part: round(size / MIB, 2) for part, size in engine.part_bytes.items()}
        say(f"MiB: {', '.join(f'{part} {size}' for part, size in parts_mib.items())}")
        say(f"kept: {file}" if file else "not kept, see the log")
        result: dict[str, object] = facts | {
            "parts_mib": parts_mib,
            "timings": [asdict(timing) for timing in found.timings],
        }
        if settings.loop_s:
            if settings.loop_images is None:
                raise SettingError("setting loop_s needs loop_images, a folder or zip")
            unknown = sorted(set(settings.loop_mix) - set(range(len(checkpoint.net.ladder))))
            if unknown:
                raise SettingError(
                    f"setting loop_mix names widths {unknown}; allowed: 0..{len(checkpoint.net.ladder) - 1}"
                )
            loop = run_loop(
                checkpoint, engine, read_images(settings.loop_images), settings.loop_mix, settings.worker_slots,
                settings.loop_s,
            )  # fmt: skip
            say(loop)
            result["loop"] = asdict(loop)
        results.append(result)
    if settings.json_out is not None:
        settings.json_out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _table(facts: dict[str, object], found: Profile) -> Table:
    """Milliseconds per batch, p50 and p99, one row per queue."""
    title = "{model}: built in {build_s} s, {resident_mib} MiB resident; ms p50 / p99".format(**facts)
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, title_justify="left")
    sizes = sorted({timing.batch for timing in found.timings})
    table.add_column("width")
    for size in sizes:
        table.add_column(f"batch {size}", justify="right", no_wrap=True)
    by_queue: dict[int | None, dict[int, Timing]] = {}
    for timing in found.timings:
        by_queue.setdefault(timing.width, {})[timing.batch] = timing
    for width, row in by_queue.items():
        cells = [f"{t.p50_s * 1e3:.2f} / {t.p99_s * 1e3:.2f}" if (t := row.get(size)) else "" for size in sizes]
        table.add_row("trunk" if width is None else str(width), *cells)
    return table


def console() -> Callable[[object], None]:
    """Prints text and tables to stdout as they are."""
    return Console(highlight=False, markup=False, soft_wrap=True).print
