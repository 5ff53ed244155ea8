"""``slicewise-load limits``: whether quotas bound what is spent, and what a hit of the answer cache takes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from loadtest.arms import Window
from loadtest.comparisons import Network, slicewise_server
from loadtest.limits_cache import STORES, measure_cache
from loadtest.limits_quota import Study, measure_quota
from loadtest.limits_record import LimitsRecord, markdown
from loadtest.provenance import setting
from loadtest.rehearsal import (
    BAR_MISSED,
    Corpus,
    check_capacity,
    configure_network,
    learn,
    measured_capacity,
    say,
    work_folder,
)
from loadtest.victim import Victim

STEM = "limits"
WARM_UP_S = 3.0


def configure_limits(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add = parser.add_argument
    configure_network(parser)
    add("--seconds", type=float, default=60.0, help="over which the quota is held (default: %(default)s)")
    add("--hits", type=int, default=5000, help="of the cache, with each store (default: %(default)s)")
    add("--capacity", type=float, metavar="RATE", help="images/s, if it is not to be measured")
    add("--capacity-s", type=float, default=10.0, help="how long it is measured (default: %(default)s)")
    add("--image-count", type=int, default=64, help="different images at most (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help=f"folder for {STEM}.json and {STEM}.md")


def run_limits(arguments: argparse.Namespace) -> None:
    """Measure, then report; SystemExit 2 when a bar is missed. Raises ValueError, BenchError and ServerError."""
    a = arguments
    if not a.seconds > 0 or a.hits < 1:
        raise ValueError("--seconds must be above 0 and --hits at least 1")
    check_capacity(a.capacity)
    network, about = Network(a.model, a.images, a.repository), setting("limits", a)
    work = work_folder()
    capacity = a.capacity or measured_capacity(network, (), Window(WARM_UP_S, a.capacity_s))
    corpus, mean_madds = _corpus(network, work, a.image_count)
    say(f"capacity {capacity:.0f} images/s, {mean_madds / 1e6:.1f} M MAdds an image")
    caches = tuple(measure_cache(store, network, corpus, a.hits, work) for store in STORES)
    quota = measure_quota(Study(network, corpus, capacity, mean_madds, a.seconds, work))
    record = LimitsRecord(about, a.model, capacity, len(corpus.images), quota, caches)
    a.out.mkdir(parents=True, exist_ok=True)
    record.save(a.out / f"{STEM}.json")
    (a.out / f"{STEM}.md").write_text(markdown(record), encoding="utf-8")
    print(a.out / f"{STEM}.md")
    for check in record.checks():
        if not check.held:
            say(f"missed: {check.title}: {check.bar}, found {check.found}")
    if not record.held:
        sys.exit(BAR_MISSED)


def _corpus(network: Network, work: Path, most: int) -> tuple[Corpus, float]:
    """Images, and what one costs on average when the gate chooses."""
    with Victim(slicewise_server(network), work / "known-answers.log") as server:
        corpus = learn(server, network, most)
        before = server.metrics().total("slicewise_madds_total")
        for image in corpus.images:
            server.ask("POST", corpus.path, image.data, {"Content-Type": image.media_type})
        spent = server.metrics().total("slicewise_madds_total") - before
    return corpus, spent / len(corpus.images)
