"""What comes before every test of resilience: capacity, images with known answers, and loads made of them."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtest.arms import BenchError, HttpArm, Window
from loadtest.comparisons import WIDTH_HEADER, Network, slicewise_server
from loadtest.corpus import EncodedImage, batch_bodies, read_images
from loadtest.fault_record import Request
from loadtest.known_answers import Known, distinct, item_is_right, probabilities
from loadtest.servers import Fleet
from loadtest.traces import poisson
from loadtest.victim import Victim

CLIENTS = 8
"""Connections of the closed loop that finds the capacity: enough to keep every core busy, and no queue forms."""
CANDIDATES, LEAST_IMAGES = 300, 8
_ASKING = 8
BAR_MISSED = 2
"""Exit status of a run that was measured and missed a bar; an error is 1."""

Say = Callable[[str], None]


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


def configure_network(parser: argparse.ArgumentParser) -> None:
    """The flags that say which network, and which images."""
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="PATH", help="folder or zip of images")
    add("--model", default="ds_resnet_cifar10")
    add("--repository", type=Path, metavar="DIR", help="its repository, if not the shipped one")


def work_folder() -> Path:
    """A new folder for the logs of servers, of which SIGTERM leaves none behind from here."""
    work = Path(tempfile.mkdtemp(prefix="slicewise-load-"))
    say(f"servers log to {work}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return work


def check_capacity(given_per_s: float | None) -> None:
    """Raise ValueError for a --capacity that is none."""
    if given_per_s is not None and not 0 < given_per_s < math.inf:
        raise ValueError(f"--capacity is {given_per_s:g} images/s; allowed: above 0")


def measured_capacity(network: Network, flags: tuple[str, ...], window: Window) -> float:
    """Images/s of one server in a closed loop with the gate choosing. Raises BenchError and ServerError."""
    arm = HttpArm("capacity", slicewise_server(network, flags), "/v1/classify", network.images, CLIENTS)
    with Fleet(Path(tempfile.mkdtemp(prefix="slicewise-load-"))) as fleet:
        run = arm.measure(fleet, window)
    if run.failed:
        raise BenchError(f"capacity: {run.failed} failed")
    return run.images_per_s


@dataclass(frozen=True, slots=True)
class Corpus:
    """Images whose answers are known, and the path that answers with all classes."""

    images: tuple[EncodedImage, ...]
    known: tuple[Known, ...]
    path: str

    def requests(self, rate_per_s: float, seconds: float, seed: int) -> list[Request]:
        """Independent arrivals, and any image in each."""
        rng = np.random.default_rng(seed)
        at_s = poisson(rate_per_s, seconds, rng)
        picks = rng.integers(0, len(self.images), len(at_s))
        return [
            Request(float(at), self.images[pick], self.known[pick]) for at, pick in zip(at_s, picks, strict=True)
        ]  # fmt: skip

    def fill_queue(self, server: Victim, places: int) -> int:
        """Ask for so many images in one request; how many were answered right. Raises BenchError."""
        picks = [place % len(self.images) for place in range(places)]
        (body,) = batch_bodies([self.images[pick] for pick in picks], places)
        path = self.path.replace("/classify?", "/classify/batch?")
        status, answer = server.ask("POST", path, body.data, {"Content-Type": body.content_type})
        if status != 200:
            return 0
        results = json.loads(answer)["results"]
        return sum(item_is_right(item, self.known[pick]) for item, pick in zip(results, picks, strict=True))


def learn(server: Victim, network: Network, most: int, seed: int = 0) -> Corpus:
    """Ask a server that nothing is wrong with for every slice of candidates, and keep those that tell apart.

    Raises BenchError when an answer fails or too few images are left.
    """
    model = server.ask_json(f"/v1/models/{network.model}")
    path = f"/v1/classify?top_k={len(model['classes'])}"
    widths = [each["width"] for each in model["slices"]]
    candidates = read_images(network.images, CANDIDATES, seed)
    with ThreadPoolExecutor(_ASKING) as pool:
        known = list(pool.map(lambda image: _known(server, path, image, widths), candidates))
    chosen = distinct(known, most)
    if len(chosen) < LEAST_IMAGES:
        raise BenchError(
            f"{network.images}: {len(chosen)} images whose answers tell them apart; needed: {LEAST_IMAGES}"
        )
    return Corpus(tuple(candidates[each] for each in chosen), tuple(known[each] for each in chosen), path)


def _known(server: Victim, path: str, image: EncodedImage, widths: Sequence[int]) -> Known:
    found = {}
    for width in widths:
        headers = {"Content-Type": image.media_type, WIDTH_HEADER: str(width)}
        status, body = server.ask("POST", path, image.data, headers)
        if status != 200:
            raise BenchError(f"an image at slice {width} was answered {status}: {body[:200].decode(errors='replace')}")
        said = json.loads(body)
        if said["slice"]["width"] != width:
            raise BenchError(f"slice {width} was asked for, and {said['slice']['width']} answered")
        found[width] = probabilities(said)
    return found
