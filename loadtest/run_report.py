"""What a run of the open loop leaves behind: a record that is written as JSON, and the report made of it alone."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from loadtest.figures import LEAST_VALUES, median_interval
from loadtest.objectives import Finding
from loadtest.outcomes import Answer, Figures
from loadtest.results import Machine
from loadtest.tables import table

ARRIVALS_PLOT, WIDTHS_PLOT, LATENCY_PLOT = "arrivals.png", "widths.png", "latency.png"
ATTAINMENT_PLOT, ACCURACY_PLOT = "attainment.png", "accuracy.png"
PLOT_TITLES = {
    ARRIVALS_PLOT: "Arrivals and requests met",
    WIDTHS_PLOT: "Slices served over time",
    LATENCY_PLOT: "Latency over time",
    ATTAINMENT_PLOT: "SLO attainment against load",
    ACCURACY_PLOT: "Accuracy against SLO attainment",
}
LATE_SHARE_LIMIT = 0.01
"""With a larger share of late sends a run measured its generator, too, and the report says so."""


@dataclass(frozen=True, slots=True)
class TraceFacts:
    """What was replayed.

    name               of the file, without its folder; sha256 is of its bytes.
    kind, parameters   how it was drawn: ``file`` and nothing when that is not known; seed and mixes likewise.
    peak_rate_per_s    highest rate over any window of peak_window_s.
    cv2                of the gaps between arrivals; None with too few of them.
    """

    name: str
    sha256: str
    kind: str
    parameters: dict[str, float]
    seed: int | None
    mixes: tuple[str, ...]
    requests: int
    duration_s: float
    mean_rate_per_s: float
    peak_rate_per_s: float
    peak_window_s: float
    cv2: float | None

    @property
    def title(self) -> str:
        """Its kind with its parameters; the file's name where these are not known."""
        if not self.parameters:
            return f"{self.kind} {self.name}"
        return f"{self.kind} {' '.join(f'{name}={value:g}' for name, value in self.parameters.items())}"


@dataclass(frozen=True, slots=True)
class Generator:
    """The load generator and what it took.

    cpu_s             of its process over the whole trace, warm-up included.
    outstanding_peak  most requests unanswered at once, out of outstanding_limit.
    late_send_ms      further behind its instant than this a send is late.
    """

    event_loop: str
    cpu_s: float
    cpu_ms_per_request: float
    outstanding_peak: int
    outstanding_limit: int
    request_limit_s: float
    late_send_ms: float


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One replay of a trace against one server.

    label    what the run stands for in a comparison.
    slo_ms   limit of the requests without a Latency-Budget; None where each has one.
    figures  of all requests after the warm-up; windows and seconds: of parts of them.
    """

    label: str
    measured_at: str
    machine: Machine
    command: str
    url: str
    trace: TraceFacts
    warm_up_s: float
    slo_ms: float | None
    generator: Generator
    figures: Figures
    windows: tuple[Figures, ...]
    seconds: tuple[Figures, ...]
    findings: tuple[Finding, ...]

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        draft = path.with_suffix(".partial")
        draft.write_bytes(_ADAPTER.dump_json(self, indent=None) + b"\n")
        draft.replace(path)

    @staticmethod
    def load(path: Path) -> RunRecord:
        """Read what ``save`` wrote; ValueError names the file and what is wrong with it."""
        try:
            return _ADAPTER.validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{path}: not a result of slicewise-load run: {error}") from error


_ADAPTER = TypeAdapter(RunRecord)
_NOTHING = "-"
"""What stands where nothing was measured."""

_REQUEST_COLUMNS = (
    "at_s", "image", "label", "limit_ms", "send_late_ms", "latency_ms", "status", "fate", "error_type", "width",
    "gate_width", "reason", "madds", "predicted",
)  # fmt: skip


def requests_csv(answers: Iterable[Answer]) -> str:
    """One line for each request; milliseconds to the microsecond, empty where there is no value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_REQUEST_COLUMNS)
    for answer in answers:
        values = (getattr(answer, name) for name in _REQUEST_COLUMNS)
        cells = (
            round(v, 3) if name.endswith("_ms") and v is not None else v
            for name, v in zip(_REQUEST_COLUMNS, values, strict=True)
        )
        writer.writerow(cells)
    return out.getvalue()


def markdown(record: RunRecord, plots: Sequence[str]) -> str:
    """The report of one run, with those of its plots that were drawn."""
    trace, figures = record.trace, record.figures
    lines = [
        f"# Open-loop run: {record.label}", "", *_setting(record), "", "## Trace", "", *_trace(trace), "",
        "## Outcome", "", *_doubts(record), *_outcome(figures), "",
    ]  # fmt: skip
    if record.findings:
        lines += [
            "## Objectives",
            "",
            *table(["objective", "measured", "verdict"], map(_finding, record.findings)),
            "",
        ]
    if record.windows:
        lines += ["## Windows", "", *_windows(record.windows), ""]
    lines += ["## Counts", "", *_counts(figures), ""]
    for name in plots:
        lines += [f"![{PLOT_TITLES[name]}]({name})", ""]
    return "\n".join(lines)


_INTERVALS = (
    f"Intervals are 95 % bootstrap intervals of the median; of fewer than {LEAST_VALUES} runs, from the least to the "
    "greatest."
)


def comparison_markdown(records: Sequence[RunRecord], plots: Sequence[str]) -> str:
    """A table of several runs, those that repeat each other taken together, and the plots that were drawn."""
    heads = [
        "run", "trace", "mean, requests/s", "peak, requests/s", "attainment", "top-1 of the met", "p50 ms", "p99 ms",
        "mean MAdds", "late sends",
    ]  # fmt: skip
    lines = ["# Open-loop runs", "", *table(heads, [_run_row(record) for record in records]), ""]
    repeated = [group for group in repetitions(records) if len(group) > 1]
    if repeated:
        heads = [
            "run",
            "trace",
            "runs",
            "attainment, median (interval)",
            "top-1 of the met, median (interval)",
        ]
        lines += ["## Repeated runs", "", *table(heads, [_group_row(group) for group in repeated]), "", _INTERVALS, ""]
    for name in plots:
        lines += [f"![{PLOT_TITLES[name]}]({name})", ""]
    return "\n".join(lines)


def repetitions(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs of one label, SLO and mix under traces of one kind and parameters, whatever their seeds.

    In the order of labels and loads.
    """

    def key(record: RunRecord) -> tuple[str, ...]:
        return record.label, record.trace.title, *record.trace.mixes, str(record.slo_ms)

    groups = [list(group) for _, group in itertools.groupby(sorted(records, key=key), key)]
    return sorted(groups, key=lambda group: (group[0].label, mean_rate(group)))


def mean_rate(group: Sequence[RunRecord]) -> float:
    """The load of runs that repeat each other, requests/s."""
    return sum(record.trace.mean_rate_per_s for record in group) / len(group)


def _setting(record: RunRecord) -> list[str]:
    machine, generator = record.machine, record.generator
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    limit = (
        "its Latency-Budget" if record.slo_ms is None else f"its Latency-Budget, or {record.slo_ms:g} ms without one"
    )
    return [
        f"`{record.command}`, measured at {record.measured_at}. {machine.cpu}, {machine.cores} usable cores, "
        f"{machine.memory_bytes / 2**30:.1f} GiB, {machine.system}, Python {machine.python}. {packages}.",
        "",
        f"Every request is sent at its instant, however many are unanswered; the first {record.warm_up_s:g} s are not "
        f"counted. Latency runs from that instant to the last byte of the answer. A request is met when it is "
        f"answered with 200 within {limit}. Attainment is met / all but the infeasible (422).",
        "",
        f"The generator ({generator.event_loop}) took {generator.cpu_ms_per_request:.3f} CPU ms/request and had up to "
        f"{generator.outstanding_peak:,} requests outstanding, of {generator.outstanding_limit:,} allowed.",
    ]


def _trace(trace: TraceFacts) -> list[str]:
    drawn = "" if trace.seed is None else f", seed {trace.seed}"
    mixes = f", headers {'; '.join(f'`{mix}`' for mix in trace.mixes)}" if trace.mixes else ""
    cv2 = "" if trace.cv2 is None else f", CV2 of the gaps {trace.cv2:.2f}"
    return [
        f"`{trace.name}`: {trace.title}{drawn}{mixes}. {trace.requests:,} requests in {trace.duration_s:g} s: mean "
        f"{trace.mean_rate_per_s:.1f} requests/s, peak {trace.peak_rate_per_s:.1f} requests/s over "
        f"{trace.peak_window_s:g} s{cv2}."
    ]


def _doubts(record: RunRecord) -> list[str]:
    """What makes the figures say less than they seem to."""
    figures, found = record.figures, []
    if figures.late_sends > LATE_SHARE_LIMIT * figures.requests:
        found.append(
            f"{figures.late_sends / figures.requests:.1%} of the requests were sent more than "
            f"{record.generator.late_send_ms:g} ms late (p99 {_number(figures.send_late_p99_ms)} ms)"
        )
    if figures.not_sent:
        found.append(f"{figures.not_sent:,} requests were not sent, too many were outstanding")
    return [f"**The generator did not keep up: {'; '.join(found)}.**", ""] if found else []


def _outcome(figures: Figures) -> list[str]:
    rates_per_s = (figures.arrivals_per_s, figures.throughput_per_s, figures.goodput_per_s)
    latencies_ms = (figures.p50_ms, figures.p90_ms, figures.p99_ms, figures.p99_9_ms)
    send_late_ms = (figures.send_late_p99_ms, figures.send_late_max_ms)
    rows = [
        ["attainment", _share(figures.attainment)],
        ["top-1 of the met", _share(figures.top1)],
        ["due, answered and met, requests/s", ", ".join(f"{rate:.1f}" for rate in rates_per_s)],
        ["latency p50, p90, p99 and p99.9, ms", ", ".join(map(_number, latencies_ms))],
        ["mean MAdds", _number(figures.mean_madds)],
        ["late sends", f"{figures.late_sends:,}"],
        ["lateness of sends, p99 and maximum, ms", ", ".join(map(_number, send_late_ms))],
    ]
    return table(["figure", "value"], rows)


def _finding(finding: Finding) -> list[str]:
    value = "nothing" if finding.value is None else f"{finding.value:.6g}"
    return [f"`{finding.objective}`", value, "met" if finding.met else "**missed**"]


def _windows(windows: Sequence[Figures]) -> list[str]:
    heads = ["from s", "to s", "requests", "attainment", "top-1 of the met", "p50 ms", "p99 ms", "expired", "refused"]
    return table(
        heads,
        [
            [f"{w.start_s:g}", f"{w.end_s:g}", f"{w.requests:,}", _share(w.attainment), _share(w.top1),
             _number(w.p50_ms), _number(w.p99_ms), f"{w.expired:,}", f"{w.refused:,}"]
            for w in windows
        ],
    )  # fmt: skip


def _counts(figures: Figures) -> list[str]:
    fates = {name: getattr(figures, name) for name in ("met", "late", "expired", "refused", "infeasible", "failed")}
    kinds: list[tuple[str, Mapping[str, int]]] = [
        ("fate", fates), ("status", figures.statuses), ("error", figures.errors), ("slice served", figures.widths),
        ("gate's wish", figures.gate_widths), ("reason", figures.reasons),
    ]  # fmt: skip
    rows = [[kind, name, f"{n:,}", f"{n / sum(c.values()):.1%}"] for kind, c in kinds for name, n in c.items() if n]
    return table(["of", "value", "requests", "share"], rows)


def _run_row(record: RunRecord) -> list[str]:
    trace, figures = record.trace, record.figures
    return [
        record.label, trace.title, f"{trace.mean_rate_per_s:.1f}", f"{trace.peak_rate_per_s:.1f}",
        _share(figures.attainment), _share(figures.top1), _number(figures.p50_ms), _number(figures.p99_ms),
        _number(figures.mean_madds), f"{figures.late_sends:,}",
    ]  # fmt: skip


def _group_row(group: Sequence[RunRecord]) -> list[str]:
    shares = ([r.figures.attainment for r in group], [r.figures.top1 for r in group])
    known = ([value for value in values if value is not None] for values in shares)
    return [group[0].label, group[0].trace.title, str(len(group)), *(_interval(values) for values in known)]


def _interval(values: Sequence[float]) -> str:
    if not values:
        return _NOTHING
    found = median_interval(values)
    return f"{found.median:.2%} ({found.low:.2%} to {found.high:.2%})"


def _share(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.2%}"


def _number(value: float | None) -> str:
    """Thousands without decimals, small numbers with enough of them."""
    if value is None:
        return _NOTHING
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
