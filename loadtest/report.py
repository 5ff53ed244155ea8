"""Results -> Markdown. Every number comes from the results; none is written here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from loadtest.bars import FIGURES, PAIRS_NEEDED, SECONDS_NEEDED, TOLERANCE, Verdict, doubts, estimate, verdict
from loadtest.comparisons import GATE_BATCH, GATE_SINGLE, NAMES
from loadtest.figures import median_interval
from loadtest.plots import CDF, THROUGHPUT
from loadtest.results import ArmRecord, Bar, ComparisonRecord, Metric, Results
from loadtest.tables import machine_lines, table

_ADJECTIVE = {Verdict.MET: "met", Verdict.MISSED: "**missed**", Verdict.UNPROVEN: "unproven"}


def markdown(results: Results) -> str:
    """The whole report."""
    absent = [name for name in NAMES if name not in {c.name for c in results.comparisons}]
    lines = ["# Benchmarks", "", *machine_lines(results.machine), "", *_method(), "", "## Bars", "", *_bars(results)]
    if absent:
        lines += ["", f"Not measured: {', '.join(f'`{name}`' for name in absent)}."]
    if results.comparisons:
        lines += ["", f"![Throughput of every arm]({THROUGHPUT})"]
    for comparison in results.comparisons:
        lines += ["", *_comparison(comparison)]
    overhead = _request_overhead(results)
    if overhead:
        lines += ["", "## Fixed cost of a single-image request", "", *overhead]
    return "\n".join(lines) + "\n"


def _method() -> list[str]:
    return [
        "Two arms take turns; which goes first alternates. While one is measured, all other servers are stopped "
        "(SIGSTOP). The load generator is a closed loop in a process of its own on the same machine; warm-up is not "
        "counted. A figure is the median over the pairs, with a 95 % bootstrap interval. A bar is met when the "
        f"median reaches it and the unfavourable end of the interval is at most {TOLERANCE:g} beyond it. It is "
        f"*unproven* when it would be met with fewer than {PAIRS_NEEDED} pairs of {SECONDS_NEEDED:g} s, with too few "
        "requests, or with failures.",
    ]


def _bars(results: Results) -> list[str]:
    rows = [_bar_row(comparison, bar) for comparison in results.comparisons for bar in comparison.bars]
    return table(["comparison", "figure", "bar", "median", "95 % interval", "verdict"], rows)


def _bar_row(comparison: ComparisonRecord, bar: Bar) -> list[str]:
    figure, found, judged = FIGURES[bar.metric], estimate(bar.metric, comparison), verdict(bar, comparison)
    unit = f" {figure.unit}" if figure.unit else ""
    remark = f" ({'; '.join(doubts(bar, comparison))})" if judged is Verdict.UNPROVEN else ""
    return [
        f"`{comparison.name}`", figure.title, f"{bar.side} {bar.target:.2f}{unit}", f"{found.median:.3f}{unit}",
        f"{found.low:.3f} to {found.high:.3f}", _ADJECTIVE[judged] + remark,
    ]  # fmt: skip


def _comparison(comparison: ComparisonRecord) -> list[str]:
    arms = (comparison.a, comparison.b)
    found = estimate(Metric.THROUGHPUT, comparison)
    lines = [
        f"## {comparison.title}",
        "",
        f"`{comparison.name}`: {comparison.pairs} pairs of {comparison.seconds:g} s after {comparison.warm_up_s:g} s "
        f"of warm-up, measured at {comparison.measured_at}. Throughput ratio {found.median:.3f} "
        f"({found.low:.3f} to {found.high:.3f}).{_others(arms)}",
        "",
        *table(
            [
                "arm", "clients", "images/s", "p50 ms", "p99 ms", "server CPU ms/image", "generator CPU ms/image",
                "resident MiB", "requests", "failures",
            ],
            [_arm_row(arm) for arm in arms],
        ),
        "",
        *(f"* {arm.name}: `{arm.command}`; {arm.request}.{_served(arm)}{_failed(arm)}" for arm in arms),
    ]  # fmt: skip
    if any(arm.requests for arm in arms):
        lines += ["", f"![Latencies]({CDF.format(name=comparison.name)})"]
    return lines


def _arm_row(arm: ArmRecord) -> list[str]:
    rates = [run.images_per_s for run in arm.runs]
    resident_mib = max(run.resident_bytes for run in arm.runs) / 2**20
    return [
        arm.name,
        str(arm.clients),
        f"{_median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})",
        _ms(arm.latency_ms(50)),
        _ms(arm.latency_ms(99)),
        f"{cpu_ms_per_image(arm):.2f}",
        f"{_median([run.generator_cpu_s / run.images * 1e3 for run in arm.runs]):.2f}" if arm.requests else "",
        f"{resident_mib:.0f}" if resident_mib else "",
        f"{arm.requests:,}" if arm.requests else "",
        f"{arm.failures:,}",
    ]


def cpu_ms_per_image(arm: ArmRecord) -> float:
    """Median over the runs of the CPU milliseconds that the server, or the command, spent on an image."""
    return _median([run.cpu_s_per_image * 1e3 for run in arm.runs])


def _median(values: Sequence[float]) -> float:
    return median_interval(values).median


def _ms(latency_ms: float | None) -> str:
    return "" if latency_ms is None else f"{latency_ms:.2f}"


def _served(arm: ArmRecord) -> str:
    """Which slices answered, by the server's own word."""
    served = sum((Counter(run.served) for run in arm.runs), Counter())
    if not served:
        return ""
    shares = (f"{slice_}: {count / served.total():.1%}" for slice_, count in sorted(served.items(), key=_numerically))
    return f" Answers by slice: {', '.join(shares)}."


def _numerically(item: tuple[str, int]) -> tuple[int, str]:
    name, _ = item
    return (int(name), "") if name.isascii() and name.isdigit() else (-1, name)


def _failed(arm: ArmRecord) -> str:
    failed = sum((Counter(run.failed) for run in arm.runs), Counter())
    return f" Failed: {', '.join(f'{reason} {count:,}' for reason, count in sorted(failed.items()))}." if failed else ""


def _others(arms: Iterable[ArmRecord]) -> str:
    """How much of the machine went to neither the server nor the generator."""
    runs = [run for arm in arms for run in arm.runs if run.other_cpu_s is not None]
    if not runs:
        return ""
    cores = [run.other_cpu_s / run.seconds for run in runs if run.other_cpu_s is not None]
    return f" Other processes took {_median(cores):.2f} cores (at most {max(cores):.2f})."


def _request_overhead(results: Results) -> list[str]:
    """What an image costs alone beyond what it costs in a batch: HTTP, JSON, hand-offs."""
    known = {comparison.name: comparison for comparison in results.comparisons}
    if GATE_BATCH not in known or GATE_SINGLE not in known:
        return []
    batch, single = known[GATE_BATCH], known[GATE_SINGLE]
    rows = []
    for together, alone in ((batch.a, single.a), (batch.b, single.b)):
        costs_ms = (cpu_ms_per_image(alone), cpu_ms_per_image(together))
        rows.append([alone.name, *(f"{cost_ms:.2f}" for cost_ms in (*costs_ms, costs_ms[0] - costs_ms[1]))])
    heads = ["arm", "alone, server CPU ms/image", "in a batch, server CPU ms/image", "difference, ms"]
    return table(heads, rows)
