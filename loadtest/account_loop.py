"""The tuned peer's work without HTTP: ``python -m loadtest.account_loop``, one JSON document on stdout.

As many threads as asked classify one image after the other, exactly as the peer's pool does. What the peer
spends beyond this is what serving costs.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import cycle, islice
from pathlib import Path

from loadtest.corpus import read_images
from loadtest.peers.fastapi_onnx import AccountedClassifier
from loadtest.peers.preprocess import Transform

LIMIT_IMAGES = 2048


def loop(
    classifier: AccountedClassifier, images: Sequence[bytes], threads: int, warm_up_s: float, seconds: float
) -> dict[str, object]:  # fmt: skip
    """Classify on every thread until the window closes; what it took, JSON-ready.

    Raises ValueError for bytes that are no image.
    """
    stop = threading.Event()

    def work(number: int) -> None:
        for data in islice(cycle(images), number * len(images) // threads, None):
            if stop.is_set():
                return
            classifier(data)

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(work, number) for number in range(threads)]
        wait(running, warm_up_s, FIRST_EXCEPTION)
        began, began_s, cpu_s = classifier.totals(), time.perf_counter(), time.process_time()
        before = resource.getrusage(resource.RUSAGE_SELF)
        wait(running, seconds, FIRST_EXCEPTION)
        ended, ended_s, cpu_s = classifier.totals(), time.perf_counter(), time.process_time() - cpu_s
        after = resource.getrusage(resource.RUSAGE_SELF)
        stop.set()
        for done in running:
            done.result()
    return {
        "threads": threads,
        "images": ended.images - began.images,
        "seconds": ended_s - began_s,
        "cpu_s": cpu_s,
        "system_s": after.ru_stime - before.ru_stime,
        "page_faults": after.ru_minflt - before.ru_minflt,
        "stages_cpu_s": {stage: ended.cpu_s[stage] - began.cpu_s[stage] for stage in ended.cpu_s},
        "stages_wall_s": {stage: ended.wall_s[stage] - began.wall_s[stage] for stage in ended.wall_s},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run one loop and print its account."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.account_loop", description=__doc__)
    parser.add_argument("--graph", type=Path, required=True)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder or zip file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--warm-up-s", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=5.0)
    given = parser.parse_args(argv)
    try:
        images = [image.data for image in read_images(given.images, LIMIT_IMAGES, seed=0)]
        classifier = AccountedClassifier(given.graph, Transform.from_manifest(given.manifest))
        print(json.dumps(loop(classifier, images, given.threads, given.warm_up_s, given.seconds)))
    except ValueError as error:
        print(f"account_loop: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
