"""PURE: what became of each request of an open loop, and the figures of many.

Latency runs from the instant at which a request was due, not from when it was sent, to the last byte of its answer:
a generator or a server that falls behind is charged for it.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from loadtest.figures import percentile

NOT_SENT = "not_sent"
"""Error type of a request that found as many others outstanding as the generator allows."""
LATE_SEND_MS = 1.0
"""A request sent further behind its instant counts as a late send."""
_BUDGET = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>ms|s|)", re.ASCII | re.IGNORECASE)
_MS_PER_UNIT = {"": 1.0, "ms": 1.0, "s": 1e3}


class Fate(StrEnum):
    """What became of a request.

    MET         200 within its limit.
    LATE        200 after it.
    EXPIRED     504: the service gave up after waiting.
    REFUSED     429, 503, or 504 at once: nothing was queued.
    INFEASIBLE  422: no slice satisfies its budgets. The only fate outside the denominator of the attainment.
    FAILED      anything else: other statuses, broken connections, no answer in time, not sent.
    """

    MET = "met"
    LATE = "late"
    EXPIRED = "expired"
    REFUSED = "refused"
    INFEASIBLE = "infeasible"
    FAILED = "failed"


_FATE_OF_STATUS = {504: Fate.EXPIRED, 503: Fate.REFUSED, 429: Fate.REFUSED, 422: Fate.INFEASIBLE}


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request as it went, nothing parsed.

    at_s         when it was due, from the start of the trace.
    send_late_s  how far behind that it was sent; None when it was not.
    latency_s    from when it was due to the last byte of the answer; None without an answer.
    status       HTTP status; 0 without an answer.
    failure      why there is no answer: the exception's name or ``NOT_SENT``.
    headers      those of the answer; names in any case.
    """

    at_s: float
    send_late_s: float | None
    latency_s: float | None = None
    status: int = 0
    failure: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as it is judged. Texts are empty, and numbers None, where the answer does not say.

    image         index into the images of the trace.
    label         the image's true class; empty when unknown.
    limit_ms      latency up to which it is met.
    send_late_ms  how far behind its instant it was sent; None when it was not.
    error_type    the service's word for an error, or why there is no answer.
    outcome       the service's word for how a deadline was missed.
    predicted     label of the most probable class.
    """

    at_s: float
    image: int
    label: str
    limit_ms: float
    send_late_ms: float | None
    latency_ms: float | None
    status: int
    error_type: str = ""
    width: str = ""
    gate_width: str = ""
    reason: str = ""
    madds: int | None = None
    predicted: str = ""
    outcome: str = ""

    @property
    def fate(self) -> Fate:
        if self.status == 200 and self.latency_ms is not None:
            return Fate.MET if self.latency_ms <= self.limit_ms else Fate.LATE
        if self.status == 504 and self.outcome == Fate.REFUSED:
            return Fate.REFUSED
        return _FATE_OF_STATUS.get(self.status, Fate.FAILED)


def budget_ms(text: str) -> float:
    """A ``Latency-Budget`` in ms. Raises ValueError with its grammar."""
    found = _BUDGET.fullmatch(text)
    milliseconds = float(found["number"]) * _MS_PER_UNIT[found["unit"].lower()] if found else 0.0
    if not 0 < milliseconds < math.inf:
        raise ValueError(f"Latency-Budget is {text!r}; allowed: a decimal above 0 with suffix ms or s, or none for ms")
    return milliseconds


def answer_of(exchange: Exchange, image: int, label: str, limit_ms: float) -> Answer:
    """Read the answer; a body that is not the JSON expected leaves its fields empty."""
    headers, said = exchange.headers, _json_object(exchange.body)
    madds = headers.get("Compute-MAdds", "")
    good = exchange.status == 200
    return Answer(
        at_s=exchange.at_s,
        image=image,
        label=label,
        limit_ms=limit_ms,
        send_late_ms=None if exchange.send_late_s is None else exchange.send_late_s * 1e3,
        latency_ms=None if exchange.latency_s is None else exchange.latency_s * 1e3,
        status=exchange.status,
        error_type=exchange.failure or ("" if good else _text(said.get("error_type"))),
        width=headers.get("Slice-Width", "") if good else "",
        gate_width=headers.get("Slice-Gate-Width", "") if good else "",
        reason=headers.get("Slice-Reason", "") if good else "",
        madds=int(madds) if good and madds.isascii() and madds.isdigit() else None,
        predicted=_first_label(said) if good else "",
        outcome=_text(said.get("outcome")),
    )


def _json_object(body: bytes) -> dict[str, object]:
    try:
        said = json.loads(body)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _first_label(said: Mapping[str, object]) -> str:
    predictions = said.get("predictions")
    first = predictions[0] if isinstance(predictions, list) and predictions else None
    return _text(first.get("label")) if isinstance(first, dict) else ""


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


@dataclass(frozen=True, slots=True)
class Figures:
    """The requests that were due in [start_s, end_s). None stands for a figure that nothing was measured for.

    met .. failed        requests by their fate; not_sent is a part of failed.
    attainment           met / all but the infeasible.
    arrivals_per_s       requests due; throughput_per_s: answered with 200; goodput_per_s: met.
    p50_ms .. p99_9_ms   latency of those answered with 200.
    top1                 share of the met whose most probable class is the image's label, of those with a label.
    mean_madds           multiply-adds per image, of those answered with 200.
    late_sends           sent more than ``LATE_SEND_MS`` behind their instant, or the threshold that was given.
    send_late_p99_ms     how far behind its instant a request was sent, over all that were; and the maximum.
    widths, gate_widths  answers with 200 by the slice served, and by the gate's wish.
    reasons              answers with 200 by what decided the slice.
    statuses             requests by HTTP status, ``none`` without an answer.
    errors               requests without a 200, by error type.
    """

    start_s: float
    end_s: float
    requests: int
    met: int
    late: int
    expired: int
    refused: int
    infeasible: int
    failed: int
    not_sent: int
    attainment: float | None
    arrivals_per_s: float
    throughput_per_s: float
    goodput_per_s: float
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    p99_9_ms: float | None
    top1: float | None
    mean_madds: float | None
    late_sends: int
    send_late_p99_ms: float | None
    send_late_max_ms: float | None
    widths: dict[str, int]
    gate_widths: dict[str, int]
    reasons: dict[str, int]
    statuses: dict[str, int]
    errors: dict[str, int]


NUMBERS = tuple(
    name
    for name, kind in Figures.__annotations__.items()
    if kind != "dict[str, int]" and name not in ("start_s", "end_s")
)
"""Names of the figures that are one number."""


def figures(answers: Sequence[Answer], start_s: float, end_s: float, late_send_ms: float = LATE_SEND_MS) -> Figures:
    """The figures of those of the answers, in the order of their instants, that were due in [start_s, end_s).

    Raises ValueError for an interval without length.
    """
    if not start_s < end_s:
        raise ValueError(f"interval from {start_s:g} s to {end_s:g} s; allowed: from < to")
    first, last = (bisect_left(answers, bound_s, key=lambda answer: answer.at_s) for bound_s in (start_s, end_s))
    due = answers[first:last]
    fates = Counter(answer.fate for answer in due)
    good = [answer for answer in due if answer.fate in (Fate.MET, Fate.LATE)]
    labelled = [answer for answer in due if answer.fate is Fate.MET and answer.label]
    latencies_ms = [answer.latency_ms for answer in good if answer.latency_ms is not None]
    send_late_ms = [answer.send_late_ms for answer in due if answer.send_late_ms is not None]
    seconds = end_s - start_s
    return Figures(
        start_s=start_s,
        end_s=end_s,
        requests=len(due),
        **{fate.value: fates[fate] for fate in Fate},
        not_sent=sum(answer.error_type == NOT_SENT for answer in due),
        attainment=_share(fates[Fate.MET], len(due) - fates[Fate.INFEASIBLE]),
        arrivals_per_s=len(due) / seconds,
        throughput_per_s=len(good) / seconds,
        goodput_per_s=fates[Fate.MET] / seconds,
        p50_ms=_percentile(latencies_ms, 50),
        p90_ms=_percentile(latencies_ms, 90),
        p99_ms=_percentile(latencies_ms, 99),
        p99_9_ms=_percentile(latencies_ms, 99.9),
        top1=_share(sum(answer.predicted == answer.label for answer in labelled), len(labelled)),
        mean_madds=_mean([answer.madds for answer in good if answer.madds is not None]),
        late_sends=sum(late_ms > late_send_ms for late_ms in send_late_ms),
        send_late_p99_ms=_percentile(send_late_ms, 99),
        send_late_max_ms=max(send_late_ms, default=None),
        widths=_counts(answer.width for answer in good),
        gate_widths=_counts(answer.gate_width for answer in good),
        reasons=_counts(answer.reason for answer in good),
        statuses=_counts(str(answer.status or "none") for answer in due),
        errors=_counts(answer.error_type or "unnamed" for answer in due if answer.status != 200),
    )


def by_second(
    answers: Sequence[Answer], start_s: float, end_s: float, late_send_ms: float = LATE_SEND_MS
) -> list[Figures]:
    """The figures of each second of the trace within [start_s, end_s); the first and the last may be cut short."""
    bounds = [start_s, *range(math.floor(start_s) + 1, math.ceil(end_s)), end_s]
    return [figures(answers, float(a), float(b), late_send_ms) for a, b in itertools.pairwise(bounds)]


def _counts(names: Iterable[str]) -> dict[str, int]:
    """How often each name occurs, sorted; empty ones are left out."""
    return dict(sorted(Counter(name for name in names if name).items()))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return percentile(values, percent) if values else None


def _mean(values: Sequence[int]) -> float | None:
    return sum(values) / len(values) if values else None
