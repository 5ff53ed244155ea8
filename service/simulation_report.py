"""Figures of replays in words: tables, and a page of them. PURE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from service.simulation_figures import Comparison, Dominated, Figures, Interval, Means, means


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table in words. The first ``labels`` columns name the rows, the others hold numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1


def sheets(
    every: Sequence[Figures], comparisons: Sequence[Comparison], beaten: Sequence[Dominated]
) -> list[Sheet]:  # fmt: skip
    """Everything worth a table; those that would be empty are left out."""
    found = [_run_sheet(every), _width_sheet(every), _mean_sheet(means(every))]
    if comparisons:
        found.append(_comparison_sheet(comparisons))
    if beaten:
        rows = [(one.trace, one.policy, ", ".join(one.by)) for one in beaten]
        title = "Dominated: others attain as much and answer as well, and do better in one"
        found.append(Sheet(title, ("trace", "policy", "by"), rows, labels=3))
    return found


_OF_ALL = ("attainment", "top-1", "p right", "M MAdds", "p50 ms", "p99 ms")


def _run_sheet(every: Sequence[Figures]) -> Sheet:
    columns = ("trace", "policy", "images", "met", "late", "expired", "refused", "infeasible", *_OF_ALL, "wall µs")
    rows = [
        (
            one.trace, one.policy, *map(str, (one.images, one.met, one.late, one.expired, one.refused, one.infeasible)),
            *_of_all(one), f"{one.wall_us:.0f}",
        )
        for one in every
    ]  # fmt: skip
    return Sheet("Every trace under every policy", columns, rows, labels=2)


def _width_sheet(every: Sequence[Figures]) -> Sheet:
    widths = max((len(one.width_shares) for one in every if one.width_shares), default=0)
    rows = [(one.trace, one.policy, *map(_percent, one.width_shares or (None,) * widths)) for one in every]
    return Sheet("Widths of the answers in time", ("trace", "policy", *map(str, range(widths))), rows, labels=2)


def _mean_sheet(every: Sequence[Means]) -> Sheet:
    rows = [(one.policy, str(one.traces), *_of_all(one), f"{one.wall_us:.0f}") for one in every]
    return Sheet("Means over traces", ("policy", "traces", *_OF_ALL, "wall µs"), rows)


def _comparison_sheet(comparisons: Sequence[Comparison]) -> Sheet:
    rows = [(one.policy, _points(one.attainment), _points(one.top1)) for one in comparisons]
    title = f"Difference from {comparisons[0].against}, in percentage points with 95 % intervals"
    return Sheet(title, ("policy", "attainment", "top-1"), rows)


def _of_all(one: Figures | Means) -> tuple[str, ...]:
    mega = None if one.mean_madds is None else one.mean_madds / 1e6
    shares = map(_percent, (one.attainment, one.top1, one.p_right))
    return *shares, *map(_decimals, (mega, one.p50_ms, one.p99_ms))


def _or_dash(form: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "-" if value is None else form(value)


_percent = _or_dash(lambda value: f"{value:.2%}")
_decimals = _or_dash(lambda value: f"{value:.2f}")


def _points(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * x for x in (interval.value, interval.low, interval.high)))


def markdown(title: str, facts: Sequence[tuple[str, str]], command: str, tables: Iterable[Sheet]) -> str:
    """A page: what was assumed, every table, and the command that makes them again."""
    blocks = [f"# {title}", *(_markdown_table(sheet) for sheet in (Sheet("", ("what", "value"), facts, 2), *tables))]
    blocks += [_LEGEND, "## Again", f"```console\n{command}\n```"]
    return "\n\n".join(blocks) + "\n"


_LEGEND = (
    "Attainment is met / (met + late + expired + refused); infeasible images, which no slice is allowed for, are left "
    "out. Top-1, p right (what the calibrated gate expects), MAdds, widths and milliseconds are those of answers in "
    "time. Draws for the intervals take traces and images with replacement and replay nothing again, so they do not "
    "hold what another order of arrivals would have done to the queues; with one trace, only images are drawn."
)


def _markdown_table(sheet: Sheet) -> str:
    rule = ["---"] * sheet.labels + ["---:"] * (len(sheet.columns) - sheet.labels)
    lines = ["| " + " | ".join(cells) + " |" for cells in (sheet.columns, rule, *sheet.rows)]
    return "\n".join([f"## {sheet.title}", "", *lines] if sheet.title else lines)
