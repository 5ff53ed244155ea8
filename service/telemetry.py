"""Every Prometheus series of the service, once, with its meaning.

Base units: seconds, ratios 0..1, MAdds and images as counts. Labels are bounded: a model, a version,
a ladder index (as a string; ``trunk`` before the decision, ``none`` where no width applies), a stage,
a reason. Never a request id or a client's text. The ledger is an identity: the trunk's MAdds are the
rows that passed it times its cost (plus the slimming head for rows whose gate ran); a body's MAdds are
the images that passed it times its cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from service.latency import LiveTimes
from service.request import Budget, Entry, Route, SliceFacts, Timings
from service.tally import Tally

# Dense where the targets of this kind of model lie (5..50 ms), sparse above.
DURATION_BUCKETS_S = (
    0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.036, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10,
)  # fmt: skip
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
SLACK_BUCKETS_S = (-1, -0.25, -0.1, -0.05, -0.025, -0.01, 0, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)


def width_label(width: int | None, absent: str) -> str:
    """A ladder index as a label value; ``absent`` (``trunk`` or ``none``) where there is none."""
    return absent if width is None else str(width)


M = TypeVar("M", bound=MetricWrapperBase)


def child(metric: M, *labels: str) -> M:
    """``metric.labels(*labels)``, remembered. About 30 a request; the library checks each anew, at 0.7 us against 0.2.

    For labels of bounded number only, which all of ours are.
    """
    known: dict[tuple[str, ...], M] = metric.__dict__.setdefault("_slicewise_children", {})
    found = known.get(labels)
    if found is None:
        found = known[labels] = metric.labels(*labels)
    return found


@dataclass(frozen=True, slots=True)
class ModelLabels:
    """The labels that name one hosted model in every series."""

    model: str
    version: str


class Telemetry:
    """All series on one registry; the methods are the only places that touch them."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "slicewise_requests_total", "HTTP requests, one each.", ["route", "code"], registry=registry
        )
        self.in_flight = Gauge(
            "slicewise_in_flight_requests", "Requests accepted and not answered yet.", registry=registry
        )
        self.rejections = Counter(
            "slicewise_rejections_total",
            "Requests answered with an error, and single images of a batch that failed, by error type.",
            ["reason"],
            registry=registry,
        )
        self.budget_requests = Counter(
            "slicewise_budget_requests_total",
            "Requests that stated a budget, by outcome. Attainment = met / (met + late + expired + refused).",
            ["kind", "result"],
            registry=registry,
        )
        self.cache_requests = Counter(
            "slicewise_cache_requests_total",
            "Images by what the answer cache said; error: it is away, and the image was computed.",
            ["result"],
            registry=registry,
        )
        self.store_failures = Counter(
            "slicewise_store_failures_total",
            "Calls to the shared store that failed, or were not made because it is away: find, keep, admit, charge.",
            ["kind"],
            registry=registry,
        )
        self.build_info = Gauge("slicewise_build_info", "1; which build runs.", ["version"], registry=registry)
        self._declare_images()
        self._declare_batches()
        self._declare_model()

    def count_budgets(self, budget: Budget, result: str) -> None:
        """Count one outcome for every kind of budget that the request stated."""
        for kind in budget.kinds():
            child(self.budget_requests, kind, result).inc()

    def _declare_images(self) -> None:
        registry = self.registry
        self.images = Counter(
            "slicewise_images_total",
            "Images answered by computing, per width.",
            ["model", "version", "width"],
            registry=registry,
        )
        self.decisions = Counter(
            "slicewise_width_decisions_total",
            "What the gate wished, what was served, and why they differ.",
            ["model", "version", "gate_width", "served_width", "reason"],
            registry=registry,
        )
        self.madds = Counter(
            "slicewise_madds_total",
            "Served cost of the useful rows that were executed; width none: a trunk row whose body never ran.",
            ["model", "version", "width", "stage"],
            registry=registry,
        )
        self.dropped = Counter(
            "slicewise_dropped_total", "Queued images that were never computed.", ["reason"], registry=registry
        )
        self.request_duration = Histogram(
            "slicewise_request_duration_seconds",
            "Arrival of the last byte to the answer.",
            ["model", "outcome"],
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self.stage_duration = Histogram(
            "slicewise_stage_duration_seconds",
            "Where an image's time went; queue = wait before the trunk + wait in the bucket.",
            ["model", "stage"],
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )

    def _declare_batches(self) -> None:
        registry = self.registry
        self.compute = Counter(
            "slicewise_compute_seconds_total",
            "Worker seconds spent, by width and stage.",
            ["model", "width", "stage"],
            registry=registry,
        )
        self.batch_size = Histogram(
            "slicewise_batch_size", "Images per batch.", ["model", "width"], buckets=BATCH_BUCKETS, registry=registry
        )
        self.batch_duration = Histogram(
            "slicewise_batch_duration_seconds",
            "Seconds per batch on a worker.",
            ["model", "width"],
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self.queue_images = Gauge(
            "slicewise_queue_images", "Images waiting, per queue.", ["model", "width"], registry=registry
        )
        self.queue_capacity = Gauge(
            "slicewise_queue_capacity_images", "Images that may be in work, all queues together.", ["model", "width"],
            registry=registry,
        )  # fmt: skip
        self.slack = Histogram(
            "slicewise_slack_at_dispatch_seconds",
            "Deadline minus dispatch of the batch's most urgent image.",
            ["model"],
            buckets=SLACK_BUCKETS_S,
            registry=registry,
        )

    def _declare_model(self) -> None:
        registry = self.registry
        self.slice_accuracy = Gauge(
            "slicewise_slice_accuracy_ratio",
            "Top-1 of a slice on its test split.",
            ["model", "version", "width"],
            registry=registry,
        )
        self.slice_madds = Gauge(
            "slicewise_slice_madds", "Served MAdds of a slice.", ["model", "version", "width"], registry=registry
        )
        self.slice_latency = Gauge(
            "slicewise_slice_latency_seconds",
            "The latency table in force, corrected by what batches took.",
            ["model", "width", "batch"],
            registry=registry,
        )
        self.slo_target = Gauge(
            "slicewise_slo_target_ratio", "Target of the SLO attainment.", ["model"], registry=registry
        )
        self.model_info = Gauge(
            "slicewise_model_info",
            "1; which checkpoint is hosted, and on what.",
            ["model", "version", "engine", "device", "digest"],
            registry=registry,
        )


class ModelTelemetry:
    """One hosted model's view of the series."""

    def __init__(self, telemetry: Telemetry, labels: ModelLabels, slices: Sequence[SliceFacts]) -> None:
        self.telemetry, self.labels, self.slices, self.tally = telemetry, labels, slices, Tally()
        self._trunk_madds = 0
        self._slimming_madds = slices[0].madds_served - slices[0].madds_published

    def describe(self, times: LiveTimes, trunk_madds: int, capacity_images: int, slo_target: float) -> None:
        """Publish what is fixed once the model is warm."""
        t, model, version = self.telemetry, self.labels.model, self.labels.version
        self._trunk_madds = trunk_madds
        for facts in self.slices:
            t.slice_madds.labels(model, version, str(facts.width)).set(facts.madds_served)
            if facts.accuracy is not None:
                t.slice_accuracy.labels(model, version, str(facts.width)).set(facts.accuracy)
        for width, batch in times.table.seconds_by_batch:
            gauge = t.slice_latency.labels(model, width_label(width, "trunk"), str(batch))
            gauge.set_function(partial(times.seconds, width, batch))
        t.queue_capacity.labels(model, "trunk").set(capacity_images)
        t.slo_target.labels(model).set(slo_target)

    def withdraw(self) -> None:
        """Remove the gauges of this model, which is hosted no more; counters stay."""
        t = self.telemetry
        gauges = (
            t.slice_madds, t.slice_accuracy, t.slice_latency, t.queue_images, t.queue_capacity, t.slo_target,
            t.model_info,
        )  # fmt: skip
        for gauge in gauges:
            gauge.remove_by_labels({"model": self.labels.model})

    def watch_queues(self, waiting: Callable[[], Mapping[int | None, int]]) -> None:
        """Ask for the length of every queue when the series are read, instead of being told at every change."""

        def images(width: int | None) -> float:
            return waiting()[width]

        for width in waiting():
            gauge = self.telemetry.queue_images.labels(self.labels.model, width_label(width, "trunk"))
            gauge.set_function(partial(images, width))

    def batch_dispatched(self, entries: Sequence[Entry], now_s: float) -> None:
        deadlines = [entry.deadline_s for entry in entries]
        if min(deadlines) != float("inf"):
            child(self.telemetry.slack, self.labels.model).observe(min(deadlines) - now_s)

    def batch_done(self, width: int | None, rows: int, seconds: float) -> None:
        t, model, label = self.telemetry, self.labels.model, width_label(width, "trunk")
        stage = "trunk" if width is None else "body"
        child(t.batch_size, model, label).observe(rows)
        child(t.batch_duration, model, label).observe(seconds)
        child(t.compute, model, width_label(width, "none"), stage).inc(seconds)
        if width is not None:
            self.tally.body_done(rows, seconds)

    def trunk_row(self, width: int | None, gate_ran: bool) -> int:
        """Account one trunk row when its fate is known: the width its body ran at, or None. Returns its MAdds."""
        cost = self._trunk_madds + (self._slimming_madds if gate_ran else 0)
        model, version = self.labels.model, self.labels.version
        child(self.telemetry.madds, model, version, width_label(width, "none"), "trunk").inc(cost)
        return cost

    def body_row(self, route: Route) -> int:
        """Account one image whose body ran. Returns what it cost in all, in MAdds."""
        trunk_cost = self.trunk_row(route.width, route.gate_width is not None)
        model, version, width = self.labels.model, self.labels.version, str(route.width)
        cost = self.slices[route.width].madds_published - self._trunk_madds
        child(self.telemetry.madds, model, version, width, "body").inc(cost)
        return trunk_cost + cost

    def answered(self, route: Route, timings: Timings) -> None:
        """Account one image that was answered by computing."""
        t, model, version = self.telemetry, self.labels.model, self.labels.version
        gate_width = width_label(route.gate_width, "none")
        self.tally.answered(timings, time.time())
        child(t.images, model, version, str(route.width)).inc()
        child(t.decisions, model, version, gate_width, str(route.width), route.reason.value).inc()
        for stage, seconds in (
            ("decode", timings.decode_s),
            ("queue", timings.queue_s),
            ("trunk", timings.trunk_s),
            ("body", timings.body_s),
        ):
            child(t.stage_duration, model, stage).observe(seconds)

    def encoded(self, seconds: float) -> None:
        """Account the time that rendering an answer took."""
        child(self.telemetry.stage_duration, self.labels.model, "encode").observe(seconds)
        self.tally.encode.add(seconds)
