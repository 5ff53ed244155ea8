"""``slicewise-load overload``: ten times what one worker bears, for minutes, and whether memory stays bounded."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from loadtest.arms import HttpArm, Window
from loadtest.comparisons import Network, slicewise_server
from loadtest.corpus import EncodedImage, read_images
from loadtest.open_loop import Limits, Post, play
from loadtest.outcomes import LATE_SEND_MS, Exchange
from loadtest.overload_record import LOAD_RATIO, Overload, overload_lines
from loadtest.provenance import setting
from loadtest.rehearsal import BAR_MISSED, say, work_folder
from loadtest.servers import Fleet
from loadtest.traces import constant
from loadtest.victim import Victim, sampled

REPORT, PATH = "overload.md", "/v1/classify"
SERVE_FLAGS = ("--policy", "fixed:widest", "--workers", "1")
QUEUE_IMAGES = 256
PART_S = 30.0
"""The load is played in parts, so that the generator's own memory is bounded, too."""
CLIENTS, IMAGES = 16, 64


def configure_overload(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="PATH", help="folder or zip of images")
    add("--model", default="ds_resnet_cifar10", help="the slower, the easier ten times its load is made")
    add("--repository", type=Path, metavar="DIR", help="its repository, if not the shipped one")
    add("--minutes", type=float, default=5.0, help="of load (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help=f"folder for {REPORT}")


def run_overload(arguments: argparse.Namespace) -> None:
    """Load, then report; SystemExit 2 when the bar is missed. Raises ValueError, BenchError and ServerError."""
    a = arguments
    parts = round(a.minutes * 60 / PART_S)
    if parts < 1:
        raise ValueError(f"--minutes {a.minutes:g}; allowed: at least {PART_S / 60:g}")
    about, network = setting("overload", a), Network(a.model, a.images, a.repository)
    images, spec = read_images(a.images, IMAGES, seed=0), slicewise_server(network, SERVE_FLAGS)
    work = work_folder()
    with Fleet(work) as fleet:
        arm = HttpArm("capacity", spec, PATH, a.images, CLIENTS)
        capacity = arm.measure(fleet, Window(2.0, 8.0)).images_per_s
    say(f"capacity {capacity:.0f} images/s")
    statuses, late = Counter[int](), 0
    with Victim(spec, work / "overload.log") as server, sampled(server) as samples:
        began_s = time.monotonic()
        for number in range(parts):
            played = _part(server, images, capacity * LOAD_RATIO)
            statuses.update(exchange.status for exchange in played)
            late += sum((exchange.send_late_s or 0.0) * 1e3 > LATE_SEND_MS for exchange in played)
            say(f"part {number + 1} of {parts}: {server.resident_bytes() / 2**20:.0f} MiB, {dict(statuses)}")
        seconds = time.monotonic() - began_s
    found = Overload(
        a.model, capacity, capacity * LOAD_RATIO, seconds, parts * PART_S, QUEUE_IMAGES, dict(statuses), late,
        tuple(samples),
    )  # fmt: skip
    a.out.mkdir(parents=True, exist_ok=True)
    lines = ["# Overload", "", *about.lines(), "", *overload_lines(found)]
    (a.out / REPORT).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(a.out / REPORT)
    if not found.held:
        sys.exit(BAR_MISSED)


def _part(server: Victim, images: Sequence[EncodedImage], rate_per_s: float) -> list[Exchange]:
    cycle = itertools.cycle(images)
    posts = [
        Post(at_s, image.data, {"Content-Type": image.media_type})
        for at_s, image in zip(constant(rate_per_s, PART_S).tolist(), cycle, strict=False)
    ]
    return play(server.url + PATH, posts, Limits()).exchanges
