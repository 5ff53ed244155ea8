"""PURE: a study of pressure as Markdown. Every number comes from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.figures import percentile
from loadtest.loop_delay import GAP_S
from loadtest.policy_plan import Capacity, Evaluated
from loadtest.pressure_plan import (
    BUDGETS_REQUESTS,
    BUDGETS_SHARE,
    DELAY_BAR_MS,
    DELAY_ROUNDS,
    IN_TIME_SHARE,
    MARGIN_RATIO,
    RECOVERED_S,
    RECOVERED_SHARE,
    REST_SHARE,
    SCHEDULER_BAR_US,
    STEP_FROM_S,
    STEP_SHARE,
    STEP_TAUS,
    STEP_TO_S,
    WRONGLY_SHARE,
    Delays,
    Findings,
    Refusals,
)
from loadtest.results import Machine
from loadtest.run_report import RunRecord
from loadtest.tables import machine_lines, table

STEP_PLOT = "step_widths.png"


def markdown(
    capacity: Capacity, network: Evaluated, steps: Sequence[RunRecord], found: Findings, machine: Machine
) -> str:
    """The page."""
    lines = ["# Under pressure", "", *machine_lines(machine), "", network.sentence(), ""]
    lines += [*_step(capacity, steps, found.after), ""]
    lines += [*_budgets(capacity, found.refusals), "", *_scheduler(found.scheduler), ""]
    lines += _delays(capacity, found.delays)
    return "\n".join(lines) + "\n"


def _step(capacity: Capacity, steps: Sequence[RunRecord], after: tuple[int, int]) -> list[str]:
    met, requests = after
    share = met / requests if requests else 0.0
    rows = []
    for second in range(int(steps[0].trace.duration_s)):
        figures = [f for record in steps for f in record.seconds if f.start_s == second]
        counted = sum(f.requests - f.infeasible for f in figures)
        answered = sum(f.met + f.late for f in figures)
        madds = sum((f.mean_madds or 0.0) * (f.met + f.late) for f in figures) / max(1, answered)
        rows.append(
            [str(second), f"{counted:,}", f"{sum(f.met for f in figures) / max(1, counted):.4f}", f"{madds / 1e6:.1f}"]
        )
    return [
        "## A step in the traffic",
        "",
        f"Poisson arrivals at {REST_SHARE:g} C0 ({REST_SHARE * capacity.images_per_s:.0f} requests/s), from "
        f"{STEP_FROM_S:g} to {STEP_TO_S:g} s at {STEP_SHARE:g} C0, then as before; every request has a Latency-Budget "
        f"of {STEP_TAUS} tau0 ({STEP_TAUS * capacity.tau0_ms:.1f} ms). {len(steps)} traces of different seeds, pooled.",
        "",
        f"Attainment from {RECOVERED_S[0]:g} to {RECOVERED_S[1]:g} s: {share:.4f} ({met:,} of {requests:,}); at least "
        f"{RECOVERED_SHARE:g}: {_verdict(share >= RECOVERED_SHARE)}.",
        "",
        *table(["second", "requests", "attainment", "mean MAdds of an answer, M"], rows),
        "",
        f"![Slices served over time, first trace]({STEP_PLOT})",
    ]


def _budgets(capacity: Capacity, found: Refusals) -> list[str]:
    rows = [
        [
            "let in", f"{found.accepted:,}", f"in time: {found.in_time_share:.4f}", f"at least {IN_TIME_SHARE:g}",
            _verdict(found.in_time_share >= IN_TIME_SHARE),
        ],
        [
            "refused", f"{found.refused:,}", f"over {MARGIN_RATIO:g} of the prediction: {found.wrongly_share:.4f}",
            f"at most {WRONGLY_SHARE:g}", _verdict(found.wrongly_share <= WRONGLY_SHARE),
        ],
    ]  # fmt: skip
    return [
        "## Deadlines of every length",
        "",
        f"About {BUDGETS_REQUESTS:,} Poisson arrivals at {BUDGETS_SHARE:g} C0 "
        f"({BUDGETS_SHARE * capacity.images_per_s:.0f} requests/s) with Latency-Budgets from {capacity.tau0_ms:.1f} ms "
        "up, drawn at random. The prediction is when the offline twin finishes that arrival of the same trace, or says "
        "that it would have.",
        "",
        *table(["requests", "count", "measured", "bar", "verdict"], rows),
    ]


def _scheduler(found: Mapping[str, Any]) -> list[str]:
    rows = [[policy, f"{us:.1f}", _verdict(us <= SCHEDULER_BAR_US)] for policy, us in found["us_per_image"].items()]
    return [
        "## What deciding costs",
        "",
        f"Microseconds in the scheduler per image, admission included, while {found['waiting']:,} images with "
        f"deadlines wait for {found['workers']} workers; nothing is computed, the machine does nothing else.",
        "",
        *table(["policy", "us per image", f"at most {SCHEDULER_BAR_US:g}"], rows),
    ]


def _delays(capacity: Capacity, found: Delays) -> list[str]:
    rows = [
        [name, *(f"{percentile(values, percent):.2f}" for percent in (50, 90, 99)), f"{max(values):.1f}"]
        for name, values in (("busy threads, no service", found.floor_ms), ("service at saturation", found.service_ms))
    ]
    return [
        "## The event loop's delay",
        "",
        f"Milliseconds to `/healthz`, asked {1 / GAP_S:.0f} times a second: of a FastAPI server beside "
        f"{capacity.workers} threads that compute without the interpreter lock, and of the service "
        f"that saturating clients ask for classifications, in turns, {DELAY_ROUNDS} each.",
        "",
        *table(["", "p50", "p90", "p99", "most"], rows),
        "",
        f"At p99 {found.above_ms:.2f} ms above the floor; at most {DELAY_BAR_MS:g} ms: "
        f"{_verdict(found.above_ms <= DELAY_BAR_MS)}.",
    ]


def _verdict(held: bool) -> str:
    return "met" if held else "**missed**"
