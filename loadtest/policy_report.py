"""PURE: a study of policies as Markdown. Every number comes from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.policy_plan import (
    CALM_SHARE,
    MEAN_SHARE,
    PEAK_SHARE,
    PEAK_WINDOW_S,
    RATE_STEP,
    SUSTAINED_LIMIT_MS,
    SUSTAINED_RUNS,
    SUSTAINED_S,
    SUSTAINED_SHARE,
    TAUS,
    Capacity,
    Evaluated,
    Outcome,
    means,
)
from loadtest.results import Machine
from loadtest.tables import machine_lines, table

OURS, RIVAL, BOUND, WIDEST = "gate_slack", "slackfit", "fixed:0", "fixed:widest"


@dataclass(frozen=True, slots=True)
class Findings:
    """What a study has found.

    network     that was served.
    live        of every trace and policy, the median of ``repeats`` runs. same: these traces in the twin, on a machine
                that is as slow as this one was in each of the runs.
    twin        of all traces, on the machine as it was when its capacity was measured. comparisons: with the rival.
    duration_s  of each trace.
    """

    network: Evaluated
    live: Sequence[Outcome]
    same: Sequence[Outcome]
    twin: Sequence[Outcome]
    comparisons: Sequence[dict[str, Any]]
    duration_s: float
    repeats: int


def markdown(capacity: Capacity, found: Findings, machine: Machine) -> str:
    """The page."""
    live, same = found.live, found.same
    seeds, twin_seeds = (1 + max(one.seed for one in outcomes) for outcomes in (live, found.twin))
    lines = ["# Policies under bursts", "", *machine_lines(machine), "", found.network.sentence(), ""]
    lines += [*_setting(capacity, found.duration_s), ""]
    lines += [f"## Live, {seeds} seeds", "", *_slowness(live, found.repeats), "", *_means(live), ""]
    lines += [*_against_the_bound(live, same), ""]
    lines += [f"## In the offline twin, {twin_seeds} seeds", "", *_means(found.twin), ""]
    lines += ["## In the offline twin, less slackfit", "", *_comparisons(found.comparisons), ""]
    lines += [f"## The twin against the machine, the same {seeds} seeds", "", *_twin_error(live, same), ""]
    late = sum(one.late_sends for one in live)
    lines += [f"Requests that the generator sent more than 1 ms behind their instant, all live runs: {late:,}."]
    return "\n".join(lines) + "\n"


def _setting(capacity: Capacity, duration_s: float) -> list[str]:
    slos = ", ".join(f"{capacity.slo_ms(cv2):g} ms ({taus} tau0) at CV2 {cv2}" for cv2, taus in TAUS.items())
    return [
        f"C0, the highest rate of Poisson arrivals, in steps of {RATE_STEP - 1:.0%}, of which the narrowest width "
        f"answers {SUSTAINED_SHARE:.0%} within {SUSTAINED_LIMIT_MS:g} ms in each of {SUSTAINED_RUNS} runs of "
        f"{SUSTAINED_S:g} s, through "
        f"HTTP with the generator on the same machine: {capacity.images_per_s:.1f} images/s. tau0 = "
        f"{capacity.workers} workers / C0 = {capacity.tau0_ms:.2f} ms. Traces of {duration_s:g} s at a mean of "
        f"{MEAN_SHARE:g} C0, peaks over {PEAK_WINDOW_S:g} s nearest to {PEAK_SHARE:g} C0. Worker threads have the "
        f"priority `{capacity.worker_priority}`. Every request has a Latency-Budget: {slos}. The twin "
        f"charges {capacity.overhead_ms:.2f} ms of worker time to every image beside the latency table, "
        f"{_beside(capacity)}. Where the gate is asked it charges {capacity.ask_ms:.2f} ms of worker time and "
        f"{capacity.ask_loop_ms:.2f} ms of the event loop more: what is spent more at {CALM_SHARE:g} C0 when budgets "
        "leave slice 0 alone to images that are asked.",
    ]


def _beside(capacity: Capacity) -> str:
    """Where the rest of tau0 goes."""
    if not capacity.front_ms:
        return "the difference between tau0 and the table"
    return (
        f"{capacity.front_ms:.2f} ms to the event loop until it is admitted and {capacity.back_ms:.2f} ms for its "
        f"answer (that split is assumed), {capacity.handover_ms:.2f} ms to the event loop for every batch (what an "
        f"image takes more at {CALM_SHARE:g} C0, where fewer share a batch) and {capacity.client_ms:.2f} ms to the "
        f"generator, as measured at C0, on {capacity.workers} cores for all; worker time is what that leaves of tau0"
    )


def _slowness(live: Sequence[Outcome], repeats: int) -> list[str]:
    slower = [one.slower for one in live]
    runs = f"the median of {repeats} runs, every other round in the opposite order" if repeats > 1 else "one run"
    return [
        f"Of every trace and policy {runs}. In a round all policies run on a trace one after the other, each on a "
        "server of its own. What the event loop takes for an "
        f"image under `{BOUND}` says how slow the machine was in that round: {min(slower):.2f} to {max(slower):.2f} "
        "times what was measured with C0. For the bound, and wherever live runs are compared with the twin, "
        "the twin charges so many times the costs beside the latency table."
    ]


def _means(outcomes: Sequence[Outcome]) -> list[str]:
    found = means(outcomes)
    policies = list(dict.fromkeys(one.policy for one in outcomes))
    heads = ["policy", *(f"CV2 {cv2}: attainment / top-1" for cv2 in TAUS)]
    return table(heads, [[policy, *(_pair(found.get((cv2, policy))) for cv2 in TAUS)] for policy in policies])


def _pair(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return ""
    attainment, top1 = found
    return f"{attainment:.4f} / {'-' if top1 is None else f'{top1:.2%}'}"


def _against_the_bound(live: Sequence[Outcome], twin: Sequence[Outcome]) -> list[str]:
    measured, bound = means(live), means(twin)
    rows = []
    for cv2 in TAUS:
        if (cv2, OURS) not in measured or (cv2, BOUND) not in bound:
            continue
        ours, best = measured[cv2, OURS][0], bound[cv2, BOUND][0]
        widest = measured.get((cv2, WIDEST), (float("nan"), None))[0]
        rows.append(
            [
                str(cv2), f"{ours:.4f}", f"{best:.4f}", _verdict(best - ours, ours >= best - 0.01),
                f"{widest:.4f}", _verdict(ours - widest, ours >= widest + 0.15),
            ]
        )  # fmt: skip
    heads = ["CV2", OURS, f"bound: {BOUND} in the twin", "below it (at most 0.01)", WIDEST, "above it (at least 0.15)"]
    return table(heads, rows)


def _verdict(value: float, is_met: bool) -> str:
    return f"{value:.4f}, {'met' if is_met else '**missed**'}"


def _comparisons(comparisons: Sequence[dict[str, Any]]) -> list[str]:
    rows = [[str(one["policy"]), _points(one["attainment"]), _points(one["top1"])] for one in comparisons]
    return table(["policy", "attainment, points", "top-1, points"], rows)


def _points(interval: dict[str, float] | None) -> str:
    if interval is None:
        return "-"
    value, low, high = (100 * interval[name] for name in ("value", "low", "high"))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _twin_error(live: Sequence[Outcome], twin: Sequence[Outcome]) -> list[str]:
    measured, simulated = means(live), means(twin)
    rows = []
    for (cv2, policy), (attainment, top1) in measured.items():
        if (cv2, policy) in simulated:
            attainment_there, top1_there = simulated[cv2, policy]
            gap = None if top1 is None or top1_there is None else top1 - top1_there
            shown = "-" if gap is None else f"{100 * gap:+.2f}"
            rows.append([str(cv2), policy, f"{attainment - attainment_there:+.4f}", shown])
    return table(["CV2", "policy", "attainment, live less twin", "top-1, points"], rows)
