"""Write the dashboards: ``python -m deploy.grafana.build``, in the root of the repository.

A section is a function that returns a row's title and its panels. To add one, write it in ``overview``,
``slices`` or ``serving`` and name it in ``sections()`` there. The test suite compares the files with what this
would write, and asks a real Prometheus every query.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard

from deploy.grafana import overview, serving, slices
from deploy.grafana.panels import SOURCE, Section

FOLDER = Path(__file__).parent / "dashboards"
TAG = "slicewise"
EVERYTHING = dashboard.VariableOption(selected=True, text=["All"], value=["$__all"])
BASELINES = {"1 hour": "1h", "1 day": "1d", "1 week": "1w"}


def _variables(with_baseline: bool) -> list[Builder[dashboard.VariableModel]]:
    source = builders.DatasourceVariable("datasource").label("Data source").type("prometheus")
    # One model at a time: a width is an index in the ladder of one model and means nothing beside another's.
    model = (
        builders.QueryVariable("model")
        .label("Model")
        .datasource(SOURCE)
        .query("label_values(slicewise_model_info, model)")
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
    )
    instance = (
        builders.QueryVariable("instance")
        .label("Instance")
        .datasource(SOURCE)
        .query('label_values(up{job="slicewise"}, instance)')
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        # Without it "all" would spell out every instance, and miss those that come while the page is open.
        .all_value(".+")
        .current(EVERYTHING)
    )
    options = ", ".join(f"{name} : {value}" for name, value in BASELINES.items())
    chosen = dashboard.VariableOption(selected=True, text="1 hour", value="1h")
    baseline = builders.CustomVariable("baseline").label("Drift since").values(options).current(chosen)
    return [source, model, instance, *([baseline] if with_baseline else [])]


def _dashboard(uid: str, title: str, description: str, sections: Sequence[Section]) -> builders.Dashboard:
    board = (
        builders.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("10s")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .editable()
        .link(
            builders.DashboardLink("Slicewise")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .keep_time(True)
            .include_vars(True)
        )
    )
    uses_baseline = False
    for section in sections:
        board.with_row(builders.Row(section.title))
        for panel in section.panels:
            board.with_panel(panel)
            uses_baseline |= "$baseline" in json.dumps(panel.build(), cls=JSONEncoder)
    return board.variables(_variables(uses_baseline))


def documents() -> dict[str, str]:
    """File name to content, of every dashboard."""
    boards = (
        _dashboard(
            "slicewise-overview",
            "Slicewise: overview",
            "Is the service well, what do clients get, which slices do they get, and how full is it?",
            overview.sections(),
        ),
        _dashboard(
            "slicewise-details",
            "Slicewise: details",
            "What the gate wished and what was served, what it cost, and where time went.",
            [*slices.sections(), *serving.sections()],
        ),
    )
    written = {}
    for board in boards:
        built = board.build()
        for number, panel in enumerate(built.panels or (), 1):
            panel.id_val = number
        written[f"{built.uid}.json"] = json.dumps(built, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
    return written


def main() -> None:
    """Write every dashboard into ``dashboards/``."""
    for name, text in documents().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
