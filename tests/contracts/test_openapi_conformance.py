"""Whether the service keeps /openapi.json, asked by schemathesis of a service that runs as its users run it.

Generated requests that keep the document, and such that break it, at every route; all checks. More of them:

    OPENAPI_EXAMPLES=1500 python -m pytest tests/contracts/test_openapi_conformance.py -s

with OPENAPI_SEED for others than the last time.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

CONFIG = Path(__file__).parent / "openapi" / "schemathesis.toml"
EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", "5"))
SEED = int(os.environ.get("OPENAPI_SEED", "1"))
LIMIT_S = 100 + 2 * EXAMPLES
ANSWERED = (
    "POST /v1/classify", "POST /v1/classify/batch", "POST /v2/models/{model}/infer", "POST /v2/repository/index",
    "POST /v2/repository/models/{model}/load",
)  # fmt: skip


@pytest.fixture
def url(repository, tmp_path):
    """A running service; its log is shown when a test fails."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "service", "serve", "--repository", str(repository), "--model", "tiny,blank", "--port",
        str(port), "--device", "cpu", "--policy", "gate", "--model-control", "explicit", "--profile-limit-s", "0.3",
        "--body-timeout-s", "2", "--log-level", "warning",
    ]  # fmt: skip
    with (tmp_path / "service.log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            wait_ready(address, process)
            yield address
        finally:
            process.terminate()
            assert process.wait(60) == 0
    text = (tmp_path / "service.log").read_text()
    print(text)
    assert "internal_error" not in text


def wait_ready(address, process):
    give_up_s = time.monotonic() + 60
    while True:
        assert process.poll() is None
        assert time.monotonic() < give_up_s
        try:
            if httpx.get(f"{address}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def answers(report):
    """How often each operation was answered with each status."""
    found = Counter()
    for line in report.read_text().splitlines():
        event = json.loads(line)
        recorder = event.get("ScenarioFinished", {}).get("recorder") or {}
        for interaction in recorder.get("interactions", {}).values():
            if interaction.get("response"):
                found[recorder["label"], interaction["response"]["status_code"]] += 1
    return found


@pytest.mark.timeout(LIMIT_S)
def test_every_answer_is_as_the_document_says(url, tmp_path):
    report = tmp_path / "report.ndjson"
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", f"{url}/openapi.json",
        "--seed", str(SEED), "--max-examples", str(EXAMPLES), "--no-color", "--report", "ndjson",
        "--report-ndjson-path", str(report),
    ]  # fmt: skip
    run = subprocess.run(command, cwd=CONFIG.parent, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    print(run.stdout)
    assert run.returncode == 0, run.stdout
    found = answers(report)
    print(f"{found.total()} cases, seed {SEED}")
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    asked = {operation for operation, _ in found}
    assert {f"{verb.upper()} {path}" for path, verbs in paths.items() for verb in verbs} <= asked
    assert found.total() >= 300
    # A document that nothing keeps is easy to conform to: what matters was answered as well as refused.
    assert [operation for operation in ANSWERED if not found[operation, 200] or not found[operation, 400]] == []
