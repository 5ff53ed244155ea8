"""PURE: what a server shows of itself: its series, and what it holds on to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_SAMPLE = re.compile(r"^(\w+)(?:\{([^}]*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Metrics:
    """One reading of /metrics: (name, labels, value) each."""

    samples: tuple[tuple[str, Mapping[str, str], float], ...]

    @staticmethod
    def parse(text: str) -> Metrics:
        return Metrics(
            tuple((name, dict(_LABEL.findall(labels)), float(value)) for name, labels, value in _SAMPLE.findall(text))
        )

    def total(self, name: str, **labels: str) -> float:
        """Sum of a series over every label that is not given."""
        wanted = labels.items()
        return sum(value for each, found, value in self.samples if each == name and wanted <= found.items())


@dataclass(frozen=True, slots=True)
class State:
    """What a server holds on to.

    resident_bytes  of all its processes. descriptors: open ones. queued: images in its queues.
    in_flight       requests accepted and not answered, but the one that asked.
    """

    resident_bytes: int
    descriptors: int
    queued: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment: s from the start of the watch, bytes and open descriptors of the server."""

    at_s: float
    resident_bytes: int
    descriptors: int
