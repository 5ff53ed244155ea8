"""PURE: a step in the traffic, and deadlines of every length: what is asked of the service, and whether it held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loadtest.figures import percentile
from loadtest.mix import Mix
from loadtest.outcomes import Figures
from loadtest.policy_plan import Capacity

REST_SHARE, STEP_SHARE = 0.3, 1.5
"""Of C0: the rate before and after the step, and in it."""
STEP_FROM_S, STEP_TO_S, STEP_TRACE_S = 3.0, 6.0, 9.0
STEP_TAUS = 10
RECOVERED_S = (STEP_TO_S + 1, STEP_TO_S + 2)
"""By when the service has to be itself again: the second second after the step back."""
RECOVERED_SHARE = 0.99
BUDGETS_SHARE, BUDGETS_REQUESTS = 0.7, 10_000
BUDGET_TAUS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 30, 40, 60)
IN_TIME_SHARE, WRONGLY_SHARE, MARGIN_RATIO = 0.98, 0.05, 1.3
"""Of those let in, so many are in time; of those refused, at most so many had a budget beyond this multiple of
the time that the twin predicts."""
SCHEDULER_BAR_US = 20.0
"""Per image, with ten thousand waiting."""
DELAY_ROUNDS, DELAY_BAR_MS = 5, 3.0
"""The 99th percentile of the event loop's delay at saturation, above that beside as many busy threads."""


@dataclass(frozen=True, slots=True)
class Delays:
    """Milliseconds to an answer that takes nothing: beside busy threads alone, and of a service at saturation."""

    floor_ms: tuple[float, ...]
    service_ms: tuple[float, ...]

    @property
    def above_ms(self) -> float:
        return percentile(self.service_ms, 99) - percentile(self.floor_ms, 99)


@dataclass(frozen=True, slots=True)
class Refusals:
    """Of requests with budgets of every length.

    wrongly  refused with a budget beyond ``MARGIN_RATIO`` of what was predicted.
    """

    accepted: int
    in_time: int
    refused: int
    wrongly: int

    @property
    def in_time_share(self) -> float:
        return self.in_time / self.accepted if self.accepted else 1.0

    @property
    def wrongly_share(self) -> float:
        return self.wrongly / self.refused if self.refused else 0.0

    @property
    def held(self) -> bool:
        return self.in_time_share >= IN_TIME_SHARE and self.wrongly_share <= WRONGLY_SHARE


@dataclass(frozen=True, slots=True)
class Findings:
    """Of one study.

    after      (met, requests) of all steps, of the second that is judged.
    scheduler  what ``slicewise scheduler`` printed.
    """

    after: tuple[int, int]
    refusals: Refusals
    scheduler: Mapping[str, Any]
    delays: Delays


def step_budget(capacity: Capacity) -> Mix:
    """The one Latency-Budget of the step's requests."""
    return Mix.parse(f"Latency-Budget={round(STEP_TAUS * capacity.tau0_ms, 1)}ms:1")


def budgets(capacity: Capacity) -> Mix:
    """Latency-Budgets from one image's time to many times it, each as often as the others."""
    return Mix.parse("Latency-Budget=" + ",".join(f"{round(taus * capacity.tau0_ms, 1)}ms:1" for taus in BUDGET_TAUS))


def recovered(seconds: Iterable[Figures]) -> tuple[int, int]:
    """(met, all but the infeasible) of the requests due in ``RECOVERED_S``, over the seconds of any number of runs."""
    met = requests = 0
    for figures in seconds:
        if RECOVERED_S[0] <= figures.start_s and figures.end_s <= RECOVERED_S[1]:
            met += figures.met
            requests += figures.requests - figures.infeasible
    return met, requests


def refusals(requests: Iterable[Mapping[str, str]], twin: Iterable[Mapping[str, str]]) -> Refusals:
    """Live requests against what the twin says of the same arrivals; rows as both commands write them.

    The twin's finish of an arrival that it served counts as its prediction. Raises ValueError when the two are not of
    one trace.
    """
    predicted_ms = {_arrival(row): 1e3 * (_predicted_s(row) - float(row["at_s"])) for row in twin}
    accepted = in_time = refused = wrongly = 0
    for row in requests:
        arrival = _arrival(row)
        if arrival not in predicted_ms:
            raise ValueError(f"request at {row['at_s']} s is not in the twin's trace")
        if row["fate"] == "refused":
            refused += 1
            wrongly += float(row["limit_ms"]) > MARGIN_RATIO * predicted_ms[arrival]
        else:
            accepted += 1
            in_time += row["fate"] == "met"
    return Refusals(accepted, in_time, refused, wrongly)


def _arrival(row: Mapping[str, str]) -> tuple[float, int]:
    return float(row["at_s"]), int(row["image"])


def _predicted_s(row: Mapping[str, str]) -> float:
    return float(row["finish_s"] or row["predicted_s"] or "inf")
