"""The PromQL that panels share: selectors with the dashboards' variables, shares, means and quantiles."""

from __future__ import annotations

WINDOW = "$__rate_interval"
NOW = "5m"
"""The window of single numbers: long enough to be steady, short enough to be the present."""
OR_ZERO = " or vector(0)"
"""For counts of what should never happen: nothing counted yet reads as 0, not as a hole."""

# Series that speak of the process, not of one model.
WITHOUT_MODEL = frozenset(
    {
        "up",
        "slicewise_budget_requests_total",
        "slicewise_cache_requests_total",
        "slicewise_dropped_total",
        "slicewise_in_flight_requests",
        "slicewise_rejections_total",
        "slicewise_requests_total",
    }
)

ACCURACY = "slicewise_slice_accuracy_ratio"
BUDGETS = "slicewise_budget_requests_total"
COMPUTE = "slicewise_compute_seconds_total"
DECISIONS = "slicewise_width_decisions_total"
DURATION = "slicewise_request_duration_seconds"
IMAGES = "slicewise_images_total"
MADDS = "slicewise_madds_total"
REJECTIONS = "slicewise_rejections_total"
REQUESTS = "slicewise_requests_total"
TARGET = "slicewise_slo_target_ratio"

NO_PROBE = 'route!~"/healthz|/readyz|/metrics|/v2/health/.*"'
IN_DENOMINATOR = 'result=~"met|late|expired|refused"'
OK = 'outcome="ok"'
GATE_RAN = 'gate_width!="none"'


def series(name: str, *matchers: str) -> str:
    """The selector of one series for the chosen instances and, where it has that label, the chosen model."""
    model = () if name in WITHOUT_MODEL else ('model="$model"',)
    return name + "{" + ",".join((*model, 'instance=~"$instance"', *matchers)) + "}"


def rate(name: str, *matchers: str, window: str = WINDOW) -> str:
    """Per-second rate of a counter."""
    return f"rate({series(name, *matchers)}[{window}])"


def total(by: str, expr: str) -> str:
    """Sum by these labels, or over everything."""
    return f"sum by ({by}) ({expr})" if by else f"sum({expr})"


def share(by: str, expr: str) -> str:
    """Each group's part of the whole, 0..1."""
    return f"{total(by, expr)} / scalar({total('', expr)})"


def part(some: str, whole: str) -> str:
    """What share of ``whole`` is ``some``; 0 while there is none of it."""
    return f"({total('', some)}{OR_ZERO}) / {total('', whole)}"


def mean(name: str, by: str = "") -> str:
    """Mean of what a histogram observed."""
    return f"{total(by, rate(f'{name}_sum'))} / {total(by, rate(f'{name}_count'))}"


def quantile(q: float, name: str, *matchers: str, by: str = "", window: str = WINDOW) -> str:
    """Quantile of a histogram, for each value of ``by``."""
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({q}, {total(labels, rate(f'{name}_bucket', *matchers, window=window))})"


def attainment(by: str = "", window: str = WINDOW) -> str:
    """Met budgets of all but the infeasible, 0..1."""
    met = total(by, rate(BUDGETS, 'result="met"', window=window))
    whole = total(by, rate(BUDGETS, IN_DENOMINATOR, window=window))
    return f"({met} or 0 * {whole}) / {whole}"  # where none was ever met there is no such series


def served_mean(gauge: str, window: str = WINDOW) -> str:
    """Mean over answered images of what the ladder says of their slice: its accuracy, or its cost."""
    images = rate(IMAGES, window=window)
    # Below the line, the comparison is 1 where the gauge exists: images of slices without it count on neither side.
    return f"sum({images} * {series(gauge)}) / sum({images} * ({series(gauge)} >= bool 0))"


def wished_mean(gauge: str, window: str = WINDOW) -> str:
    """The same, had every image been served at the gate's wish; over images whose gate ran."""
    wishes = total("job, instance, model, version, gate_width", rate(DECISIONS, GATE_RAN, window=window))
    ladder = f'label_replace({series(gauge)}, "gate_width", "$1", "width", "(.+)")'
    matched = "on (job, instance, model, version, gate_width) group_left ()"
    return f"sum({wishes} * {matched} {ladder}) / sum({wishes} * {matched} ({ladder} >= bool 0))"


def shift(by: str, name: str, *matchers: str, window: str = "10m") -> str:
    """How far the mix has moved since ``$baseline`` ago: half the sum of the changes of all shares, 0 none .. 1 all."""
    now = total(by, f"rate({series(name, *matchers)}[{window}])")
    then = total(by, f"rate({series(name, *matchers)}[{window}] offset $baseline)")
    # A group that is missing on one side counts there as 0.
    now_all, then_all = f"({now} or 0 * {then})", f"({then} or 0 * {now})"
    return f"0.5 * sum(abs({now_all} / scalar(sum({now})) - {then_all} / scalar(sum({then}))))"
