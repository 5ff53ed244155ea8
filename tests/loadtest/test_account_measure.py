import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from loadtest import account_measure as module
from loadtest.account_measure import Alone, Plan, Served, measure, rounds, sources
from loadtest.account_readings import (
    WatchedFleet,
    account_counters,
    decoding_threads,
    idle_ms_per_s,
    metrics_counters,
    read_process,
    run_loop,
    spinning,
)
from loadtest.arms import BenchError, HttpArm, Window
from loadtest.comparisons import FASTAPI, Network
from loadtest.corpus import EncodedImage
from loadtest.servers import ServerError, ServerSpec

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are read from /proc")

WINDOW = Window(0.0, 0.2)
SAYS = """{"images": 50, "seconds": 1, "cpu_s": 0.5, "system_s": 0, "page_faults": 1, "decode_cpu_s": 0.2}"""


def test_a_process_is_read_thread_by_thread():
    before = read_process(psutil.Process().pid)
    assert {thread.id for thread in psutil.Process().threads()} <= set(before.threads)
    sum(range(2_000_000))
    assert read_process(psutil.Process().pid).since(before).threads[psutil.Process().pid].cpu_s > 0


def test_a_process_that_is_gone_is_said():
    with spinning(1):
        (child,) = psutil.Process().children()
    with pytest.raises(BenchError, match=f"threads of process {child.pid} cannot be read"):
        read_process(child.pid)


def test_spinning_processes_spin_and_end():
    with spinning(2):
        children = psutil.Process().children()
        assert len(children) == 2
    assert not any(child.is_running() for child in children)


def test_what_servers_say_of_themselves_is_read():
    said = b'{"images": 3, "cpu_s": {"decode": 0.5, "engine": 1}, "wall_s": {"decode": 1, "engine": 2.5}}'
    assert account_counters(said) == {"images": 3.0, "engine_wall_s": 2.5, "cpu_s decode": 0.5, "cpu_s engine": 1.0}
    metrics = b"""# HELP slicewise_images_total images
slicewise_images_total{model="m",width="0"} 3.0
slicewise_images_total{model="m",width="1"} 4.0
slicewise_images_created{model="m",width="1"} 1.7e+09
slicewise_compute_seconds_total{stage="trunk"} 0.5
slicewise_compute_seconds_total{stage="body"} 2.5e-01
slicewise_batch_size_bucket{le="+Inf"} 9.0
slicewise_batch_size_count{width="0"} 2.0
slicewise_batch_size_sum{width="0"} 7.0
"""
    assert metrics_counters(metrics) == {
        "images": 7.0, "engine_wall_s": 0.75, "batched_images": 7.0, "batches": 2.0,
    }  # fmt: skip


def test_a_window_leaves_two_readings_and_its_difference(fake_spec, image_folder, tmp_path):
    spec = fake_spec("fake")
    with WatchedFleet(tmp_path, {spec: ("/health", lambda _: {"asked": 1.0})}) as fleet:
        run = HttpArm("fake", spec, "/classify", image_folder, 2).measure(fleet, WINDOW)
        spent = fleet.spent()
        with fleet.running(spec) as server:
            assert spent.threads[server.pid].cpu_s > 0
    assert run.images > 0
    assert spent.counters == {"asked": 0.0}


def test_a_server_that_takes_damaged_pictures_does_not_tell_its_threads(fake_spec, tmp_path):
    with (
        WatchedFleet(tmp_path, {}) as fleet,
        fleet.running(fake_spec("fake")) as server,
        pytest.raises(BenchError, match=r"fake: a damaged picture was answered \[200\]; expected 400"),
    ):
        decoding_threads(server, "/classify")


def test_a_process_that_spins_is_told_from_one_that_sleeps():
    with subprocess.Popen(["sleep", "60"]) as sleeper, spinning(1):
        (spinner,) = [child for child in psutil.Process().children() if child.pid != sleeper.pid]
        asleep, awake = idle_ms_per_s(sleeper.pid, 0.2), idle_ms_per_s(spinner.pid, 0.2)
        sleeper.kill()
    assert asleep < awake


def test_a_server_that_is_gone_is_said(fake_spec, tmp_path):
    with WatchedFleet(tmp_path, {}) as fleet, fleet.running(fake_spec("fake")) as server:
        server.stop()
        with pytest.raises(ServerError, match=r"fake: GET /metrics: .*; log .*fake\.log"):
            server.ask("GET", "/metrics")


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("raise SystemExit('no such model')", "ended with status 1: no such model"),
        ("pass", "list index out of range"),
        ("print('done')", "Expecting value"),
        (f"print('{SAYS.replace('50,', '0,')}')", "no image was processed"),
    ],
)
def test_a_loop_that_fails_is_said(code, complaint):
    with pytest.raises(BenchError, match=complaint):
        run_loop((sys.executable, "-c", code), WINDOW)


def test_a_loop_is_measured_beside_spinning_processes(tmp_path):
    code = f"import psutil; assert len(psutil.Process().parent().children()) == 2; print('{SAYS}')"
    with WatchedFleet(tmp_path, {}) as fleet:
        costs, signs = Alone("loop", (sys.executable, "-c", code), spinning=1).measure(fleet, WINDOW)
    assert costs == pytest.approx({"decode": 4.0, "total": 10.0})
    assert signs["images_per_s"] == 50.0


@dataclass
class Noted:
    """A source that notes when it was asked, and with which seed."""

    name: str
    calls: list[tuple[str, int]]
    within: dict[str, str] = field(default_factory=dict)

    def measure(self, fleet, window):
        self.calls.append((self.name, window.seed))
        return {"total": float(len(self.calls))}, {"failed": 0.0}


def plan_of(photos: Network, work: Path, rounds_: int = 2) -> Plan:
    return Plan(photos, (0, 3), clients=4, rounds=rounds_, window=WINDOW, idle_s=0.1, work=work)


@pytest.fixture
def photos(tmp_path, image_folder) -> Network:
    folder = tmp_path / "models" / "large" / "2"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"slices": [0, 0, 0, 0]}')
    return Network("large", image_folder, tmp_path / "models")


def test_sources_take_turns_and_each_round_sees_other_images(photos, tmp_path):
    calls: list[tuple[str, int]] = []
    said: list[str] = []
    with WatchedFleet(tmp_path, {}) as fleet:
        found = rounds([Noted("a", calls), Noted("b", calls)], fleet, plan_of(photos, tmp_path), said.append)
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert [(column.name, column.costs) for column in found] == [
        ("a", ({"total": 1.0}, {"total": 4.0})),
        ("b", ({"total": 2.0}, {"total": 3.0})),
    ]
    assert said[-1] == "round 2/2, CPU ms per image: a 4.00, b 3.00"


def test_every_width_has_its_own_sources(photos, tmp_path, monkeypatch):
    seen: list[tuple[int, ServerSpec]] = []

    def noted(plan, width, ours, tuned, flags):
        seen.append((width, tuned))
        return [Noted(f"{width} {flags[0]}", [])]

    monkeypatch.setattr(module, "sources", noted)
    monkeypatch.setattr(module, "peer_flags", lambda network, work, width: [f"graph {width}"])
    said: list[str] = []
    account = measure(plan_of(photos, tmp_path, rounds_=1), said.append)
    assert [section.width for section in account.sections] == [0, 3]
    assert [section.columns[0].name for section in account.sections] == ["0 graph 0", "3 graph 3"]
    assert [spec.command[-1] for _, spec in seen] == ["graph 0", "graph 3"]
    assert all("--account" in spec.command for _, spec in seen)
    assert account.setup["clients"] == "4"
    assert said[::2] == ["width 0", "width 3"]


@pytest.mark.parametrize(
    ("cores", "alone"), [(1, ["1 thread"]), (3, ["3 threads", "1 thread, other cores spinning", "1 thread"])]
)
def test_servers_are_shown_beside_their_work_alone(photos, tmp_path, monkeypatch, cores, alone):
    monkeypatch.setattr(module, "usable_cores", lambda: cores)
    spec = ServerSpec("any", ("any",), "/")
    found = sources(plan_of(photos, tmp_path), 2, spec, spec, ["--graph", "g"])
    names = [source.name for source in found]
    assert names == [
        name for server in ("slicewise", FASTAPI) for name in (server, *(f"{server} alone, {a}" for a in alone))
    ]
    ours, theirs = (source for source in found if isinstance(source, Served))
    assert (ours.arm.mix, theirs.arm.mix) == ("Slice-Width=2", "")
    assert (ours.is_clocked, theirs.is_clocked) == (False, True)
    loops = [source for source in found if isinstance(source, Alone)]
    assert [loop.spinning for loop in loops] == ([0] if cores == 1 else [0, 2, 0]) * 2
    command = loops[0].command
    assert command[command.index("--loop-mix") + 1] == "2:1"
    assert command[command.index("--workers") + 1] == str(cores)


def test_an_image_is_one_of_those_that_are_sent(photos, tmp_path):
    spec = ServerSpec("any", ("any",), "/")
    (ours, *_) = sources(plan_of(photos, tmp_path), 0, spec, spec, [])
    assert isinstance(ours, Served)
    assert isinstance(ours.image, EncodedImage)
    assert ours.image.data in {file.read_bytes() for file in photos.images.rglob("*.jpg")}
