"""``slicewise profile``: measure a model's slices on this machine, keep the profile, and show it.

With ``--loop-s 10 --loop-images FOLDER`` the model also runs without HTTP, queues and routing: as many
threads as worker slots decode images and run trunk and body one after the other. No server can be
faster; what it loses against this is what serving costs.
"""

from __future__ import annotations

import json
import resource
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode
from rich import box
from rich.console import Console
from rich.table import Table

from models.checkpoint import Checkpoint
from models.transform import load_pixels
from service.app import load_checkpoints
from service.engine.base import Engine
from service.engine.measure import PROBES, Timing
from service.hosting import build_engine, gate_decision
from service.profiling import Profile, keep_profile, measured
from service.settings import SettingError, Settings

MIB = 2**20


class ProfileSettings(Settings):
    """Measure seconds per (trunk | width, batch) of the served models and keep them for ``serve``."""

    measure_limit_s: float = Field(60.0, gt=0, le=3600, description="time to measure each model")
    measure_runs: int = Field(200, ge=PROBES, description="most runs of each batch")
    loop_s: float = Field(0.0, ge=0, description="seconds of the loop without HTTP; 0 = none")
    loop_only: bool = Field(False, description="run the loop and measure nothing else")
    loop_warm_up_s: float = Field(1.0, ge=0, description="seconds of the loop that are not counted")
    loop_images: Path | None = Field(None, description="folder or zip of images for the loop")
    loop_mix: Annotated[dict[int, int], NoDecode] = Field(
        {}, description="images at each width, WIDTH:COUNT,...; the gate's wish when absent"
    )
    json_out: Path | None = Field(None, description="write what was measured to this file")

    @field_validator("loop_mix", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [pair.partition(":") for pair in value.split(",") if pair.strip()]
        return {width.strip(): count.strip() for width, _, count in pairs}

    @model_validator(mode="after")
    def _a_loop_is_whole(self) -> Self:
        if any(width < 0 or count < 1 for width, count in self.loop_mix.items()):
            raise ValueError(f"loop_mix is {self.loop_mix}; allowed: ladder indices, each with at least 1 image")
        if self.loop_s and self.loop_images is None:
            raise ValueError("loop_s needs loop_images, a folder or zip")
        if self.loop_only and not self.loop_s:
            raise ValueError("loop_only needs loop_s, seconds above 0")
        return self


@dataclass(frozen=True, slots=True)
class LoopResult:
    """What the loop did after its warm-up.

    cpu_s                       processor seconds of this process meanwhile.
    decode_cpu_s to body_cpu_s  of them, those that its threads spent inside each stage; decoding includes resizing,
                                the trunk includes normalising, and the gate is next to nothing where a mix decides.
    system_s, page_faults       of this process: processor seconds in the kernel, and minor faults.
    """

    threads: int
    images: int
    seconds: float
    cpu_s: float
    p50_ms: float
    p99_ms: float
    decode_cpu_s: float
    trunk_cpu_s: float
    gate_cpu_s: float
    body_cpu_s: float
    system_s: float
    page_faults: int


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
    checkpoint: Checkpoint, engine: Engine, images: Sequence[bytes], settings: ProfileSettings
) -> LoopResult:  # fmt: skip
    """Decode, trunk and body of one image after the other on every thread, for ``settings.loop_s`` seconds.

    Raises whatever an image or the engine raises.
    """
    spec, wish = checkpoint.manifest.input, gate_decision(checkpoint.manifest, settings).widths
    threads, mix = settings.worker_slots, settings.loop_mix
    warm, stop = threading.Event(), threading.Event()

    def classify(data: bytes, width: int | None) -> tuple[float, ...]:
        """CPU time of the calling thread before and after each of the four stages."""
        began_s = time.thread_time()
        pixels_HWC = load_pixels(data, spec, settings.image_limit_pixels)
        decoded_s = time.thread_time()
        features, gate_inputs = engine.trunk([pixels_HWC])
        trunk_s = time.thread_time()
        chosen = int(wish(engine.gate(gate_inputs))[0]) if width is None else width
        gate_s = time.thread_time()
        engine.body(chosen, [features[0]])
        return began_s, decoded_s, trunk_s, gate_s, time.thread_time()

    def work(number: int) -> list[tuple[float, ...]]:
        """Latency of every counted image, then what ``classify`` read."""
        widths = spread(mix, number) if mix else repeat(None)
        counted = []
        for data, width in zip(islice(cycle(images), number * len(images) // threads, None), widths, strict=False):
            if stop.is_set():
                break
            is_counted, began_s = warm.is_set(), time.perf_counter()
            cpu_marks_s = classify(data, width)
            if is_counted:
                counted.append((time.perf_counter() - began_s, *cpu_marks_s))
        return counted

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(work, number) for number in range(threads)]
        wait(running, settings.loop_warm_up_s, FIRST_EXCEPTION)
        warm.set()
        cpu_s, began_s, before = time.process_time(), time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        wait(running, settings.loop_s, FIRST_EXCEPTION)
        stop.set()
        counted = [image for done in running for image in done.result()]
        seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
        after = resource.getrusage(resource.RUSAGE_SELF)
    every_s = np.array(counted).reshape(-1, 6)
    p50_s, p99_s = np.quantile(every_s[:, 0], (0.5, 0.99)) if counted else (0.0, 0.0)
    decode_s, trunk_s, gate_s, body_s = np.diff(every_s[:, 1:], axis=1).sum(0).tolist()
    return LoopResult(
        threads, len(counted), seconds, cpu_s, float(p50_s) * 1e3, float(p99_s) * 1e3,
        decode_s, trunk_s, gate_s, body_s, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt,
    )  # fmt: skip


def _resident_mib() -> float:
    """Memory of this process that is in use now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * resource.getpagesize() / MIB


def profile(settings: ProfileSettings, say: Callable[[object], None]) -> None:
    """Profile every model of ``settings``, and run its loop; the last line of a loop is its result as JSON.

    Raises SettingError when there are no images, or the mix names a width that the model lacks.
    """
    images = read_images(settings.loop_images) if settings.loop_images else []
    checkpoints = load_checkpoints(settings)
    for name, checkpoint in checkpoints.items():
        unknown = sorted(set(settings.loop_mix) - set(range(len(checkpoint.net.ladder))))
        if unknown:
            last = len(checkpoint.net.ladder) - 1
            raise SettingError(f"setting loop_mix names widths {unknown}; allowed for {name}: 0..{last}")
    results = [_profile_one(checkpoint, images, settings, say) for checkpoint in checkpoints.values()]
    if settings.json_out is not None:
        settings.json_out.write_text(json.dumps(results, indent=1) + "\n")


def _profile_one(
    checkpoint: Checkpoint, images: Sequence[bytes], settings: ProfileSettings, say: Callable[[object], None]
) -> dict[str, object]:
    """Profile one model; a JSON-ready result."""
    before_mib, began_s, never = _resident_mib(), time.monotonic(), threading.Event()
    engine = build_engine(checkpoint, settings, never)
    result: dict[str, object] = {
        "model": checkpoint.manifest.name,
        "build_s": round(time.monotonic() - began_s, 3),
        "resident_mib": round(_resident_mib() - before_mib, 1),
        "parts_mib": {part: round(size / MIB, 2) for part, size in engine.part_bytes.items()},
    }
    if not settings.loop_only:
        found = measured(checkpoint, engine, settings.measure_limit_s, never, settings.measure_runs)
        file = keep_profile(settings.cache_folder / "profiles", found)
        result["timings"] = [asdict(timing) for timing in found.timings]
        say(_table(result, found))
        say(f"MiB of each part: {result['parts_mib']}")
        say(f"kept: {file}" if file else "not kept, see the log")
    if settings.loop_s:
        result["loop"] = asdict(run_loop(checkpoint, engine, images, settings))
        say(json.dumps(result["loop"]))
    return result


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
