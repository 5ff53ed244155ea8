"""The commands from end to end, on a service that is made up."""

import contextlib
import json
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from loadtest import fault_stage, faults, limits_cache, soak
from loadtest.arms import BenchError
from loadtest.cli import main
from loadtest.comparisons import Network
from loadtest.fault_record import FaultsRecord
from loadtest.limits_cache import MEMORY, Wire, measure_cache
from loadtest.rehearsal import learn
from loadtest.servers import ServerSpec
from loadtest.soak_record import SoakRecord
from loadtest.victim import Victim

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(sys.platform != "linux", reason="descriptors are read from /proc"),
]
FAKE = Path(__file__).with_name("fake_service.py")


@pytest.fixture
def stage(monkeypatch, tmp_path_factory):
    """The made-up service takes the place of the real one; returns what adds to its flags."""
    flags: list[str] = []

    def spec(_: Network, more: tuple[str, ...] = ()) -> ServerSpec:
        return ServerSpec("fake", (sys.executable, str(FAKE), "--port", "{port}", *flags, *more), "/readyz")

    for module in (faults, fault_stage, soak, limits_cache):
        monkeypatch.setattr(module, "slicewise_server", spec)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("work")))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(fault_stage, "WARM_S", 0.2)
    return flags


def run_faults(images, out, *more: str) -> tuple[int, FaultsRecord]:
    flags = ["--capacity=100", "--seconds=2", "--request-limit-s=5", f"--images={images}", f"--out={out}"]
    try:
        status = main(["faults", *flags, *more])
    except SystemExit as end:
        status = int(end.code or 0)
    return status, FaultsRecord.load(out / "faults.json")


def missed(record: FaultsRecord) -> set[str]:
    return {check.title for scenario in record.scenarios for check in scenario.checks if not check.held}


def test_a_server_that_dies_and_comes_back_is_told_from_its_failures(stage, image_folder, tmp_path):
    status, record = run_faults(image_folder, tmp_path, "--only=sigkill")
    assert missed(record) == set()
    assert status == 0
    (scenario,) = record.scenarios
    assert scenario.evidence.counts.endings.get("cut", 0) == scenario.evidence.counts.allowed > 0
    assert scenario.evidence.places == 256
    assert "| sigkill |" in (tmp_path / "faults.md").read_text()


def test_a_wrong_answer_and_a_leak_are_found(stage, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fault_stage, "PLACES", 8)
    monkeypatch.setattr(fault_stage.Victim, "settled", lambda self, *_, **__: self.state())
    stage += ["--wrong-every", "75", "--leak"]
    status, record = run_faults(image_folder, tmp_path, "--only=full-disk", "--seconds=4")
    assert status == 2
    assert {"wrong answers", "requests in flight after the load"} <= missed(record)
    assert "graphs and profiles that the log says were not kept" in missed(record)


@pytest.mark.parametrize("flag", ["--share=1", "--seconds=0", "--capacity=0", "--capacity=inf"])
def test_what_cannot_be_loaded_is_refused(stage, image_folder, tmp_path, capsys, flag):
    assert main(["faults", f"--images={image_folder}", f"--out={tmp_path}", flag]) == 1
    assert "slicewise-load: error" in capsys.readouterr().err


def test_a_soak_leaves_samples_report_and_plot(stage, image_folder, tmp_path, capsys):
    flags = ["--capacity=150", "--minutes=0.055", "--part-s=0.3", f"--images={image_folder}", f"--out={tmp_path}"]
    with contextlib.suppress(SystemExit):  # its latency is what it is
        main(["soak", *flags])
    assert {file.name for file in tmp_path.iterdir()} == {"soak.json", "soak.md", "soak.png"}
    record = SoakRecord.load(tmp_path / "soak.json")
    assert len(record.parts) == 11
    assert len(record.samples) > 11
    assert all(part.counts.endings == {"right": part.counts.requests} for part in record.parts)
    assert "it says little about leaks" in (tmp_path / "soak.md").read_text()


def test_a_soak_too_short_to_compare_is_refused(stage, image_folder, tmp_path, capsys):
    assert main(["soak", "--minutes=10", f"--images={image_folder}", f"--out={tmp_path}"]) == 1
    assert "10 parts of 60 s; allowed: at least 11" in capsys.readouterr().err


def test_hits_are_timed_beside_nothing(stage, image_folder, tmp_path):
    network = Network("tiny", image_folder)
    with Victim(faults.slicewise_server(network), tmp_path / "log") as server:
        corpus = learn(server, network, 8)
    record = measure_cache(MEMORY, network, corpus, 20, tmp_path)
    assert (record.hits, record.others, record.ledger_madds) == (20, 0, 0)
    assert record.service.p50_ms == record.service.p99_ms == 0.05
    assert record.client.p50_ms > 0
    assert record.baseline.p50_ms > 0


def test_an_error_on_the_wire_is_said(stage, image_folder, tmp_path):
    with Victim(faults.slicewise_server(Network("tiny", image_folder)), tmp_path / "log") as server:
        wire = Wire(server.port)
        with pytest.raises(BenchError, match=r"answered HTTP/1\.1 404"):
            wire.exchange(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
        body, seconds = wire.exchange(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert json.loads(body) == {}
        assert seconds > 0
        server.kill()
        with pytest.raises((BenchError, OSError)):
            wire.exchange(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wire.close()


def test_images_that_give_the_same_answer_are_not_used(stage, image_folder, tmp_path):
    folder = tmp_path / "same"
    folder.mkdir()
    data = next(image_folder.rglob("*.jpg")).read_bytes()
    for place in range(9):
        (folder / f"{place}.jpg").write_bytes(data)
    network = Network("tiny", folder)
    with (
        Victim(faults.slicewise_server(network), tmp_path / "log") as server,
        pytest.raises(BenchError, match="1 images whose answers tell them apart; needed: 8"),
    ):
        learn(server, network, 8)
