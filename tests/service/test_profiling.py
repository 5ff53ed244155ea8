import json
import os
import re
import threading
import time
from dataclasses import replace
from unittest.mock import Mock

import pytest
from support import random_image

from models.checkpoint import load, resolve
from service.app import warm_up
from service.cli import main
from service.engine.graphs import SessionFactory
from service.engine.onnx import OnnxEngine
from service.profiler import read_images, spread
from service.profiling import ProfileKey, forget_unused, keep_profile, kept_profile, measured, run_once


@pytest.fixture(scope="module")
def checkpoint(repository):
    return load(resolve(repository, "tiny"))


@pytest.fixture(scope="module")
def engine(checkpoint):
    return OnnxEngine(checkpoint, 1, SessionFactory(None))


@pytest.fixture(scope="module")
def profile(checkpoint, engine):
    return measured(checkpoint, engine, 0.2, threading.Event())


def test_a_profile_comes_back_as_it_was_kept(tmp_path, profile):
    file = keep_profile(tmp_path / "profiles", profile)
    assert kept_profile(tmp_path / "profiles", profile.key, 4) == profile
    assert list(file.parent.iterdir()) == [file]
    assert profile.table().seconds(None, 1) > 0


@pytest.mark.parametrize("part", ["network", "engine", "device", "processor"])
def test_a_profile_holds_for_what_it_was_measured_on_only(tmp_path, profile, part):
    keep_profile(tmp_path, profile)
    parts = {name: getattr(profile.key, name) for name in ("network", "engine", "device", "processor")}
    assert kept_profile(tmp_path, ProfileKey(**(parts | {part: "another"})), 4) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("timings"),
        lambda data: data["timings"].pop(0),  # the trunk at batch 1
        lambda data: data["timings"][0].update(p50_s=-1.0),
        lambda data: data.update(timings=[t for t in data["timings"] if t["width"] != 3]),
        lambda data: data.update(format=2),
    ],
)
def test_a_damaged_profile_is_measured_again(tmp_path, profile, damage):
    file = keep_profile(tmp_path, profile)
    data = json.loads(file.read_bytes())
    damage(data)
    file.write_text(json.dumps(data))
    assert kept_profile(tmp_path, profile.key, 4) is None
    file.write_bytes(b"\xff")
    assert kept_profile(tmp_path, profile.key, 4) is None


def test_a_folder_that_cannot_be_written_loses_the_profile_only(tmp_path, profile):
    (tmp_path / "file").write_text("no folder")
    assert keep_profile(tmp_path / "file" / "profiles", profile) is None


def test_a_warm_up_keeps_what_it_measured_and_the_next_takes_it(tmp_path, monkeypatch, checkpoint, make_settings):
    settings = make_settings(cache_dir=tmp_path, profile_limit_s=20)
    first = warm_up(checkpoint, settings, threading.Event())
    monkeypatch.setattr("service.hosting.measured", None)
    again = warm_up(checkpoint, settings, threading.Event())
    assert again.table == first.table


def test_a_profile_that_was_long_unused_is_taken_once_more(tmp_path, monkeypatch, checkpoint, make_settings):
    settings = make_settings(cache_dir=tmp_path, profile_limit_s=20)
    first = warm_up(checkpoint, settings, threading.Event())
    (file,) = (tmp_path / "profiles").iterdir()
    os.utime(file, (0, time.time() - 31 * 86_400))
    monkeypatch.setattr("service.hosting.measured", None)
    assert warm_up(checkpoint, settings, threading.Event()).table == first.table


def test_a_profile_on_a_disk_that_is_read_only_is_taken(tmp_path, monkeypatch, profile):
    keep_profile(tmp_path, profile)
    monkeypatch.setattr(os, "utime", Mock(side_effect=OSError("read-only file system")))
    assert kept_profile(tmp_path, profile.key, 4) == profile


def test_another_input_transform_is_another_network(checkpoint):
    manifest = checkpoint.manifest
    others = [
        replace(manifest, input=replace(manifest.input, mean=(0.1, 0.1, 0.1))),
        replace(manifest, config=manifest.config | {"se_ratio": 0.5}),
        replace(manifest, digest="sha256:0"),
    ]
    assert len({m.network_id for m in (manifest, *others)}) == 4
    assert replace(manifest, name="renamed", slices=()).network_id == manifest.network_id


def test_a_hurried_profile_is_used_and_not_kept(tmp_path, checkpoint, make_settings):
    warm = warm_up(checkpoint, make_settings(cache_dir=tmp_path, profile_limit_s=1e-6), threading.Event())
    assert warm.table.image_seconds(3) > 0
    assert not (tmp_path / "profiles").exists()


def test_a_cancelled_warm_up_stops_between_batches(checkpoint, engine, profile):
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(InterruptedError):
        run_once(engine, checkpoint, profile.timings, cancelled)


def test_a_mix_keeps_its_counts_in_every_cycle():
    widths = spread({0: 10, 3: 3, 7: 2, 13: 1})
    for _ in range(5):
        cycle = [next(widths) for _ in range(16)]
        assert {w: cycle.count(w) for w in set(cycle)} == {0: 10, 3: 3, 7: 2, 13: 1}


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["slicewise", "profile", *arguments])
    with pytest.raises(SystemExit) as status:
        main()
    return status.value.code, capsys.readouterr()


@pytest.fixture
def flags(repository, tmp_path):
    return [
        "--repository", str(repository), "--model", "tiny", "--cache-dir", str(tmp_path / "cache"), "--workers", "2",
        "--measure-limit-s", "0.2",
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(random_image(seed))
    return folder


def test_the_command_measures_keeps_and_shows(monkeypatch, capsys, tmp_path, flags, folder):
    out = tmp_path / "out.json"
    loop = ("--loop-s", "0.3", "--loop-images", str(folder), "--loop-mix", "0:2, 3:1", "--json-out", str(out))
    status, printed = run(monkeypatch, capsys, *flags, *loop)
    assert (status, printed.err) == (0, "")
    assert "batch 1" in printed.out
    assert "kept: " in printed.out
    (result,) = json.loads(out.read_text())
    assert set(result["parts_mib"]) == {"trunk", "pixels_trunk", "gate", *(f"body {k}" for k in range(4))}
    assert {t["width"] for t in result["timings"]} == {None, 0, 1, 2, 3}
    assert result["loop"]["images"] > 10
    assert result["loop"]["threads"] == 2
    assert json.loads(printed.out.splitlines()[-1]) == result["loop"]


@pytest.mark.parametrize("mix", [(), ("--loop-mix", "1:1")])
def test_the_loop_alone_keeps_nothing_and_prints_one_line(monkeypatch, capsys, tmp_path, flags, folder, mix):
    loop = ("--loop-only", "true", "--loop-s", "0.2", "--loop-warm-up-s", "0.1", "--loop-images", str(folder))
    status, printed = run(monkeypatch, capsys, *flags, *loop, *mix)
    assert status == 0
    said = json.loads(printed.out)
    assert set(said) == {
        "threads", "images", "seconds", "cpu_s", "p50_ms", "p99_ms",
        "decode_cpu_s", "trunk_cpu_s", "gate_cpu_s", "body_cpu_s", "system_s", "page_faults",
    }  # fmt: skip
    assert all(said[f"{stage}_cpu_s"] > 0 for stage in ("decode", "trunk", "body"))
    assert mix or said["gate_cpu_s"] > 0
    assert not (tmp_path / "cache" / "profiles").exists()


def test_an_image_that_does_not_decode_ends_the_loop(monkeypatch, capsys, flags, folder):
    (folder / "broken.png").write_bytes(b"no image")
    status, printed = run(
        monkeypatch, capsys, *flags, "--loop-only", "true", "--loop-s", "30", "--loop-images", str(folder)
    )
    assert status == 1
    assert "8 bytes are not a readable image" in printed.err


def test_what_was_not_used_for_long_is_forgotten(tmp_path, profile):
    file = keep_profile(tmp_path, profile)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trunk.onnx").write_text("")
    for entry in (file, tmp_path / "old"):
        os.utime(entry, (0, time.time() - 31 * 86_400))
    assert kept_profile(tmp_path, profile.key, 4) == profile  # now it is in use
    forget_unused(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([file.name, "new"])
    forget_unused(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--loop-s", "1"), "loop_s needs loop_images"),
        (("--loop-only", "true"), "loop_only needs loop_s"),
        (("--loop-s", "1", "--loop-images", "IMAGES", "--loop-mix", "9:1"), r"widths \[9\]; allowed for tiny: 0\.\.3"),
        (("--loop-mix", "0:0"), "each with at least 1 image"),
        (("--loop-mix", "0"), "loop_mix"),
        (("--loop-s", "1", "--loop-images", "service"), "holds no images"),
    ],
)
def test_the_command_says_what_is_wrong(monkeypatch, capsys, flags, folder, extra, message):
    status, printed = run(monkeypatch, capsys, *flags, *(str(folder) if e == "IMAGES" else e for e in extra))
    assert status == 2
    assert re.search(message, printed.err)


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        read_images(tmp_path)
