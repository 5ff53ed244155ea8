"""``slicewise engine``: what the engine takes for whole networks, for the split, for mixed batches, and with the gate.

Every round runs every arm for a block of batches, one after the other on one thread, so that whatever
disturbs the machine disturbs all of them. Prints one JSON document: seconds per batch, per arm and round.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
from pydantic import Field

from models.checkpoint import Checkpoint
from models.export import export_subnet
from models.machine import processor_id
from models.transform import load_pixels, normalise
from service.app import load_checkpoints
from service.engine.base import F32, Engine, Image
from service.engine.graphs import SessionFactory
from service.hosting import build_engine, gate_decision
from service.profiler import read_images
from service.settings import SettingError, Settings

Arm = Callable[[], object]

MIXED = (0, 3, 7, 13)
"""Ladder indices of a mixed batch on a ladder of 14; others are spread alike."""


class EngineSettings(Settings):
    """Measure the engine of one model by itself, on one thread."""

    rounds: int = Field(20, ge=1, description="how often every arm takes its turn")
    block_s: float = Field(0.5, gt=0, description="seconds of each turn")
    images: Path | None = Field(None, description="folder or zip of images for gate against widest; none: left out")
    gate_batch: int = Field(32, ge=1, description="images that are classified together there")


def study(settings: EngineSettings, say: Callable[[str], object]) -> None:
    """Measure the first model of ``settings``; says the result as one line of JSON.

    Raises SettingError when an image does not decode or there is none.
    """
    name, checkpoint = next(iter(load_checkpoints(settings).items()))
    never = threading.Event()
    engine = build_engine(checkpoint, settings, never)
    arms = _network_arms(checkpoint, engine, settings)
    if settings.images is not None:
        arms |= _gate_arms(checkpoint, engine, settings)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for arm in arms.values():
        arm()
    for _ in range(settings.rounds):
        for label, arm in arms.items():
            seconds[label].append(_block(arm, settings.block_s))
    widths = len(checkpoint.net.ladder)
    say(
        json.dumps(
            {
                "model": name, "digest": checkpoint.manifest.digest, "engine": f"{engine.name} {engine.version}",
                "processor": processor_id(), "widest": widths - 1, "mixed": list(mixed_widths(widths)),
                "madds": [record.madds_served for record in checkpoint.manifest.slices],
                "gate_batch": settings.gate_batch, "block_s": settings.block_s, "seconds": seconds,
            }
        )
    )  # fmt: skip


def mixed_widths(widths: int) -> tuple[int, ...]:
    """Four ladder indices from the narrowest to the widest, repeated where the ladder is short."""
    return tuple(round(width * (widths - 1) / MIXED[-1]) for width in MIXED)


def _block(arm: Arm, block_s: float) -> float:
    """Seconds per run, over as many runs as fit."""
    runs, began_s = 0, time.perf_counter()
    while (spent_s := time.perf_counter() - began_s) < block_s:
        arm()
        runs += 1
    return spent_s / runs


def _network_arms(checkpoint: Checkpoint, engine: Engine, settings: Settings) -> dict[str, Arm]:
    """One image, normalised beforehand: the plain graph, the optimised whole graph, and trunk + gate + body."""
    net, widths = checkpoint.net, mixed_widths(len(checkpoint.net.ladder))
    factory = SessionFactory(settings.cache_folder / "graphs", checkpoint.manifest.network_id, processor_id())
    shape = net.input_shape
    pixels = np.random.default_rng(0).integers(0, 256, (shape.height, shape.width, shape.channels), dtype=np.uint8)
    image = normalise(pixels, checkpoint.manifest.input)
    wholes = {width: factory.session(f"whole {width}", partial(export_subnet, net, width)) for width in widths}
    arms: dict[str, Arm] = {
        f"plain {width}": partial(_run, _plain(checkpoint, width), image) for width in (0, widths[-1])
    }
    arms |= {f"whole {width}": partial(_run, session, image) for width, session in wholes.items()}
    arms |= {f"split {width}": partial(_classify, engine, [image], _always(width)) for width in widths}
    arms["mixed"] = partial(_classify, engine, [image] * len(widths), _always(*widths))

    def one_by_one() -> None:
        for width in widths:
            _classify(engine, [image], _always(width))

    def all_wholes() -> None:
        for width in widths:
            _run(wholes[width], image)

    return arms | {"mixed, trunk of 1": one_by_one, "wholes": all_wholes}


def _always(*widths: int) -> Callable[[F32], Sequence[int]]:
    return lambda _: widths


def _plain(checkpoint: Checkpoint, width: int) -> ort.InferenceSession:
    """What a user gets who exports a slice and loads it with one thread and default options."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(export_subnet(checkpoint.net, width), options, providers=["CPUExecutionProvider"])


def _run(session: ort.InferenceSession, image: Image) -> F32:
    logits: F32 = session.run(None, {session.get_inputs()[0].name: image[None]})[0]
    return logits


def _classify(engine: Engine, images: Sequence[Image], chosen: Callable[[F32], Sequence[int]]) -> None:
    """Trunk and gate for all, then one body batch per width that ``chosen`` makes of the gate's logits."""
    features, gate_inputs_NR = engine.trunk(images)
    by_width: dict[int, list[object]] = {}
    for feature, width in zip(features, chosen(engine.gate(gate_inputs_NR)), strict=True):
        by_width.setdefault(int(width), []).append(feature)
    for width, batch in by_width.items():
        engine.body(width, batch)


def _gate_arms(checkpoint: Checkpoint, engine: Engine, settings: EngineSettings) -> dict[str, Arm]:
    """Batches of real images: widths by the trained gate against the widest for all."""
    assert settings.images is not None, "checked by the caller: this is a bug"
    spec, limit = checkpoint.manifest.input, settings.image_limit_pixels
    decoded = [load_pixels(data, spec, limit) for data in read_images(settings.images)]
    if len(decoded) < settings.gate_batch:
        raise SettingError(f"{settings.images} has {len(decoded)} images; needed: gate_batch {settings.gate_batch}")
    decision, widest = gate_decision(checkpoint.manifest, settings), len(checkpoint.net.ladder) - 1

    def batches() -> Iterator[list[Image]]:
        while True:
            for start in range(0, len(decoded) - settings.gate_batch + 1, settings.gate_batch):
                yield list(decoded[start : start + settings.gate_batch])

    gated, forced = batches(), batches()
    return {
        "gate batch": lambda: _classify(engine, next(gated), lambda logits_NG: decision.widths(logits_NG).tolist()),
        "widest batch": lambda: engine.body(widest, engine.trunk(next(forced)).features),
    }
