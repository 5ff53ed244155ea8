"""Panels for what the service does not measure yet. They are in no dashboard.

When the series, or the error type, that a panel needs has come, the test suite says so: move the panel into a
section of ``slices`` or ``serving`` and write the files anew.
"""

from __future__ import annotations

from deploy.grafana.panels import About, Planned, Query, graph, stacked
from deploy.grafana.queries import rate, total

PLANNED: tuple[Planned, ...] = (
    Planned(
        "slicewise_padded_rows_total",
        graph(
            About(
                "Padded rows",
                "Rows computed only to fill a fixed shape, per second. Many beside few images: the shapes are too far "
                "apart.",
                "short",
            ),
            Query(total("stage", rate("slicewise_padded_rows_total")), "{{stage}}"),
            change=stacked,
        ),
    ),
)
