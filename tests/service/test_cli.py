"""The console script as a process: start, answer, check a repository, drain on SIGTERM."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from support import CLASSES, TINY_INPUT, calibrated_gate, random_image, tiny_net

from models.checkpoint import save


def slicewise(*arguments, log=subprocess.PIPE, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLICEWISE_")} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "service", *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )


def run(*arguments, **environment):
    process = slicewise(*arguments, **environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_ready(url, process):
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("the service did not become ready")


@contextlib.contextmanager
def serving_process(repository, port, tmp_path, drain_delay_s):
    """A warm ``slicewise serve`` and its log, killed at the end if it still runs."""
    # To a file: a pipe that nobody reads would fill up and stop the service.
    with (tmp_path / "log").open("w+") as log:
        process = slicewise(
            "serve", "--repository", str(repository), "--model", "tiny", "--port", str(port),
            "--drain-delay-s", drain_delay_s, log=log, SLICEWISE_PROFILE_LIMIT_S="0.2", SLICEWISE_LOG_FORMAT="json",
        )  # fmt: skip
        try:
            wait_ready(f"http://127.0.0.1:{port}", process)
            yield process, log
        finally:
            process.kill()
            process.communicate()


def test_serve_answers_drains_on_sigterm_and_exits_0(repository, port, tmp_path):
    url, statuses, stop = f"http://127.0.0.1:{port}", [], threading.Event()

    def load():
        with httpx.Client(base_url=url) as client:
            while not stop.is_set():
                try:
                    statuses.append(client.post("/v1/classify", content=random_image(0)).status_code)
                except httpx.TransportError:  # the port is closed, or a kept connection was at the wrong moment
                    return

    with serving_process(repository, port, tmp_path, "1") as (process, log):
        thread = threading.Thread(target=load)
        thread.start()
        while len(statuses) < 5:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        ready = httpx.get(f"{url}/readyz")
        assert (ready.status_code, ready.json()["error_type"]) == (503, "draining")
        process.wait(30)
        stop.set()
        thread.join()
        log.seek(0)
        lines = log.read()
    assert process.returncode == 0, lines
    assert set(statuses) == {200, 503}
    assert '"event": "settings"' in lines
    assert '"request_id"' in lines
    assert '"queue_ms"' in lines


def test_an_upload_that_is_under_way_at_sigterm_is_still_answered(repository, port, tmp_path):
    image = random_image(0)
    with (
        serving_process(repository, port, tmp_path, "0") as (process, _),
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
    ):
        head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}\r\n\r\n"
        connection.sendall(head.encode() + image[:100])
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        time.sleep(4)  # longer than answers have to leave once the drain is over
        connection.sendall(image[100:])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert process.wait(20) == 0


def test_settings_that_are_wrong_are_named():
    code, _, err = run("serve", "--port", "99999")
    assert code == 2
    assert "port" in err
    assert "99999" in err
    code, _, err = run("serve", SLICEWISE_WORKERS="-1")
    assert code == 2
    assert "workers" in err


def test_a_port_that_is_taken_ends_serve_with_1(repository):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, err = run("serve", "--repository", str(repository), "--model", "tiny", "--port", port)
    assert code == 1
    assert "address already in use" in err


def test_a_model_that_is_not_there_is_named(repository):
    code, _, err = run("serve", "--repository", str(repository), "--model", "nope")
    assert code == 1
    assert "nope" in err


def test_check_says_ok_or_why_not(repository, tmp_path):
    code, out, _ = run("check", "--repository", str(repository))
    assert code == 0
    assert out.count("ok ") == 3
    shutil.copytree(repository, tmp_path / "broken")
    tensors = tmp_path / "broken" / "tiny" / "1" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    code, out, _ = run("check", "--repository", str(tmp_path / "broken"))
    assert code == 1
    assert "bad  tiny/1" in out
    assert run("check", "--repository", str(tmp_path))[0] == 1


@pytest.fixture(scope="module")
def pointed(tmp_path_factory):
    """A repository whose model got its three operating points in version 2."""
    root, net = tmp_path_factory.mktemp("pointed"), tiny_net()
    for version, gate in ((1, None), (2, calibrated_gate(net))):
        save(root / "pointed" / str(version), net, classes=CLASSES, input_spec=TINY_INPUT, gate=gate)
    return str(root)


def test_serve_refuses_an_operating_point_that_the_model_lacks(pointed):
    code, out, err = run(
        "serve", "--repository", pointed, "--model", "pointed", "--operating-point", "3", SLICEWISE_LOG_LEVEL="error"
    )
    assert (code, out) == (2, "")
    assert err == "slicewise: error: setting operating_point: operating point 3 of pointed/2; allowed: 0..2\n"


def test_check_wants_the_operating_point_of_what_would_be_served(pointed):
    code, out, _ = run("check", "--repository", pointed, "--model", "pointed", "--operating-point", "2")
    assert (code, out.count("ok ")) == (0, 2)
    assert run("check", "--repository", pointed, SLICEWISE_OPERATING_POINT="7")[0] == 0  # serves none of its models
    code, out, _ = run("check", "--repository", pointed, "--model", "pointed", "--operating-point", "7")
    assert code == 1
    assert "ok   pointed/1: " in out
    assert "bad  pointed/2: setting operating_point: operating point 7 of pointed/2; allowed: 0..2\n" in out


def test_help_lists_the_commands_and_every_setting():
    code, out, _ = run("--help")
    assert code == 0
    assert "serve" in out
    code, out, _ = run("serve", "--help")
    assert code == 0
    assert "--queue-capacity-images" in out
    assert run("nope")[0] == 2


def test_an_unknown_policy_is_refused_before_anything_is_built(repository):
    code, _, err = run("serve", "--repository", str(repository), "--model", "tiny", "--policy", "fixed:9")
    assert code == 2
    assert "\nslicewise: error: setting policy, model tiny: policy is 'fixed:9'; allowed: gate_slack, " in err
