"""Panels for what the service does not measure yet. They are in no dashboard.

When the series, or the error type, that a panel needs has come, the test suite says so: move the panel into a
section of ``slices`` or ``serving`` and write the files anew.
"""

from __future__ import annotations

from deploy.grafana.panels import About, Planned, Query, graph, shares, stacked
from deploy.grafana.queries import REJECTIONS, rate, share, total

CACHE = "slicewise_cache_requests_total"

PLANNED: tuple[Planned, ...] = (
    Planned(
        CACHE,
        graph(
            About(
                "Cache",
                "Share of images by what the cache said. error: the store is away, and every image is computed. Few "
                "hits with many repeats: entries expire too soon.",
                "percentunit",
            ),
            Query(share("result", rate(CACHE)), "{{result}}"),
            change=shares,
        ),
    ),
    Planned(
        "quota",
        graph(
            About(
                "Refused for a spent quota",
                "Requests whose client has spent its compute. One client's business, unless it rises for all at once: "
                "then look at the quota's setting.",
                "reqps",
            ),
            Query(total("reason", rate(REJECTIONS, 'reason="quota"')), "{{reason}}"),
        ),
    ),
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
