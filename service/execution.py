"""One batch on a worker thread: trunk, gate and body, timed. Touches the engine and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from service.engine.base import F32, Engine, Feature, TrunkResult
from service.request import Batch, Look, Step

Looks = Callable[[F32], list[Look]]
"""Gate logits [N, G] -> what to remember of each image; called on worker threads, for a batch at once."""


@dataclass(frozen=True, slots=True)
class AfterTrunk:
    """An entry's payload between trunk and body."""

    feature: Feature
    gate_logits_G: F32


@dataclass(eq=False, slots=True)
class Execution:
    """A batch that a worker has: filled in there, one step after the other, and read once it is over.

    given_s       monotonic, when a worker was to take it up; began_s: when it did; ended_s: when it was done with it.
    cpu_s         of that, on a core.
    trunk_s       seconds of trunk, gate and looks, 0 as long as the trunk has not run. body_s: of the body.
    seen          per entry, of a trunk batch. logits_NK: of a batch with a body.
    error         what ended it early.
    """

    batch: Batch
    given_s: float = 0.0
    began_s: float = 0.0
    ended_s: float = 0.0
    cpu_s: float = 0.0
    trunk_s: float = 0.0
    body_s: float = 0.0
    seen: list[tuple[AfterTrunk, Look]] = field(default_factory=list)
    logits_NK: F32 = field(default_factory=lambda: np.empty((0, 0), np.float32))
    error: Exception | None = None

    def run(self, engine: Engine, looks: Looks) -> None:
        """Compute what the batch's step asks for. Keeps what the engine raises as ``error``."""
        self.began_s, began_cpu_s = time.monotonic(), time.thread_time()
        try:
            if self.batch.step is Step.TRUNK:
                self._trunk_and_gate(engine, looks)
            elif self.batch.step is Step.BODY:
                self._body(engine, [entry.payload.feature for entry in self.batch.entries])
            else:
                self._body(engine, self._trunk(engine).features)
        except Exception as error:  # noqa: BLE001  # the engine is foreign code; who reads the batch raises it
            self.error = error
        self.ended_s, self.cpu_s = time.monotonic(), time.thread_time() - began_cpu_s

    def _trunk(self, engine: Engine) -> TrunkResult:
        began_s = time.perf_counter()
        result = engine.trunk([entry.payload for entry in self.batch.entries])
        self.trunk_s = time.perf_counter() - began_s
        return result

    def _trunk_and_gate(self, engine: Engine, looks: Looks) -> None:
        began_s = time.perf_counter()
        features, gate_inputs_NR = self._trunk(engine)
        logits_NG = engine.gate(gate_inputs_NR)
        rows = zip(features, logits_NG, looks(logits_NG), strict=True)
        self.seen = [(AfterTrunk(feature, logits_G), look) for feature, logits_G, look in rows]
        self.trunk_s = time.perf_counter() - began_s

    def _body(self, engine: Engine, features: Sequence[Feature]) -> None:
        width = self.batch.width
        assert width is not None, "a batch with a body has a width: this is a bug"
        began_s = time.perf_counter()
        self.logits_NK = engine.body(width, features)
        self.body_s = time.perf_counter() - began_s
