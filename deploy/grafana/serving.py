"""The second half of the details page: budgets, latency, queues, batches and errors."""

from __future__ import annotations

from deploy.grafana.panels import About, Query, Section, graph, heat_map, shares, stacked, up_to_one
from deploy.grafana.queries import (
    BUDGETS,
    DURATION,
    NO_PROBE,
    OK,
    REJECTIONS,
    REQUESTS,
    TARGET,
    attainment,
    mean,
    quantile,
    rate,
    series,
    share,
    total,
)


def _slo() -> Section:
    return Section(
        "SLO: are budgets kept?",
        (
            graph(
                About(
                    "Attainment by kind of budget",
                    "met / (met + late + expired + refused) for latency, compute and accuracy budgets. Only latency "
                    "low: too slow. All low: refused for want of room.",
                    "percentunit",
                ),
                Query(attainment("kind"), "{{kind}}"),
                Query(f"max({series(TARGET)})", "target"),
                change=up_to_one,
            ),
            graph(
                About(
                    "Budgets by outcome",
                    "Images that stated a budget. late and expired: time ran out; refused: no room, or no hope on "
                    "arrival; infeasible: no slice fits, the client's to repair.",
                    "short",
                ),
                Query(total("result", rate(BUDGETS)), "{{result}}"),
                change=stacked,
            ),
            graph(
                About(
                    "Error budget burn",
                    "Share missed over the share that the target allows, by the recording rules, for all instances. "
                    "Above 14.4 in 5m and 1h, or above 6 in 30m and 6h, an alert fires: see its runbook.",
                    "short",
                ),
                *(
                    Query(
                        f'max(job:slicewise_budget_missed:ratio_rate{window}{{job="slicewise"}}) '
                        '/ (1 - max(job:slicewise_slo_target:max{job="slicewise"}))',
                        window,
                    )
                    for window in ("5m", "30m", "1h", "6h")
                ),
            ),
            heat_map(
                About(
                    "Slack at dispatch",
                    "Time left to the most urgent deadline when its batch starts. Mass below 0: batches start too late "
                    "to be of use, so add replicas. Mass far above 0: there is room for wider slices.",
                    "s",
                    24,
                ),
                "slicewise_slack_at_dispatch_seconds",
            ),
        ),
    )


def _latency() -> Section:
    stage = "slicewise_stage_duration_seconds"
    return Section(
        "Latency: where does time go?",
        (
            heat_map(
                About(
                    "Latency of answers",
                    "How many answers took how long. Two bands: two kinds of images or a queue that comes and goes. "
                    "A band that climbs: load.",
                    "s",
                    12,
                ),
                DURATION,
                OK,
            ),
            graph(
                About(
                    "Mean time by stage",
                    "decode: large images or too few decode_threads. queue: load. trunk, body: the network on this "
                    "machine, so look for neighbours on its cores. encode: answers with many classes.",
                    "s",
                    12,
                ),
                Query(mean(stage, "stage"), "{{stage}}"),
                change=stacked,
            ),
            graph(
                About(
                    "p99 by outcome",
                    "How long callers wait for each kind of answer. rejected should be near 0: a refusal that comes "
                    "late helps nobody.",
                    "s",
                    12,
                ),
                Query(quantile(0.99, DURATION, by="outcome"), "{{outcome}}"),
            ),
            graph(
                About(
                    "p99 by stage",
                    "The slowest hundredth of each stage. It shows stalls that the mean hides.",
                    "s",
                    12,
                ),
                Query(quantile(0.99, stage, by="stage"), "{{stage}}"),
            ),
        ),
    )


def _queues() -> Section:
    waited = "slicewise_stage_duration_seconds", 'stage="queue"'
    return Section(
        "Queues",
        (
            graph(
                About(
                    "Images waiting, by queue",
                    "trunk: not looked at yet. A number: decided, waiting for its body. A single width that grows: "
                    "the mix is too wide for the machine.",
                    "short",
                ),
                Query(total("width", series("slicewise_queue_images")), "{{width}}"),
                change=stacked,
            ),
            graph(
                About(
                    "Requests in flight, by instance",
                    "Accepted and not answered. Instances far apart mean an uneven balancer.",
                    "short",
                ),
                Query(total("instance", series("slicewise_in_flight_requests")), "{{instance}}"),
            ),
            graph(
                About(
                    "Time in the queues",
                    "Wait before the trunk and in the bucket, of images that were answered. It is the first to rise "
                    "with load.",
                    "s",
                ),
                *(Query(quantile(q, *waited), f"p{round(100 * q)}") for q in (0.5, 0.95, 0.99)),
            ),
        ),
    )


def _batches() -> Section:
    seconds = "slicewise_batch_duration_seconds"
    one = series("slicewise_slice_latency_seconds", 'batch="1"')
    return Section(
        "Batches",
        (
            graph(
                About(
                    "Mean batch size, by width",
                    "Images per batch. 1 under load on a GPU wastes it: see whether deadlines are too short for "
                    "batches. On a CPU small batches are normal.",
                    "short",
                    12,
                ),
                Query(mean("slicewise_batch_size", "width"), "{{width}}"),
            ),
            heat_map(
                About(
                    "Batch sizes",
                    "How many batches had how many images, all widths together. It shows whether the mean is "
                    "made of ones and many.",
                    "short",
                    12,
                ),
                "slicewise_batch_size",
            ),
            graph(
                About(
                    "Time per batch, p95 by width",
                    "Worker seconds of a batch. Compare it with the table in force beside it.",
                    "s",
                    12,
                ),
                Query(quantile(0.95, seconds, by="width"), "{{width}}"),
            ),
            graph(
                About(
                    "Latency table in force, batch of 1",
                    "What the service believes one image takes, as corrected by what batches took. It decides which "
                    "deadlines are accepted; far above what batches take, run slicewise profile on an idle machine.",
                    "s",
                    12,
                ),
                Query(f"max by (width) ({one})", "{{width}}"),
            ),
        ),
    )


def _errors() -> Section:
    return Section(
        "Errors, refusals, drops",
        (
            graph(
                About(
                    "Requests by route and status, without 200",
                    "Which route fails how. The table of statuses in docs/operations.md says what to do about each.",
                    "reqps",
                ),
                Query(total("route, code", rate(REQUESTS, NO_PROBE, 'code!="200"')), "{{code}} {{route}}"),
            ),
            graph(
                About(
                    "Errors by type",
                    "queue_full: add replicas. deadline_exceeded: see slack. backend: the model fails, see "
                    "batch_failed in the log. internal: a bug, see internal_error.",
                    "reqps",
                ),
                Query(total("reason", rate(REJECTIONS)), "{{reason}}"),
            ),
            graph(
                About(
                    "Images dropped from the queues",
                    "Never computed. cancelled: the caller left, so compare its timeout with the latency. expired: the "
                    "deadline passed while the image waited.",
                    "short",
                ),
                Query(total("reason", rate("slicewise_dropped_total")), "{{reason}}"),
            ),
        ),
    )


def _cache_and_quotas() -> Section:
    return Section(
        "Cache and quotas",
        (
            graph(
                About(
                    "Cache",
                    "Share of images by what the cache said. error: the store is away, and every image is computed. "
                    "Few hits with many repeats: entries expire too soon. Empty without cache_enabled.",
                    "percentunit",
                    12,
                ),
                Query(share("result", rate("slicewise_cache_requests_total")), "{{result}}"),
                change=shares,
            ),
            graph(
                About(
                    "Refused for a spent quota",
                    "Requests whose client has spent its compute. One client's business, unless it rises for all at "
                    "once: then look at the quota's setting.",
                    "reqps",
                    12,
                ),
                Query(total("reason", rate(REJECTIONS, 'reason="quota"')), "{{reason}}"),
            ),
        ),
    )


def sections() -> tuple[Section, ...]:
    """These rows, top to bottom."""
    return (_slo(), _latency(), _queues(), _batches(), _errors(), _cache_and_quotas())
