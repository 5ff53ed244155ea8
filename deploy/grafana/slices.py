"""The first half of the details page: what the gate wished, what was served, what it cost and what it was worth."""

from __future__ import annotations

from deploy.grafana.panels import About, Query, Section, graph, shares, stacked, table, up_to_one
from deploy.grafana.queries import (
    ACCURACY,
    COMPUTE,
    DECISIONS,
    GATE_RAN,
    IMAGES,
    MADDS,
    part,
    rate,
    series,
    served_mean,
    share,
    shift,
    total,
    wished_mean,
)

WASTED = 'stage="trunk",width="none"'
WIDTH = "width {{width}}"


def _decisions() -> Section:
    decisions = f"increase({series(DECISIONS)}[$__range])"
    return Section(
        "The gate's wish, and what was served",
        (
            graph(
                About(
                    "The gate's wish",
                    "Share of images that the gate wished at each width, where it was asked. It depends on the images "
                    "and the operating point alone, never on load: when it moves, the images have changed.",
                    "percentunit",
                ),
                Query(share("gate_width", rate(DECISIONS, GATE_RAN)), "width {{gate_width}}"),
                change=shares,
            ),
            graph(
                About(
                    "Served width",
                    "Share of images answered at each width. Compare it with the wish on its left; the difference is "
                    "explained on its right.",
                    "percentunit",
                ),
                Query(share("served_width", rate(DECISIONS)), "width {{served_width}}"),
                change=shares,
            ),
            graph(
                About(
                    "Images per second by reason",
                    "Why images got the width they got. Much load: too few replicas. Much latency_budget: deadlines "
                    "that only narrow slices meet. policy: a policy that never asks the gate is in use.",
                    "short",
                ),
                Query(total("reason", rate(DECISIONS)), "{{reason}}"),
                change=stacked,
            ),
            table(
                About(
                    "Wish against served, over the time shown",
                    "Images by what the gate wished, what they were served at and why; none: the gate did not run. The "
                    "first lines are where most is gained or lost.",
                    "short",
                    24,
                ),
                Query(f"sort_desc({total('gate_width, served_width, reason', decisions)})"),
                ("gate_width", "served_width", "reason"),
                "images",
            ),
        ),
    )


def _madds() -> Section:
    answered = rate(MADDS, 'width!="none"')
    per_image = f"{total('width', answered)} / {total('width', rate(IMAGES))}"
    return Section(
        "What it costs: multiply-adds",
        (
            graph(
                About(
                    "MAdds per second, by width",
                    "The ledger: multiply-adds of useful rows, by the width that the image was served at. none: trunks "
                    "of images whose body never ran; if that is much, callers leave or deadlines pass in the queue.",
                    "short",
                ),
                Query(total("width", rate(MADDS)), WIDTH),
                change=stacked,
            ),
            graph(
                About(
                    "MAdds per image, by width",
                    "Spent over answered, for each width. A line above the slice's own cost: images were computed and "
                    "then nobody was there to get the answer.",
                    "short",
                ),
                Query(per_image, WIDTH),
            ),
            graph(
                About(
                    "MAdds per image: spent, served, wished",
                    "Spent: all multiply-adds over all answers. Served, and wished where the gate was asked: the cost "
                    "of those slices. Spent above served is work for nobody; served below wished is what load saves.",
                    "short",
                ),
                Query(f"{total('', rate(MADDS))} / {total('', rate(IMAGES))}", "spent"),
                Query(served_mean("slicewise_slice_madds"), "served"),
                Query(wished_mean("slicewise_slice_madds"), "wished"),
            ),
        ),
    )


def _worker_time() -> Section:
    bodies = rate(COMPUTE, 'stage="body"')
    return Section(
        "What it costs: worker time, and work for nobody",
        (
            graph(
                About(
                    "Worker seconds per second, by width",
                    "What each width takes of the workers; width none is the trunk, which all images share. The sum "
                    "near the number of workers is saturation.",
                    "short",
                ),
                Query(total("stage, width", rate(COMPUTE)), "{{stage}} {{width}}"),
                change=stacked,
            ),
            graph(
                About(
                    "Worker seconds per image, by width",
                    "Time of a body over the images it answered. A wider one must take longer. If not, "
                    "the latency table is to be measured again: slicewise profile.",
                    "s",
                ),
                Query(f"{total('width', bodies)} / {total('width', rate(IMAGES))}", WIDTH),
            ),
            graph(
                About(
                    "Trunk MAdds for nobody",
                    "Share of all multiply-adds spent on trunks whose body never ran. More than a few percent: callers "
                    "time out before they are served, so shorten the queue or lengthen their patience.",
                    "percentunit",
                ),
                Query(part(rate(MADDS, WASTED), rate(MADDS)), "never answered"),
            ),
        ),
    )


def _accuracy() -> Section:
    ladder = f"max by (width) ({series(ACCURACY)})"
    return Section(
        "How good the answers are",
        (
            graph(
                About(
                    "Accuracy served",
                    "Top-1 on the test split of the slices that were served, weighted by images. Served below wished: "
                    "see reasons. Both fall together: the images became easier for the gate, or the point cheaper.",
                    "percentunit",
                    12,
                ),
                Query(served_mean(ACCURACY), "served"),
                Query(wished_mean(ACCURACY), "wished"),
                floor=None,
            ),
            graph(
                About(
                    "Accuracy of the ladder",
                    "Top-1 of every slice on the test split, as the checkpoint states it. It only moves when another "
                    "version is served.",
                    "percentunit",
                    12,
                ),
                Query(ladder, WIDTH),
                floor=None,
            ),
        ),
    )


def _drift() -> Section:
    was = "rate({}[10m] offset $baseline)"
    now, then = rate(IMAGES, window="10m"), was.format(series(IMAGES))
    return Section(
        "Drift: is the mix what it was $baseline ago?",
        (
            graph(
                About(
                    "Width share now",
                    "Share of images at each width over ten minutes.",
                    "percentunit",
                ),
                Query(share("width", now), WIDTH),
                change=shares,
            ),
            graph(
                About(
                    "Width share $baseline ago",
                    "The same, $baseline before. Empty where Prometheus has no data that old.",
                    "percentunit",
                ),
                Query(share("width", then), WIDTH),
                change=shares,
            ),
            graph(
                About(
                    "How far the mix has moved",
                    "Half the sum of the changes of all shares: 0 the same mix, 1 another one altogether. wished "
                    "moved: the images changed, or the operating point. Only served moved: load or budgets.",
                    "percentunit",
                ),
                Query(shift("gate_width", DECISIONS, GATE_RAN), "wished"),
                Query(shift("width", IMAGES), "served"),
                change=up_to_one,
            ),
        ),
    )


def sections() -> tuple[Section, ...]:
    """These rows, top to bottom."""
    return (_decisions(), _madds(), _worker_time(), _accuracy(), _drift())
