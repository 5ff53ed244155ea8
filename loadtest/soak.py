"""``slicewise-load soak``: a long open load, and whether memory, descriptors and latency stay where they were."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from loadtest.arms import BenchError, Window
from loadtest.comparisons import Network, slicewise_server
from loadtest.fault_record import count
from loadtest.figures import percentile
from loadtest.open_loop import Limits, Post, play
from loadtest.outcomes import LATE_SEND_MS
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
from loadtest.soak_record import LEAST_PARTS, Part, SoakRecord, markdown
from loadtest.victim import Victim, sampled

STEM = "soak"
WARM_UP_S = 3.0
SAMPLES_PER_PART = 5
"""At least; one a second in parts of a minute."""


def configure_soak(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add = parser.add_argument
    configure_network(parser)
    add("--minutes", type=float, default=15.0, help="of load (default: %(default)s)")
    add("--part-s", type=float, default=60.0, help=f"a part of it, of which it needs {LEAST_PARTS} (%(default)s)")
    add("--share", type=float, default=0.7, help="of the capacity that the load takes (default: %(default)s)")
    add("--capacity", type=float, metavar="RATE", help="images/s, if it is not to be measured")
    add("--capacity-s", type=float, default=15.0, help="how long it is measured (default: %(default)s)")
    add("--image-count", type=int, default=64, help="different images at most (default: %(default)s)")
    add("--serve-flag", action="append", default=[], metavar="FLAG", help="more for slicewise serve")
    add("--out", type=Path, required=True, metavar="DIR", help=f"folder for {STEM}.json, {STEM}.md and a plot")


def run_soak(arguments: argparse.Namespace) -> None:
    """Load, then report; SystemExit 2 when a bar is missed. Raises ValueError, BenchError and ServerError."""
    a = arguments
    if not (0 < a.share < 1 and a.part_s > 0):
        raise ValueError("--share must lie between 0 and 1, --part-s above 0")
    parts = round(a.minutes * 60 / a.part_s)
    if parts < LEAST_PARTS:
        raise ValueError(f"{a.minutes:g} minutes are {parts} parts of {a.part_s:g} s; allowed: at least {LEAST_PARTS}")
    check_capacity(a.capacity)
    network, about = Network(a.model, a.images, a.repository), setting("soak", a)
    work = work_folder()
    flags = tuple(a.serve_flag)
    capacity = a.capacity or measured_capacity(network, flags, Window(WARM_UP_S, a.capacity_s))
    say(f"capacity {capacity:.0f} images/s")
    with Victim(slicewise_server(network, flags), work / "soak.log") as server:
        corpus = learn(server, network, a.image_count)
        load = _Load(server, corpus, capacity * a.share, a.part_s)
        before = server.settled(0, limit_s=2.0)
        with sampled(server, every_s=min(1.0, a.part_s / SAMPLES_PER_PART)) as samples:
            began_s = time.monotonic()
            found = [load.part(place, began_s) for place in range(parts)]
        after = server.settled(before.descriptors)
    record = SoakRecord(
        about, a.model, flags, capacity, a.capacity is None, load.rate_per_s, a.part_s, len(corpus.images),
        tuple(found), tuple(samples), before, after,
    )  # fmt: skip
    leave(record, a.out)
    if not record.held:
        sys.exit(BAR_MISSED)


@dataclass(frozen=True, slots=True)
class _Load:
    """What is sent, part by part."""

    server: Victim
    corpus: Corpus
    rate_per_s: float
    part_s: float

    def part(self, place: int, began_s: float) -> Part:
        """One part, judged at once, so that no more than one is ever held. Raises BenchError without an answer."""
        requests = self.corpus.requests(self.rate_per_s, self.part_s, seed=place)
        posts = [Post(each.at_s, each.image.data, {"Content-Type": each.image.media_type}) for each in requests]
        from_s = time.monotonic() - began_s
        playback = play(self.server.url + self.corpus.path, posts, Limits())
        to_s = time.monotonic() - began_s
        counts = count(requests, playback.exchanges, (), (0.0, self.part_s))
        latencies_ms = [each.latency_s * 1e3 for each in playback.exchanges if each.latency_s is not None]
        if not latencies_ms:
            raise BenchError(f"part {place + 1}: no answer; log {self.server.log_path}")
        late = sum((each.send_late_s or 0.0) * 1e3 > LATE_SEND_MS for each in playback.exchanges)
        part = Part(from_s, to_s, counts, percentile(latencies_ms, 50), percentile(latencies_ms, 99), late)
        memory_mib = self.server.resident_bytes() / 2**20
        say(f"part {place + 1}: p99 {part.p99_ms:.1f} ms, {memory_mib:.0f} MiB, {counts.unexpected} unexpected")
        return part


def leave(record: SoakRecord, folder: Path) -> None:
    """Write record, plot and report, and say what was missed."""
    folder.mkdir(parents=True, exist_ok=True)
    record.save(folder / f"{STEM}.json")
    is_drawn = _drawn(record, folder)
    (folder / f"{STEM}.md").write_text(markdown(record, is_drawn), encoding="utf-8")
    print(folder / f"{STEM}.md")
    for check in record.checks():
        if not check.held:
            say(f"missed: {check.title}: {check.bar}, found {check.found}")


def _drawn(record: SoakRecord, folder: Path) -> bool:
    try:
        from loadtest.soak_plot import draw_soak  # late: nothing else here needs matplotlib
    except ModuleNotFoundError as error:
        say(f"no plot: {error.name} is not installed")
        return False
    draw_soak(record, folder)
    return True
