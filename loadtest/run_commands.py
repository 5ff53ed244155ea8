"""Subcommands of the open loop: draw a trace, replay it against a server, compare what several runs gave."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import numpy as np

from loadtest import traces
from loadtest.machine import describe
from loadtest.objectives import Finding, Window, judge, parse_objective, parse_window
from loadtest.open_loop import OUTSTANDING_LIMIT, REQUEST_LIMIT_S, Limits, Playback, Post, play
from loadtest.outcomes import LATE_SEND_MS, Answer, Figures, answer_of, budget_ms, by_second, figures
from loadtest.provenance import shown_command, without_user
from loadtest.run_report import Generator, RunRecord, TraceFacts, comparison_markdown, markdown, requests_csv
from loadtest.trace_file import (
    LabelledImage,
    Origin,
    Trace,
    as_arrivals,
    fill,
    parse_mix,
    read_images_by_name,
    read_origin,
    read_trace,
    write_trace,
)

RESULTS, REPORT, REQUESTS, COMPARISON = "results.json", "report.md", "requests.csv", "comparison.md"
OBJECTIVE_MISSED = 2
"""Exit status of a run that was measured and missed an objective; an error is 1."""
_BUDGET_HEADER = "latency-budget"


@dataclass(frozen=True, slots=True)
class _Flag:
    """A parameter of a kind of trace. default: None when it has to be given."""

    flag: str
    parameter: str
    help: str
    default: float | None = None


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of trace. draw: parameters by name, duration in s, generator -> arrivals."""

    help: str
    flags: tuple[_Flag, ...]
    draw: Callable[[dict[str, float], float, np.random.Generator], traces.Arrivals]


_RATE = _Flag("--rate", "rate_per_s", "mean rate, requests/s")
_CV2_RAMP = _Flag("--cv2", "cv2", "CV2 of the gaps in mean gaps of the moment; 1 = Poisson", 1.0)
KINDS = {
    "poisson": _Kind(
        "independent arrivals", (_RATE,), lambda p, duration_s, rng: traces.poisson(p["rate_per_s"], duration_s, rng)
    ),
    "constant": _Kind(
        "equal gaps", (_RATE,), lambda p, duration_s, rng: traces.constant(p["rate_per_s"], duration_s)
    ),
    "bursty": _Kind(
        "equal gaps at a base rate, and bursts on top",
        (
            _Flag("--rate", "rate_per_s", "mean rate of both together, requests/s"),
            _Flag("--base-rate", "base_rate_per_s", "of the equal gaps, requests/s; 0 for bursts alone"),
            _Flag("--cv2", "cv2", "squared coefficient of variation of the gaps of the bursts, such as 2, 4 or 8"),
        ),
        lambda p, duration_s, rng: traces.bursty(**p, duration_s=duration_s, rng=rng),
    ),
    "accelerating": _Kind(
        "a rate that goes from one to another, then stays",
        (
            _Flag("--from-rate", "from_rate_per_s", "rate at the start, requests/s"),
            _Flag("--to-rate", "to_rate_per_s", "rate after the ramp, requests/s"),
            _Flag("--tau", "tau_per_s2", "change of the rate, requests/s each second, above 0"),
            _CV2_RAMP,
        ),
        lambda p, duration_s, rng: traces.accelerating(**p, duration_s=duration_s, rng=rng),
    ),
    "step": _Kind(
        "Poisson arrivals at one rate, at another for a while, and at the first again",
        (
            _Flag("--rate", "rate_per_s", "outside the step, requests/s"),
            _Flag("--step-rate", "step_rate_per_s", "within it, requests/s"),
            _Flag("--step-from-s", "step_from_s", "when it begins, s"),
            _Flag("--step-to-s", "step_to_s", "when it ends, s"),
        ),
        lambda p, duration_s, rng: traces.step(
            p["rate_per_s"], p["step_rate_per_s"], (p["step_from_s"], p["step_to_s"]), duration_s, rng
        ),
    ),
}  # fmt: skip


def configure_trace(parser: argparse.ArgumentParser) -> None:
    """The flags of ``slicewise-load trace KIND``."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, kind in KINDS.items():
        sub = kinds.add_parser(name, help=kind.help, description=kind.help)
        for flag in kind.flags:
            sub.add_argument(
                flag.flag, dest=flag.parameter, type=float, required=flag.default is None, default=flag.default,
                help=flag.help,
            )  # fmt: skip
        sub.add_argument("--duration-s", type=float, required=True, help="length of the trace")
        sub.add_argument("--images", type=int, required=True, metavar="N", help="images to pick from")
        sub.add_argument("--seed", type=int, default=0, help="decides arrivals, images and headers (default: 0)")
        sub.add_argument(
            "--mix", action="append", default=[], metavar="HEADER=VALUE:SHARE,...",
            help="values of a header by their shares, an empty one leaves it out; repeated for several headers",
        )  # fmt: skip
        sub.add_argument("--out", type=Path, required=True, metavar="TRACE.csv")


def run_trace(arguments: argparse.Namespace) -> None:
    """Draw a trace and write it; a line about it on stdout. Raises ValueError for what is out of range."""
    kind, seed, duration_s = KINDS[arguments.kind], arguments.seed, arguments.duration_s
    if seed < 0:
        raise ValueError(f"seed is {seed}; allowed: 0 or more")
    parameters = {flag.parameter: getattr(arguments, flag.parameter) for flag in kind.flags}
    mixes = [parse_mix(text) for text in arguments.mix]
    arrivals = kind.draw(parameters, duration_s, np.random.default_rng(seed))
    trace = fill(arrivals, arguments.images, mixes, seed)
    origin = Origin(arguments.kind, parameters, duration_s, seed, arguments.images, tuple(map(str, mixes)))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_trace(trace, arguments.out, origin)
    mean, peak = traces.mean_rate(arrivals, duration_s), traces.peak_rate(arrivals, 1.0)
    print(f"{arguments.out}: {len(trace):,} requests, mean {mean:.1f} requests/s, peak {peak:.0f} over 1 s")


def configure_run(parser: argparse.ArgumentParser) -> None:
    """The flags of ``slicewise-load run``."""
    add = parser.add_argument
    add("--url", required=True, help="where images are posted, such as http://127.0.0.1:8000/v1/classify")
    add("--trace", type=Path, required=True, metavar="TRACE.csv", help="what slicewise-load trace wrote")
    add("--images", type=Path, required=True, metavar="PATH", help="folder or zip of images, class/name.png")
    add("--label", default="run", help="what the run stands for in a comparison (default: %(default)s)")
    add("--slo-ms", type=float, help="latency up to which a request without Latency-Budget is met")
    add("--warm-up-s", type=float, default=0.0, help="requests due before it are sent and not counted")
    add(
        "--window", action="append", default=[], metavar="FROM:TO",
        help="seconds of the trace whose figures are reported, too; repeated for several",
    )  # fmt: skip
    add(
        "--objective", action="append", default=[], metavar="FIGURE[@FROM:TO]>=NUMBER",
        help=f"exit status {OBJECTIVE_MISSED} when it is missed; <= likewise; repeated for several",
    )  # fmt: skip
    add("--late-send-ms", type=float, default=LATE_SEND_MS, help="a send further behind is late (default: %(default)s)")
    add("--outstanding-limit", type=int, default=OUTSTANDING_LIMIT, help="more are not sent (default: %(default)s)")
    add("--request-limit-s", type=float, default=REQUEST_LIMIT_S, help="then it failed (default: %(default)s)")
    add("--peak-window-s", type=float, default=1.0, help="for the peak rate of the trace (default: %(default)s)")
    add("--requests", action="store_true", help=f"write {REQUESTS}, one line for each request counted")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for results, report and plots")


def run_run(arguments: argparse.Namespace) -> None:
    """Replay a trace and report on it; SystemExit 2 when an objective is missed. Raises ValueError for bad input."""
    if urlsplit(arguments.url).scheme not in ("http", "https"):
        raise ValueError(f"URL is {arguments.url}; allowed: one that begins with http:// or https://")
    objectives = [parse_objective(text) for text in arguments.objective]
    windows = [parse_window(text) for text in arguments.window]
    trace = read_trace(arguments.trace)
    facts = _facts(trace, arguments)
    _check_spans(arguments, facts.duration_s, [*windows, *(o.window for o in objectives if o.window)])
    limits_ms = _limits_ms(trace, arguments.slo_ms, arguments.trace)
    images = read_images_by_name(arguments.images, trace.image)
    limits = Limits(arguments.outstanding_limit, arguments.request_limit_s)
    arguments.out.mkdir(parents=True, exist_ok=True)
    _say(f"{len(trace):,} requests, {facts.duration_s:g} s")
    measured_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    playback = play(arguments.url, list(_posts(trace, images)), limits)
    counted = [
        answer_of(exchange, image, images[image].label, limit_ms)
        for exchange, image, limit_ms in zip(playback.exchanges, trace.image, limits_ms, strict=True)
        if exchange.at_s >= arguments.warm_up_s
    ]
    figures_of = _figures_of(counted, arguments, facts.duration_s)
    record = RunRecord(
        label=arguments.label,
        measured_at=measured_at,
        machine=describe(),
        command=shown_command("run", arguments),
        url=without_user(arguments.url),
        trace=facts,
        warm_up_s=arguments.warm_up_s,
        slo_ms=arguments.slo_ms,
        generator=_generator(playback, limits, arguments.late_send_ms),
        figures=figures_of(None),
        windows=tuple(map(figures_of, windows)),
        seconds=tuple(by_second(counted, arguments.warm_up_s, facts.duration_s, arguments.late_send_ms)),
        findings=tuple(judge(objective, figures_of) for objective in objectives),
    )
    if arguments.requests:
        (arguments.out / REQUESTS).write_text(requests_csv(counted), encoding="utf-8")
    _leave(record, arguments.out)


def _leave(record: RunRecord, folder: Path) -> None:
    """Write results, report and plots, say what was found, and end with status 2 when an objective is missed."""
    record.save(folder / RESULTS)
    plots = _plots()
    drawn = plots.draw_run(record, folder) if plots else []
    (folder / REPORT).write_text(markdown(record, [path.name for path in drawn]), encoding="utf-8")
    print(folder / REPORT)
    for finding in record.findings:
        print(_sentence(finding))
    if not all(finding.met for finding in record.findings):
        sys.exit(OBJECTIVE_MISSED)


def configure_compare(parser: argparse.ArgumentParser) -> None:
    """The flags of ``slicewise-load compare``."""
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json", help="what slicewise-load run wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the table and the plots")


def run_compare(arguments: argparse.Namespace) -> None:
    """Write a table and plots of several runs. Raises ValueError for a file that is no result of a run."""
    records = [RunRecord.load(path) for path in arguments.results]
    arguments.out.mkdir(parents=True, exist_ok=True)
    plots = _plots()
    drawn = plots.draw_comparison(records, arguments.out) if plots else []
    text = comparison_markdown(records, [path.name for path in drawn])
    (arguments.out / COMPARISON).write_text(text, encoding="utf-8")
    print(arguments.out / COMPARISON)


def _facts(trace: Trace, arguments: argparse.Namespace) -> TraceFacts:
    """Raises ValueError for a trace without a request."""
    if not len(trace):
        raise ValueError(f"{arguments.trace}: no request; allowed: 1 or more")
    origin, arrivals = read_origin(arguments.trace), as_arrivals(trace)
    # A trace of unknown origin is taken to end with the second of its last request.
    duration_s = origin.duration_s if origin else math.floor(trace.at_s[-1]) + 1.0
    return TraceFacts(
        name=arguments.trace.name,
        sha256=hashlib.sha256(arguments.trace.read_bytes()).hexdigest(),
        kind=origin.kind if origin else "file",
        parameters=origin.parameters if origin else {},
        seed=origin.seed if origin else None,
        mixes=origin.mixes if origin else (),
        requests=len(trace),
        duration_s=duration_s,
        mean_rate_per_s=traces.mean_rate(arrivals, duration_s),
        peak_rate_per_s=traces.peak_rate(arrivals, arguments.peak_window_s),
        peak_window_s=arguments.peak_window_s,
        cv2=traces.measured_cv2(arrivals),
    )


def _check_spans(arguments: argparse.Namespace, duration_s: float, windows: Sequence[Window]) -> None:
    warm_up_s = arguments.warm_up_s
    if not 0 <= warm_up_s < duration_s:
        raise ValueError(f"warm-up is {warm_up_s:g} s; allowed: 0 s or more, below the trace's {duration_s:g} s")
    for window in windows:
        if window.start_s < warm_up_s or window.end_s > duration_s:
            raise ValueError(f"window is {window} s; allowed: within the counted {warm_up_s:g}:{duration_s:g} s")


def _limits_ms(trace: Trace, slo_ms: float | None, path: Path) -> list[float]:
    """Latency up to which each request is met: its Latency-Budget, or the SLO. Raises ValueError without either."""
    if slo_ms is not None and not 0 < slo_ms < math.inf:
        raise ValueError(f"SLO is {slo_ms:g} ms; allowed: above 0 ms")
    texts = next((v for name, v in trace.headers.items() if name.lower() == _BUDGET_HEADER), ("",) * len(trace))
    limits_ms = []
    for line, text in enumerate(texts, start=2):
        try:
            limit_ms = budget_ms(text) if text else slo_ms
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from error
        if limit_ms is None:
            raise ValueError(f"{path}:{line}: a request without Latency-Budget; --slo-ms says when it is met")
        limits_ms.append(limit_ms)
    return limits_ms


def _posts(trace: Trace, images: dict[int, LabelledImage]) -> Iterator[Post]:
    for place, (at_s, index) in enumerate(zip(trace.at_s, trace.image, strict=True)):
        image = images[index].image
        yield Post(at_s, image.data, {"Content-Type": image.media_type, **trace.headers_of(place)})


def _figures_of(
    counted: Sequence[Answer], arguments: argparse.Namespace, duration_s: float
) -> Callable[[Window | None], Figures]:
    def figures_of(window: Window | None) -> Figures:
        window = window or Window(arguments.warm_up_s, duration_s)
        return figures(counted, window.start_s, window.end_s, arguments.late_send_ms)

    return figures_of


def _generator(playback: Playback, limits: Limits, late_send_ms: float) -> Generator:
    return Generator(
        event_loop=playback.event_loop,
        cpu_s=playback.cpu_s,
        cpu_ms_per_request=playback.cpu_s * 1e3 / len(playback.exchanges),
        outstanding_peak=playback.outstanding_peak,
        outstanding_limit=limits.outstanding,
        request_limit_s=limits.request_s,
        late_send_ms=late_send_ms,
    )


def _plots() -> ModuleType | None:
    """What draws; None, and a line that says so, without matplotlib."""
    try:
        from loadtest import run_plots  # late: nothing else here needs matplotlib
    except ModuleNotFoundError as error:
        _say(f"no plots: {error.name} is not installed")
        return None
    return run_plots


def _sentence(finding: Finding) -> str:
    value = "nothing" if finding.value is None else f"{finding.value:.6g}"
    return f"{'met' if finding.met else 'missed'}: {finding.objective}, measured {value}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
