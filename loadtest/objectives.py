"""PURE: what a run has to reach, as text, and whether it did."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from loadtest.outcomes import NUMBERS, Figures
from loadtest.results import Side

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_OBJECTIVE = re.compile(
    rf"(?P<figure>[a-z0-9_]+)(?:@(?P<window>{_NUMBER}:{_NUMBER}))?(?P<sign>>=|<=)(?P<target>{_NUMBER})", re.ASCII
)
_WINDOW = re.compile(rf"(?P<start>{_NUMBER}):(?P<end>{_NUMBER})", re.ASCII)
_SIDES = {">=": Side.AT_LEAST, "<=": Side.AT_MOST}
_SIGNS = {side: sign for sign, side in _SIDES.items()}


@dataclass(frozen=True, slots=True)
class Window:
    """An interval [start_s, end_s) of the trace."""

    start_s: float
    end_s: float

    def __str__(self) -> str:
        return f"{_shortest(self.start_s)}:{_shortest(self.end_s)}"


@dataclass(frozen=True, slots=True)
class Objective:
    """A bound on one figure, of the whole run or of a window of it."""

    figure: str
    side: Side
    target: float
    window: Window | None = None

    def __str__(self) -> str:
        where = f"@{self.window}" if self.window else ""
        return f"{self.figure}{where}{_SIGNS[self.side]}{_shortest(self.target)}"


@dataclass(frozen=True, slots=True)
class Finding:
    """An objective as text, what was measured for it, and whether that reaches it; nothing measured does not."""

    objective: str
    value: float | None
    met: bool


def parse_window(text: str) -> Window:
    """``FROM:TO`` in seconds of the trace. Raises ValueError with this grammar."""
    found = _WINDOW.fullmatch(text)
    window = Window(float(found["start"]), float(found["end"])) if found else None
    if window is None or not window.start_s < window.end_s < math.inf:
        raise ValueError(f"window is {text!r}; allowed: FROM:TO in seconds of the trace, FROM below TO, such as 61:62")
    return window


def parse_objective(text: str) -> Objective:
    """``attainment>=0.99``, ``p99_ms<=36``, ``attainment@61:62>=0.9``. Raises ValueError with grammar and figures."""
    found = _OBJECTIVE.fullmatch(text)
    if not found or found["figure"] not in NUMBERS or math.isinf(float(found["target"])):
        raise ValueError(
            f"objective is {text!r}; allowed: FIGURE[@FROM:TO]>=NUMBER or FIGURE[@FROM:TO]<=NUMBER, without spaces, "
            f"with one of the figures {', '.join(NUMBERS)}"
        )
    window = parse_window(found["window"]) if found["window"] else None
    return Objective(found["figure"], _SIDES[found["sign"]], float(found["target"]), window)


def judge(objective: Objective, figures_of: Callable[[Window | None], Figures]) -> Finding:
    """Hold the objective against the figures of its window, or of the whole run for None."""
    value: float | None = getattr(figures_of(objective.window), objective.figure)
    if value is None:
        return Finding(str(objective), None, False)
    met = value >= objective.target if objective.side is Side.AT_LEAST else value <= objective.target
    return Finding(str(objective), value, met)


def _shortest(value: float) -> str:
    """The number with all its digits and without an exponent."""
    return f"{Decimal(repr(value)):f}".removesuffix(".0")
