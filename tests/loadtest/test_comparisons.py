import dataclasses
import subprocess
from pathlib import Path

import pytest

from loadtest import comparisons as module
from loadtest.arms import CommandArm, HttpArm
from loadtest.comparisons import NAMES, Network, Plan, comparisons, newest_version, peer_flags
from loadtest.results import Metric, Side

CIFAR = Network("small", Path("cifar.zip"))
PLAN = Plan(None, None, "0:10,3:3,7:2,13:1", clients=8)
LOOP = "slicewise profile --loop --mix {mix} --workers {workers} --images {images} --seconds {seconds}"


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Network:
    """A repository with a manifest of four slices; its export writes nothing and succeeds."""
    folder = tmp_path / "models" / "large" / "2"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"slices": [0, 0, 0, 0]}')
    monkeypatch.setattr(module.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, "", ""))
    return Network("large", tmp_path / "photos.zip", tmp_path / "models")


def test_every_name_is_planned_when_there_is_everything(photos, tmp_path):
    plan = dataclasses.replace(PLAN, photos=photos, cifar=CIFAR, loop_command=LOOP)
    assert tuple(one.name for one in comparisons(plan, NAMES, tmp_path)) == NAMES


def test_what_there_is_nothing_for_is_left_out(photos, tmp_path):
    assert comparisons(PLAN, NAMES, tmp_path) == []
    no_loop = dataclasses.replace(PLAN, photos=photos, loop_command="")
    names = {one.name for one in comparisons(no_loop, NAMES, tmp_path)}
    assert names == {"fixed_widest_fastapi", "fixed_widest_litserve", "width_mix"}
    (only,) = comparisons(dataclasses.replace(PLAN, cifar=CIFAR), ("gate_batch",), tmp_path)
    assert only.name == "gate_batch"


def test_the_bars_are_those_that_were_promised(photos, tmp_path):
    plan = dataclasses.replace(PLAN, photos=photos, cifar=CIFAR, loop_command=LOOP)
    bars = {
        (one.name, bar.metric, bar.side, bar.target) for one in comparisons(plan, NAMES, tmp_path) for bar in one.bars
    }
    assert bars == {
        ("fixed_widest_fastapi", Metric.THROUGHPUT, Side.AT_LEAST, 1.15),
        ("fixed_widest_fastapi", Metric.P99, Side.AT_MOST, 1.10),
        ("fixed_widest_litserve", Metric.THROUGHPUT, Side.AT_LEAST, 1.35),
        ("fixed_widest_litserve", Metric.P99, Side.AT_MOST, 1.10),
        ("width_mix", Metric.THROUGHPUT, Side.AT_LEAST, 1.8),
        ("loop_saturated", Metric.CPU, Side.AT_MOST, 1.15),
        ("loop_one_client", Metric.P50_EXCESS, Side.AT_MOST, 2.5),
        ("gate_batch", Metric.THROUGHPUT, Side.AT_LEAST, 1.5),
    }


def test_one_slicewise_serves_all_comparisons_of_its_network(photos, tmp_path):
    plan = dataclasses.replace(PLAN, photos=photos, loop_command=LOOP, serve_flags=("--workers", "2"))
    served = [one.a for one in comparisons(plan, NAMES, tmp_path)]
    assert all(isinstance(arm, HttpArm) for arm in served)
    (spec,) = {arm.server for arm in served}
    assert spec.command[1:] == (
        "serve", "--repository", str(photos.repository), "--model", "large", "--port", "{port}",
        "--log-level", "warning", "--workers", "2",
    )  # fmt: skip


def test_peers_get_the_widest_slice(photos, tmp_path):
    found = comparisons(dataclasses.replace(PLAN, photos=photos), ("width_mix",), tmp_path)[0].b
    assert isinstance(found, HttpArm)
    assert found.server.command[-4:] == (
        "--graph", str(tmp_path / "large-3.onnx"), "--manifest", str(tmp_path / "models/large/2/manifest.json"),
    )  # fmt: skip


def test_a_peer_may_get_another_slice(photos, tmp_path):
    assert peer_flags(photos, tmp_path, 1)[:2] == ["--graph", str(tmp_path / "large-1.onnx")]
    with pytest.raises(ValueError, match=r"large has no width 4; allowed: 0\.\.3"):
        peer_flags(photos, tmp_path, 4)


def test_a_network_that_does_not_export_is_said(photos, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "slicewise-models: error: bad digest\n")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match="export of large failed: slicewise-models: error: bad digest"):
        comparisons(dataclasses.replace(PLAN, photos=photos), NAMES, tmp_path)


def test_peers_need_a_repository(tmp_path):
    with pytest.raises(ValueError, match="need --repository"):
        comparisons(dataclasses.replace(PLAN, photos=CIFAR), NAMES, tmp_path)


def test_the_loop_is_told_mix_workers_and_images(photos, tmp_path):
    plan = dataclasses.replace(PLAN, photos=photos, loop_command=LOOP)
    (alone,) = comparisons(plan, ("loop_one_client",), tmp_path)
    assert isinstance(alone.b, CommandArm)
    assert isinstance(alone.a, HttpArm)
    assert alone.b.command == (
        module.script("slicewise"), "profile", "--loop", "--mix", "0:10,3:3,7:2,13:1", "--workers", "1",
        "--images", str(photos.images), "--seconds", "{seconds}",
    )  # fmt: skip
    assert (alone.a.clients, alone.b.workers) == (1, 1)


def test_the_gate_is_compared_with_the_widest_slice_on_the_same_server(tmp_path):
    batch, single = comparisons(dataclasses.replace(PLAN, cifar=CIFAR), NAMES, tmp_path)
    for one in (batch, single):
        assert isinstance(one.a, HttpArm)
        assert isinstance(one.b, HttpArm)
        assert one.a.server == one.b.server
        assert (one.a.mix, one.b.mix) == ("", "Slice-Width=widest")
    assert (batch.a.path, batch.a.images_per_request) == ("/v1/classify/batch", 32)
    assert (single.a.path, single.a.images_per_request) == ("/v1/classify", 1)


def test_versions_are_ordered_as_numbers(tmp_path):
    for version in ("2", "10", "draft"):
        (tmp_path / "net" / version).mkdir(parents=True)
    assert newest_version(tmp_path / "net").name == "10"
    with pytest.raises(ValueError, match="absent: no version"):
        newest_version(tmp_path / "absent")
