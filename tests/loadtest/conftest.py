import runpy
import sys
from pathlib import Path

import pytest
from support import random_image

from loadtest.results import ArmRecord, Bar, ComparisonRecord, Machine, Metric, Results, Run, Side
from loadtest.servers import ServerSpec

FAKE_SERVER = Path(__file__).with_name("fake_server.py")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Eight pictures in two class folders, and a file that is none."""
    root = tmp_path_factory.mktemp("images")
    for index in range(8):
        folder = root / f"class{index % 2}"
        folder.mkdir(exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(random_image(index, image_format="JPEG"))
    (root / "README.txt").write_text("no image")
    return root


@pytest.fixture
def fake_spec():
    """Make the specification of a fake server, with its flags."""

    def make(name: str, *flags: str, ready_limit_s: float = 60.0) -> ServerSpec:
        command = (sys.executable, str(FAKE_SERVER), "--port", "{port}", *flags)
        return ServerSpec(name, command, "/health", ready_limit_s)

    return make


@pytest.fixture
def fake_app():
    """Make the application of the fake server, to be run in this process; and what it will have seen."""
    fake = runpy.run_path(str(FAKE_SERVER))

    def make(**faults):
        seen = fake["Seen"]()
        return fake["create_app"](seen, **faults), seen

    return make


class Samples:
    """Small made-up results."""

    machine = Machine("Some CPU", 2, 8 * 2**30, "Linux 6", "3.11.7", {"numpy": "2.4"})
    at_least = Bar(Metric.THROUGHPUT, Side.AT_LEAST, 1.15)
    at_most = Bar(Metric.P99, Side.AT_MOST, 1.10, requests=2000)

    @staticmethod
    def run(images_per_s: float = 100.0, seconds: float = 10.0, p99_ms: float = 20.0, **changes) -> Run:
        images = round(images_per_s * seconds)
        latencies_ms = tuple(p99_ms * (k + 1) / images for k in range(images))
        values = {"cpu_s": 0.01 * images, "p50_ms": p99_ms / 2, "p99_ms": p99_ms, "latencies_ms": latencies_ms}
        return Run(images, seconds, **(values | changes))

    @classmethod
    def comparison(cls, ratio: float, bar: Bar | None = None, pairs: int = 20, name: str = "one", **changes):
        """Arm a is ``ratio`` times as fast as arm b, and as much slower at its p99."""
        ours, theirs = cls.run(100 * ratio, p99_ms=20 * ratio, **changes), cls.run()
        a = ArmRecord("ours", "slicewise serve", "POST /v1/classify", 8, (ours,) * pairs)
        b = ArmRecord("theirs", "peer --port {port}", "POST /classify", 8, (theirs,) * pairs)
        when, bars = "2026-01-02T03:04:05+00:00", (bar,) if bar else ()
        return ComparisonRecord(name, f"Comparison {name}", when, 2.0, 10.0, a, b, bars)

    @classmethod
    def results(cls, *comparisons: ComparisonRecord) -> Results:
        return Results(cls.machine, comparisons)


@pytest.fixture
def samples() -> type[Samples]:
    return Samples
