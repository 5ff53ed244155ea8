import sys

import pytest

from loadtest.arms import BenchError, CommandArm, HttpArm, Window, shown
from loadtest.servers import Fleet

SAYS = 'print("warming up"); print("""{"images": 50, "seconds": {seconds}, "cpu_s": 0.5, "p50_ms": 4.5}""")'


def measure_command(tmp_path, code):
    with Fleet(tmp_path) as fleet:
        return CommandArm("loop", (sys.executable, "-c", code), 2).measure(fleet, Window(1.0, 2.5))


def test_a_command_measures_itself_over_the_window_it_is_told(tmp_path):
    run = measure_command(tmp_path, SAYS)
    assert (run.images, run.seconds, run.cpu_s, run.p50_ms, run.p99_ms) == (50, 2.5, 0.5, 4.5, None)
    assert (run.images_per_s, run.cpu_s_per_image, run.latencies_ms) == (20.0, 0.01, ())


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("raise SystemExit('no such model')", "loop: ended with status 1: no such model"),
        ("print('done')", "loop: last line of stdout is not the JSON expected"),
        ("pass", "loop: last line of stdout is not the JSON expected"),
        ("print({})", "loop: last line of stdout is not the JSON expected"),
        (SAYS.replace("50,", "0,"), "loop: no image was processed"),
    ],
)
def test_a_command_that_fails_is_said(tmp_path, code, complaint):
    with pytest.raises(BenchError, match=complaint):
        measure_command(tmp_path, code)


def test_an_arm_that_never_gets_an_answer_says_why(fake_spec, image_folder, tmp_path):
    arm = HttpArm("ours", fake_spec("fake"), "/absent", image_folder, clients=2)
    with (
        Fleet(tmp_path) as fleet,
        pytest.raises(BenchError, match=r"ours: no image .* \{'404': \d+\}; log .*fake\.log"),
    ):
        arm.measure(fleet, Window(0.0, 0.1))


def test_a_generator_that_cannot_start_is_said(fake_spec, tmp_path):
    arm = HttpArm("ours", fake_spec("fake"), "/classify", tmp_path / "absent", clients=2)
    with Fleet(tmp_path) as fleet, pytest.raises(BenchError, match="generator ended early"):
        arm.measure(fleet, Window(0.0, 0.1))


def test_records_show_commands_without_folders(fake_spec, image_folder):
    assert shown(("/usr/bin/python3", "-m", "x", "--graph", "/home/me/w.onnx")) == "python3 -m x --graph w.onnx"
    arm = HttpArm("ours", fake_spec("fake"), "/classify", image_folder, 2, 32, "Slice-Width=widest")
    assert arm.record().request == "POST /classify, 32 images, Slice-Width=widest"
    assert "fake_server.py --port {port}" in arm.record().command
