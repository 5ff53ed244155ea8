"""A hosted model: its checkpoint, its engine with a latency table, and its batcher."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from importlib.metadata import version

import structlog
import torch

from models.checkpoint import Checkpoint, Manifest
from models.decision import GateDecision
from models.machine import processor_id
from service import caching
from service.admission import check_room, refuse_deadline, retry_after_s
from service.batcher import Batcher
from service.engine.base import Engine
from service.engine.graphs import SessionFactory
from service.engine.onnx import OnnxEngine
from service.engine.torch_engine import TorchEngine
from service.execution import Looks
from service.latency import Delay, LatencyTable, LiveTimes, Overhead
from service.policies import F32, FREE, ON_CPU, Asking, Curve, Policy, check_policy_name, policy_named
from service.priority import own_cores, worker_start
from service.profiling import ProfileKey, forget_unused, keep_profile, kept_profile, measured, run_once
from service.request import Budget, Look, Route, SliceFacts, Timings, Window
from service.scheduler import Scheduler
from service.settings import SettingError, Settings, usable_cores
from service.telemetry import ModelLabels, ModelTelemetry, Telemetry

log = structlog.get_logger()

AHEAD_FROM_S = 1e-3
"""Seconds of an image at the narrowest slice. Between two networks that were measured, 0.4 and 3 ms."""


def slice_facts(manifest: Manifest) -> tuple[SliceFacts, ...]:
    """What routing needs of each slice, in ladder order."""
    return tuple(
        SliceFacts(record.width, record.madds_published, record.madds_served, record.test_accuracy)
        for record in manifest.slices
    )


def gate_decision(manifest: Manifest, settings: Settings) -> GateDecision:
    """The gate's rule at the operating point that the settings name, or at the model's default one.

    Raises SettingError, with the model and what it allows, when the model has no such point.
    """
    try:
        return manifest.decision(settings.operating_point)
    except ValueError as error:
        raise SettingError(f"setting operating_point: {error}") from error


def curve_of(manifest: Manifest, decision: GateDecision) -> Curve | None:
    """What the hold-out says of a model's answers at the operating point in use; None where it was not measured."""
    points = manifest.gate.operating_points
    accuracies = [next((m.value for m in s.accuracy if m.split == "hold-out"), None) for s in manifest.slices]
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    if not points or len(known) < len(accuracies):
        return None
    share = decision.lambda_ / decision.madds[-1]
    return Curve(
        tuple(accuracy - share * madds for accuracy, madds in zip(known, decision.madds, strict=True)),
        tuple((point.accuracy - share * point.madds, point.shares) for point in points),
        manifest.has_exit,
    )


def check_policy(manifest: Manifest, settings: Settings) -> None:
    """Raise SettingError, with what is allowed, unless the settings name a policy that suits the model."""
    try:
        check_policy_name(settings.policy, len(manifest.slices))
    except ValueError as error:
        raise SettingError(f"setting policy, model {manifest.name}: {error}") from error


@dataclass(frozen=True, slots=True)
class WarmEngine:
    """An engine that has run every slice once, and what that took."""

    engine: Engine
    table: LatencyTable


def chosen_device(settings: Settings) -> str:
    """Where ``settings`` put the models: "cpu", "cuda" or "cuda:N".

    Raises SettingError for a device that is not there, and for an engine that cannot use it.
    """
    gpus = torch.cuda.device_count()
    device = settings.device if settings.device != "auto" else "cuda" if gpus else "cpu"
    if device != "cpu" and int(device.partition(":")[2] or 0) >= gpus:
        raise SettingError(f"setting device is {device}; PyTorch finds {gpus} CUDA devices")
    if device != "cpu" and settings.engine == "onnxruntime":
        raise SettingError(f"setting engine is onnxruntime, device {device}; allowed there: auto, torch")
    return device


def build_engine(checkpoint: Checkpoint, settings: Settings, cancelled: threading.Event) -> Engine:
    """Every slice on the device, from kept graphs where there are any; blocks. Errors as ``chosen_device``.

    Raises InterruptedError between two parts once ``cancelled`` is set.
    """
    device = chosen_device(settings)
    if device != "cpu" or settings.engine == "torch":
        return TorchEngine(checkpoint, settings.worker_slots if device == "cpu" else settings.workers or 1, device)
    folder, network = settings.cache_folder / "graphs", checkpoint.manifest.network_id
    factory = SessionFactory(folder, network, processor_id(), cancelled=cancelled)
    return OnnxEngine(checkpoint, settings.worker_slots, factory)


def warm_up(checkpoint: Checkpoint, settings: Settings, cancelled: threading.Event) -> WarmEngine:
    """Build every slice, run each once, and take its kept profile or measure one; called on a thread.

    Raises InterruptedError soon after ``cancelled`` is set.
    """
    engine = build_engine(checkpoint, settings, cancelled)
    folder, net = settings.cache_folder / "profiles", checkpoint.net
    profile = kept_profile(folder, ProfileKey.of(checkpoint.manifest.network_id, engine), len(net.ladder))
    for kept in ("graphs", "profiles"):  # what is used now has been touched
        forget_unused(settings.cache_folder / kept)
    if profile is None:
        limit_s = settings.profile_limit_s / len(settings.model)
        profile = measured(checkpoint, engine, limit_s, cancelled)
        if profile.is_steady:
            keep_profile(folder, profile)
    else:
        run_once(engine, checkpoint, profile.timings, cancelled)
    return WarmEngine(engine, profile.table())


@dataclass(frozen=True, slots=True)
class Ahead:
    """What was agreed with an image at the door.

    place       in the schedule. due_s: when the schedule wants it done.
    done_by_s   when its batch has to be done for the answer to leave by deadline_s; both inf without a deadline.
    """

    place: int
    due_s: float
    done_by_s: float
    deadline_s: float


class HostedModel:
    """One model in service. Used on the event loop only.

    operating_point  index of the one in use; None where the greatest gate logit wins.
    process          what images cost this process beside their batches.
    worker_cores     the core of each worker; empty where they run on any.

    Raises SettingError when the model has no such operating point.
    """

    def __init__(
        self, manifest: Manifest, warm: WarmEngine, settings: Settings, telemetry: Telemetry, process: Overhead
    ) -> None:
        self.manifest, self.table = manifest, warm.table
        self.slices = slice_facts(manifest)
        default = manifest.gate.default_point
        self.operating_point = default if settings.operating_point is None else settings.operating_point
        self.cache_scope = caching.scope(
            manifest.digest, manifest.to_json(), self.operating_point, version("slicewise")
        )
        self.workers, self.capacity = warm.engine.workers, settings.queue_capacity_images
        self.admitted = 0
        self.telemetry = ModelTelemetry(telemetry, ModelLabels(manifest.name, str(manifest.version)), self.slices)
        device = warm.engine.device
        times = LiveTimes(warm.table, process if takes_every_core(warm.engine) else None)
        trunk_madds = manifest.slices[0].trunk_madds
        self.telemetry.describe(times, trunk_madds, self.capacity, settings.slo_target_ratio)
        telemetry.model_info.labels(
            manifest.name, str(manifest.version), warm.engine.name, device, manifest.digest
        ).set(1)
        decision = gate_decision(manifest, settings)
        policy = policy_named(
            settings.policy, manifest.gate.choices, times, curve_of(manifest, decision), asking_on(device)
        )
        self.default_slo_s = settings.default_slo_ms / 1e3
        self._scheduler = Scheduler(policy, times, self.workers, has_exit=manifest.has_exit)
        self._lag, self._process = Delay(), process
        looks = looks_of(policy, decision)
        self.worker_cores = self._cores(settings) if device == "cpu" else []
        self.batcher = Batcher(
            warm.engine, self._scheduler, looks, self.telemetry, process, self.capacity,
            worker_start(settings.worker_priority, self.worker_cores), batches_ahead(device, self.narrowest_s),
        )  # fmt: skip

    @property
    def narrowest_s(self) -> float:
        """Seconds of one image through trunk and narrowest body, alone."""
        return self.table.image_seconds(0)

    def _cores(self, settings: Settings) -> list[int]:
        is_alone = len(settings.model) == 1 and settings.model_control == "none"
        return own_cores(self.workers, settings.pin_workers, settings.worker_priority, self.narrowest_s, is_alone)

    def retry_after_s(self) -> float:
        """When a refused client may try again, predicted from the backlog."""
        return retry_after_s(self.admitted, self.narrowest_s, self.workers)

    def check_room(self, urgency: int) -> None:
        """Raise QueueFullError when not even one image more of this urgency would be admitted."""
        if self.admitted >= self.capacity and not self._scheduler.has_less_urgent(urgency):
            check_room(self.admitted, self.capacity, 1, self.retry_after_s())

    def take_places(self, images: int, urgency: int) -> None:
        """Admit ``images`` more, or raise QueueFullError; whoever calls gives them back.

        Less urgent images that wait are refused for more urgent ones. Their places are free as soon as their
        callers have been told, a moment later, and are not waited for.
        """
        missing = self.admitted + images - self.capacity
        if missing > 0 and not self.batcher.shed(urgency, missing):
            check_room(self.admitted, self.capacity, images, self.retry_after_s())
        self.admitted += images

    def give_back_places(self, images: int) -> None:
        self.admitted -= images

    def begun(self, arrived_s: float, now_s: float) -> None:
        """A request whose last byte was there at ``arrived_s`` is looked at now."""
        self._scheduler.begun(now_s, now_s - arrived_s)

    def expect(self, budget: Budget, window: Window, arrived_s: float, now_s: float) -> Ahead:
        """Admit one image to the schedule; it is pushed there, or ``forget`` is called.

        Raises DeadlineExceededError, outcome ``refused``, when it cannot be in time even at its narrowest
        slice, or only at the cost of images that are as urgent and were promised to be in time.
        """
        deadline_s = budget.deadline_s(arrived_s)
        lag_s = self._lag.allowance_s(now_s)
        done_by_s = deadline_s - lag_s
        if not self.batcher.make_room(now_s, done_by_s, window, budget.urgency):
            finish_s = self._scheduler.finish_s(now_s, done_by_s, window) + lag_s
            refuse_deadline(now_s, deadline_s, finish_s, window, len(self._scheduler))
        due_s = min(done_by_s, arrived_s + self.default_slo_s)
        place = self._scheduler.expect(now_s, due_s, deadline_s < math.inf, window)
        return Ahead(place, due_s, done_by_s, deadline_s)

    def answered(self, route: Route, timings: Timings, done_s: float, now_s: float) -> None:
        """Account an image that is answered now, by computing; its batch was done at ``done_s``."""
        self._lag.learn(now_s - done_s, now_s)
        self.telemetry.answered(route, timings)

    def turned_away(self) -> None:
        """Account an image that was not answered."""
        self._process.turned_away()

    def forget(self, ahead: Ahead) -> None:
        """An expected image will not come."""
        self._scheduler.forget(ahead.place)


def asking_on(device: str) -> Asking:
    """What asking the gate costs where the engine runs."""
    return ON_CPU if device == "cpu" else FREE


def batches_ahead(device: str, image_s: float) -> int:
    """How many batches wait ready-made for the next free worker, who then need not wait for the event loop.

    image_s  seconds of one image through trunk and narrowest body, alone.

    Whoever is in such a batch is bound early, to a width and to a batch that nobody can join any more. Where images
    take no longer than their way through the event loop, that costs more than it saves (docs/adr/0020); on a GPU what
    waits had better become a larger batch.
    """
    return int(device == "cpu" and image_s >= AHEAD_FROM_S)


def takes_every_core(engine: Engine) -> bool:
    """Whether what images cost around their batches is taken from the workers: no core is left for it beside them."""
    return engine.device == "cpu" and engine.workers >= usable_cores()


def looks_of(policy: Policy, decision: GateDecision) -> Looks:
    """What the policy remembers of images, from the gate's logits."""

    def looks(gate_logits_NG: F32) -> list[Look]:
        utility_NG = decision.utility(gate_logits_NG)
        wish_N, best_N = decision.widths_of(utility_NG), decision.best_of(utility_NG)
        return policy.looks(decision.worth_of(utility_NG), wish_N, best_N)

    return looks
