"""An engine that a test can hold up, and a batcher around it."""

import asyncio
import math
import threading
import time

import numpy as np

from service.batcher import Batcher
from service.engine.base import TrunkResult
from service.latency import LatencyTable, LiveTimes, Overhead
from service.policies import Gate
from service.priority import worker_start
from service.request import SliceFacts, Window
from service.scheduler import Scheduler
from service.telemetry import ModelLabels, ModelTelemetry, Telemetry
from service.tickets import Order

SLICES = (SliceFacts(0, 100, 110, None), SliceFacts(1, 200, 210, None))
TRUNK_MADDS = 60


class FakeEngine:
    """Doubles its input. An image is [value]; its gate wishes width 1 for odd values.

    ``hold`` stops the workers at the next call until it is set again; a value in ``poison`` fails the
    batch that it is in.
    """

    name, device, has_exit = "fake", "cpu", False

    def __init__(self, workers=1):
        self.workers = workers
        self.hold = threading.Event()
        self.hold.set()
        self.poison = set()
        self.trunk_batches, self.body_batches = [], []

    def trunk(self, images):
        assert self.hold.wait(10)
        self.trunk_batches.append([i[0] for i in images])
        if self.poison & set(self.trunk_batches[-1]):
            raise RuntimeError("poisoned trunk")
        return TrunkResult(list(images), np.stack(images))

    def gate(self, inputs):
        return np.stack([1 - inputs[:, 0] % 2, inputs[:, 0] % 2], axis=1)

    def body(self, width, features):
        assert self.hold.wait(10)
        self.body_batches.append((width, [f[0] for f in features]))
        if self.poison & {-v for v in self.body_batches[-1][1]}:
            raise RuntimeError("poisoned body")
        return np.stack(features) * 2


def table(limit):
    """Batches of up to ``limit`` images cost no more than one image."""
    return LatencyTable({(width, size): 1e-4 for width in (None, 0, 1) for size in {1, limit}})


class Harness:
    def __init__(self, engine, limit=4, capacity=100, wish=lambda logits_NG: logits_NG.argmax(1), start=None):
        self.telemetry = Telemetry()
        model = ModelTelemetry(self.telemetry, ModelLabels("m", "1"), SLICES)
        model._trunk_madds = TRUNK_MADDS  # what describe() takes from the manifest
        self.engine, self.overhead = engine, Overhead()
        policy = Gate()
        self.scheduler = Scheduler(policy, LiveTimes(table(limit)), engine.workers, has_exit=engine.has_exit)

        def looks(logits_NG):
            wish_N = wish(logits_NG)
            return policy.looks(logits_NG, wish_N, wish_N)

        start = start or worker_start("low")
        self.batcher = Batcher(engine, self.scheduler, looks, model, self.overhead, capacity, start)

    def submit(self, value, *, forced=None, least=0, deadline_s=math.inf, done_by_s=None, urgency=3, spend=None):
        now_s, window = time.monotonic(), Window(least, 1, forced)
        done_by_s = deadline_s if done_by_s is None else done_by_s
        due_s = min(done_by_s, now_s + 1)
        place = self.scheduler.expect(now_s, due_s, deadline_s < math.inf, window)
        pixels = np.array([value], np.float32)
        order = Order(pixels, window, now_s, due_s, done_by_s, deadline_s, urgency, place, spend)
        return asyncio.ensure_future(self.batcher.submit(order))

    def metric(self, name, **labels):
        return self.telemetry.registry.get_sample_value(name, labels) or 0


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)
