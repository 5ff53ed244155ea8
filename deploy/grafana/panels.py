"""The few kinds of panel that the dashboards are made of.

A panel's description says what it shows and what to do about it. Units are Grafana's: ``percentunit`` is a
ratio 0..1, ``reqps`` requests per second, ``short`` a plain number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as dashboard_builders
from grafana_foundation_sdk.builders import heatmap as heatmap_builders
from grafana_foundation_sdk.builders import prometheus as prometheus_builders
from grafana_foundation_sdk.builders import stat as stat_builders
from grafana_foundation_sdk.builders import table as table_builders
from grafana_foundation_sdk.builders import timeseries as timeseries_builders
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common, dashboard, heatmap, prometheus

from deploy.grafana.queries import WINDOW, series, total

SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")


PanelBuilder = Builder[dashboard.Panel]
"""A panel of any kind, about to be built."""


@dataclass(frozen=True, slots=True)
class Section:
    """A row of a dashboard: the question it answers and the panels that do."""

    title: str
    panels: tuple[PanelBuilder, ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """A panel that waits. needs: the series, or the error type, without which it would be empty."""

    needs: str
    panel: PanelBuilder


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression and how its series are called in the legend."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class About:
    """What every panel has: its title, what it means and what to do about it, its unit and its width of 24."""

    title: str
    description: str
    unit: str
    span: int = 8


def _target(query: Query, index: int) -> prometheus_builders.Dataquery:
    target = prometheus_builders.Dataquery().ref_id(chr(ord("A") + index)).expr(query.expr).datasource(SOURCE)
    return target.legend_format(query.legend) if query.legend else target


def _steps(limits: Sequence[tuple[float, str]], first: str = "green") -> dashboard_builders.ThresholdsConfig:
    steps = [dashboard.Threshold(None, first), *(dashboard.Threshold(value, color) for value, color in limits)]
    return dashboard_builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)


def stat(about: About, query: Query, limits: Sequence[tuple[float, str]] = (), first: str = "green") -> PanelBuilder:
    """One number as it is now, coloured by limits that rise; ``first`` is the colour below the first of them."""
    panel = (
        stat_builders.Panel()
        .title(about.title)
        .description(about.description)
        .datasource(SOURCE)
        .unit(about.unit)
        .span(about.span)
        .height(4)
        .graph_mode(common.BigValueGraphMode.AREA)
        .color_mode(common.BigValueColorMode.VALUE if limits else common.BigValueColorMode.NONE)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .thresholds(_steps(limits, first))
    )
    return panel.with_target(_target(query, 0))


Change = Callable[[timeseries_builders.Panel], timeseries_builders.Panel]


def stacked(panel: timeseries_builders.Panel) -> timeseries_builders.Panel:
    """Areas on top of each other, for parts of one whole."""
    stacking = common_builders.StackingConfig().mode(common.StackingMode.NORMAL).group("A")
    return panel.stacking(stacking).fill_opacity(50).line_width(0)


def shares(panel: timeseries_builders.Panel) -> timeseries_builders.Panel:
    """Stacked, and the axis ends at the whole."""
    return stacked(panel).max(1)


def up_to_one(panel: timeseries_builders.Panel) -> timeseries_builders.Panel:
    """The axis ends at 1."""
    return panel.max(1)


def graph(about: About, *queries: Query, change: Change | None = None, floor: float | None = 0) -> PanelBuilder:
    """Lines over time, from 0 upwards unless ``floor`` says otherwise."""
    legend = common_builders.VizLegendOptions().show_legend(True).display_mode(common.LegendDisplayMode.LIST)
    tooltip = common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.NONE)
    panel = (
        timeseries_builders.Panel()
        .title(about.title)
        .description(about.description)
        .datasource(SOURCE)
        .unit(about.unit)
        .span(about.span)
        .height(8)
        .fill_opacity(8)
        .show_points(common.VisibilityMode.NEVER)
        .legend(legend.placement(common.LegendPlacement.BOTTOM).calcs([]))
        .tooltip(tooltip)
    )
    if floor is not None:
        panel = panel.min(floor)
    for index, query in enumerate(queries):
        panel = panel.with_target(_target(query, index))
    return change(panel) if change else panel


def heat_map(about: About, name: str, *matchers: str) -> PanelBuilder:
    """A histogram over time: the darker, the more fell into that bucket."""
    expr = total("le", f"increase({series(f'{name}_bucket', *matchers)}[{WINDOW}])")
    target = _target(Query(expr, "{{le}}"), 0).format(prometheus.PromQueryFormat.HEATMAP)
    color = heatmap_builders.HeatmapColorOptions().mode(heatmap.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    return (
        heatmap_builders.Panel()
        .title(about.title)
        .description(about.description)
        .datasource(SOURCE)
        .span(about.span)
        .height(8)
        .calculate(False)
        .color(color.exponent(0.5).fill("dark-orange"))
        .y_axis(heatmap_builders.YAxisConfig().unit(about.unit))
        .cell_values(heatmap_builders.CellValues().unit("short"))
        # Buckets without a single observation are left blank.
        .filter_values(heatmap_builders.FilterValueRange().le(1e-9))
        .with_target(target)
    )


def table(about: About, query: Query, labels: Sequence[str], value: str) -> PanelBuilder:
    """The series of this moment, one line each, greatest first. value: the heading of the last column."""
    target = _target(query, 0).format(prometheus.PromQueryFormat.TABLE).instant()
    options = {
        "excludeByName": {"Time": True},
        "indexByName": {name: index for index, name in enumerate([*labels, "Value"])},
        "renameByName": {"Value": value},
    }
    return (
        table_builders.Panel()
        .title(about.title)
        .description(about.description)
        .datasource(SOURCE)
        .unit(about.unit)
        .span(about.span)
        .height(8)
        .with_transformation(dashboard.DataTransformerConfig(id_val="organize", options=options))
        .sort_by([common_builders.TableSortByFieldState().display_name(value).desc(True)])
        .with_target(target)
    )
