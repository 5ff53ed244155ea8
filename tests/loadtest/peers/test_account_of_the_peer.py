import json
import sys

import pytest
from support import random_image

pytest.importorskip("cv2")

from loadtest.account_loop import loop, main
from loadtest.account_measure import Served
from loadtest.account_readings import WatchedFleet, account_counters, decoding_threads
from loadtest.arms import HttpArm, Window
from loadtest.corpus import EncodedImage
from loadtest.peers.fastapi_onnx import STAGES, AccountedClassifier
from loadtest.peers.preprocess import Transform
from loadtest.servers import ServerSpec


@pytest.mark.skipif(sys.platform != "linux", reason="threads are read from /proc")
@pytest.mark.parametrize("is_clocked", [True, False])
def test_a_served_round_has_every_stage_and_leaves_little_out(graph, manifest, image_folder, tmp_path, is_clocked):
    flags = ("--graph", str(graph), "--manifest", str(manifest()[0]), "--threads", "2", "--account")
    command = (sys.executable, "-m", "loadtest.peers.fastapi_onnx", "--port", "{port}", *flags)
    spec = ServerSpec("peer", command, "/health")
    arm = HttpArm("peer", spec, "/classify", image_folder, clients=2)
    served = Served("peer", arm, EncodedImage("image/jpeg", random_image(0)), 0.05, is_clocked)
    with WatchedFleet(tmp_path, {spec: ("/account", account_counters)}) as fleet:
        costs, signs = served.measure(fleet, Window(0.1, 0.4))
        with fleet.running(spec) as server:
            assert server.pid not in decoding_threads(server, "/classify")
    on_loop = {"http", "framework", "total"}
    if is_clocked:
        assert set(costs) == on_loop | {*STAGES, "workers"}
    else:  # one pool decodes and classifies; a thread of it that gets no damaged picture looks like another pool's
        assert set(costs) - {"decode"} == on_loop | {"engine"}
    assert all(costs[key] > 0 for key in costs if key not in ("workers", "framework"))
    assert signs["busy_threads"] >= 2
    assert {"idle_ms_per_s", "engine_wall_ms", "page_faults"} <= set(signs)


def test_the_loop_without_http_counts_its_window_only(graph, manifest, image_folder, capsys):
    flags = ["--graph", str(graph), "--manifest", str(manifest()[0]), "--images", str(image_folder), "--threads", "2"]
    assert main([*flags, "--seconds", "0.2", "--warm-up-s", "0.05"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["threads"] == 2
    assert said["images"] > 0
    assert list(said["stages_cpu_s"]) == list(said["stages_wall_s"]) == list(STAGES)
    assert all(seconds > 0 for seconds in said["stages_cpu_s"].values())


def test_a_loop_without_images_is_said(graph, manifest, tmp_path, capsys):
    flags = ["--graph", str(graph), "--manifest", str(manifest()[0]), "--images", str(tmp_path), "--threads", "1"]
    assert main(flags) == 1
    assert "account_loop: error" in capsys.readouterr().err


def test_an_image_that_does_not_decode_ends_the_loop(graph, manifest):
    classifier = AccountedClassifier(graph, Transform.from_manifest(manifest()[0]))
    with pytest.raises(ValueError, match="8 bytes are not a readable image"):
        loop(classifier, [b"no image"], threads=2, warm_up_s=30, seconds=30)
