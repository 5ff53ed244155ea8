"""The operator's page: is it well now, what do clients get, and how full is it?"""

from __future__ import annotations

from deploy.grafana.panels import About, PanelBuilder, Query, Section, graph, shares, stacked, stat, up_to_one
from deploy.grafana.queries import (
    ACCURACY,
    COMPUTE,
    DECISIONS,
    DURATION,
    IMAGES,
    MADDS,
    NO_PROBE,
    NOW,
    OK,
    OR_ZERO,
    REJECTIONS,
    REQUESTS,
    TARGET,
    attainment,
    part,
    quantile,
    rate,
    series,
    served_mean,
    share,
    total,
    wished_mean,
)


def _number(title: str, unit: str, description: str) -> About:
    return About(title, description, unit, 4)


def _health() -> tuple[PanelBuilder, ...]:
    up = series("up", 'job="slicewise"')
    failed, requests = rate(REQUESTS, NO_PROBE, 'code=~"5.."', window=NOW), rate(REQUESTS, NO_PROBE, window=NOW)
    return (
        stat(
            _number("Alerts firing", "short", "Alerts of the service that fire now. More than 0: open Alerts in "
                    "Prometheus and follow the runbook of the alert, in docs/dashboards.md."),
            Query(f'count(ALERTS{{alertname=~"Slicewise.*",alertstate="firing"}}){OR_ZERO}'),
            [(1, "red")],
        ),
        stat(
            _number("Instances down", "short", "Instances that Prometheus cannot scrape. More than 0: look "
                    "whether the process runs, then at its log."),
            Query(f"count({up}) - sum({up})"),
            [(1, "red")],
        ),
        stat(
            _number("Requests", "reqps", "HTTP requests per second, without health checks and scrapes."),
            Query(total("", requests)),
        ),
        stat(
            _number("Answered 5xx", "percentunit", "Share of requests answered 500, 503 or 504. The graph of statuses "
                    "says which: 500 is a fault, 503 too much load, 504 a deadline that could not be kept."),
            Query(part(failed, requests)),
            [(0.01, "orange"), (0.05, "red")],
        ),
        stat(
            _number("Error budget burn", "short", "Share of budgets missed over the share that is allowed. 1 just "
                    "holds the target. Above it, look at latency and at how full the queues are."),
            Query(f"(1 - ({attainment(window=NOW)})) / (1 - max({series(TARGET)}))"),
            [(1, "orange"), (6, "red")],
        ),
        stat(
            _number("Latency, p99", "s", "Last byte of the request to the answer, of answered images. When it "
                    "rises, the stages on the details page say where the time goes."),
            Query(quantile(0.99, DURATION, OK, window=NOW)),
            [(0.5, "orange"), (1, "red")],
        ),
    )  # fmt: skip


def _work() -> tuple[PanelBuilder, ...]:
    images, decisions = rate(IMAGES, window=NOW), rate(DECISIONS, window=NOW)
    return (
        stat(
            _number("Queue fill", "percentunit", "Images that wait over queue_capacity_images. Near 1, requests are "
                    "refused with 503: add replicas before."),
            Query(f"sum({series('slicewise_queue_images')}) / sum({series('slicewise_queue_capacity_images')})"),
            [(0.5, "orange"), (0.8, "red")],
        ),
        stat(
            _number("Images", "short", "Images answered by computing, per second. Fewer than requests: errors, or "
                    "requests that carry none."),
            Query(total("", images)),
        ),
        stat(
            _number("Accuracy served", "percentunit", "Test-split top-1 of the slices that were served, weighted "
                    "by images. An expectation, as good as the images are like that split; on a drop see reasons."),
            Query(served_mean(ACCURACY, NOW)),
        ),
        stat(
            _number("MAdds per image", "short", "Multiply-adds spent, over images answered. A rise: wider slices, or "
                    "work for callers who had left."),
            Query(f"{total('', rate(MADDS, window=NOW))} / {total('', images)}"),
        ),
        stat(
            _number("Narrowed by load", "percentunit", "Share of images served narrower than the gate wished as too "
                    "much waited. For minutes that is what the service is for; for hours the machine is too small."),
            Query(part(rate(DECISIONS, 'reason="load"', window=NOW), decisions)),
            [(0.2, "orange"), (0.5, "red")],
        ),
        stat(
            _number("Workers busy", "short", "Worker seconds per second. Near the number of workers, images can only "
                    "wait or be narrowed: add replicas."),
            Query(total("", rate(COMPUTE, window=NOW))),
        ),
    )  # fmt: skip


def _clients() -> Section:
    return Section(
        "What do clients get?",
        (
            graph(
                About(
                    "Requests by status",
                    "4xx are the clients' to repair; 499 are callers who left. 500: look for batch_failed and "
                    "internal_error in the log. 503: add replicas. 504: deadlines too short, or the service too slow.",
                    "reqps",
                ),
                Query(total("code", rate(REQUESTS, NO_PROBE)), "{{code}}"),
                change=stacked,
            ),
            graph(
                About(
                    "Latency of answers",
                    "Last byte of the request to the answer. When it rises, see the stages on the details page: queue "
                    "means load, decode large images, body a slow machine.",
                    "s",
                ),
                *(Query(quantile(q, DURATION, OK), f"p{round(100 * q)}") for q in (0.5, 0.95, 0.99)),
            ),
            graph(
                About(
                    "SLO attainment against its target",
                    "met / (met + late + expired + refused) of images that stated a budget. Below the target the error "
                    "budget shrinks: see burn rates on the details page.",
                    "percentunit",
                ),
                Query(attainment(), "attainment"),
                Query(f"max({series(TARGET)})", "target"),
                change=up_to_one,
            ),
        ),
    )


def _slices() -> Section:
    return Section(
        "Which slices do they get?",
        (
            graph(
                About(
                    "Width share",
                    "Which slice answered, as share of images; 0 is the narrowest. A shift without a change of reasons "
                    "means other images than before: see drift on the details page.",
                    "percentunit",
                ),
                Query(share("width", rate(IMAGES)), "width {{width}}"),
                change=shares,
            ),
            graph(
                About(
                    "Why that width",
                    "Which rule had its way. gate: the gate's wish, unchanged. load: add replicas if it lasts. "
                    "compute_budget, accuracy_floor, latency_budget, forced: the clients asked for it.",
                    "percentunit",
                ),
                Query(share("reason", rate(DECISIONS)), "{{reason}}"),
                change=shares,
            ),
            graph(
                About(
                    "Accuracy: served, wished, possible",
                    "Expected top-1 of what was served, of the gate's wish where it was asked, and of the best slice. "
                    "Served below wished is the cost of load and budgets; wished below best, of the operating point.",
                    "percentunit",
                ),
                Query(served_mean(ACCURACY), "served"),
                Query(wished_mean(ACCURACY), "wished"),
                Query(f"max({series(ACCURACY)})", "best slice"),
                floor=None,
            ),
        ),
    )


def _fullness() -> Section:
    return Section(
        "How full is it?",
        (
            graph(
                About(
                    "Images waiting, and capacity",
                    "At the capacity requests are refused with 503. A queue that never empties: add replicas, or "
                    "choose a cheaper operating_point.",
                    "short",
                ),
                Query(total("", series("slicewise_queue_images")), "waiting"),
                Query(total("", series("slicewise_queue_capacity_images")), "capacity"),
            ),
            graph(
                About(
                    "Workers busy, by instance",
                    "Worker seconds per second. A level line at the number of workers is saturation; instances far "
                    "apart mean an uneven balancer.",
                    "short",
                ),
                Query(total("instance", rate(COMPUTE)), "{{instance}}"),
            ),
            graph(
                About(
                    "Refused and failed, by reason",
                    "Errors by their error_type; docs/operations.md says what to do about each status.",
                    "reqps",
                ),
                Query(total("reason", rate(REJECTIONS)), "{{reason}}"),
                change=stacked,
            ),
        ),
    )


def sections() -> tuple[Section, ...]:
    """The rows of the overview, top to bottom."""
    return (Section("Now: is it well?", (*_health(), *_work())), _clients(), _slices(), _fullness())
