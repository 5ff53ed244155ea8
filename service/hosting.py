"""A hosted model: its checkpoint, its engine with a latency table, and its batcher."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import structlog

from models.checkpoint import Checkpoint, Manifest
from service.admission import admit, retry_after_s
from service.batcher import Batcher
from service.engine.base import Engine
from service.engine.measure import measure
from service.engine.onnx import OnnxEngine
from service.latency import LatencyTable
from service.request import Entry, Route, SliceFacts
from service.routing import route
from service.scheduler import Scheduler
from service.settings import Settings
from service.telemetry import ModelLabels, ModelTelemetry, Telemetry

log = structlog.get_logger()


def slice_facts(manifest: Manifest) -> tuple[SliceFacts, ...]:
    """What routing needs of each slice, in ladder order."""
    return tuple(
        SliceFacts(record.width, record.madds_published, record.madds_served, record.test_accuracy)
        for record in manifest.slices
    )


@dataclass(frozen=True, slots=True)
class WarmEngine:
    """An engine that has run every slice once, and what that took."""

    engine: Engine
    table: LatencyTable


def warm_up(checkpoint: Checkpoint, settings: Settings, cancelled: threading.Event) -> WarmEngine:
    """Build every slice and measure the latency table; blocks for seconds, called on a thread.

    Raises InterruptedError soon after ``cancelled`` is set.
    """
    engine = OnnxEngine(checkpoint.net, settings.worker_slots)
    shape = checkpoint.net.input_shape
    table = measure(
        engine, len(checkpoint.net.ladder), (shape.channels, shape.height, shape.width),
        settings.profile_limit_s / len(settings.model), cancelled,
    )  # fmt: skip
    return WarmEngine(engine, table)


class HostedModel:
    """One model in service. Used on the event loop only."""

    def __init__(self, manifest: Manifest, warm: WarmEngine, settings: Settings, telemetry: Telemetry) -> None:
        self.manifest, self.table = manifest, warm.table
        self.slices = slice_facts(manifest)
        self.workers, self.capacity = warm.engine.workers, settings.queue_capacity_images
        self.admitted = 0
        self.telemetry = ModelTelemetry(telemetry, ModelLabels(manifest.name, str(manifest.version)), self.slices)
        trunk_madds = manifest.slices[0].trunk_madds
        self.telemetry.describe(warm.table, trunk_madds, self.capacity, settings.slo_target_ratio)
        telemetry.model_info.labels(
            manifest.name, str(manifest.version), warm.engine.name, warm.engine.device, manifest.digest
        ).set(1)
        limits: dict[int | None, int] = {None: warm.table.best_batch(None)}
        limits |= {facts.width: warm.table.best_batch(facts.width) for facts in self.slices}
        self.batcher = Batcher(warm.engine, Scheduler(limits), self._decide, self.telemetry, self.capacity)

    @property
    def narrowest_s(self) -> float:
        """Seconds of one image through trunk and narrowest body, alone."""
        return self.table.image_seconds(0)

    def retry_after_s(self) -> float:
        """When a refused client may try again, predicted from the backlog."""
        return retry_after_s(self.admitted, self.narrowest_s, self.workers)

    def check_room(self) -> None:
        """Raise QueueFullError when not even one image more would be admitted."""
        admit(self.admitted, self.capacity, 1, self.retry_after_s())

    def take_places(self, images: int) -> None:
        """Admit ``images`` more, or raise QueueFullError; whoever calls gives them back."""
        admit(self.admitted, self.capacity, images, self.retry_after_s())
        self.admitted += images

    def give_back_places(self, images: int) -> None:
        self.admitted -= images

    def _decide(self, entry: Entry, choice: int | None, now_s: float) -> Route:
        """Routing after the trunk: the gate's wish, inside the window, narrowed to fit the deadline."""
        gate_width = None if choice is None else self.manifest.gate.choices[choice]
        wish = entry.window.forced if gate_width is None else gate_width
        assert wish is not None, "the gate runs unless a slice is forced: this is a bug"

        def fits(width: int) -> bool:
            return entry.deadline_s == math.inf or now_s + self.table.seconds(width, 1) <= entry.deadline_s

        return route(entry.window, gate_width, wish, fits)
