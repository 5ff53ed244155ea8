"""A real service under a mixed load, and a real Prometheus that scrapes it every second."""

import contextlib
import hashlib
import itertools
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from support import random_image

ROOT = Path(__file__).parents[2]
MODEL = "ds_resnet_tiny_cifar10"
# One worker, and a target that leaves time to ask the gate; a short queue refuses some.
SETTINGS = {
    "model": MODEL, "workers": "1", "policy": "gate_slack", "default-slo-ms": "60", "queue-capacity-images": "96",
    "batch-limit-images": "64", "profile-limit-s": "0.2", "device": "cpu", "log-level": "error",
    "cache-enabled": "true",
}  # fmt: skip
PATIENCE_S = 30
# Batches by turns, from too short for the narrowest width to ample for the widest: on a machine of any
# speed some of them are narrowed.
BATCH_BUDGETS_MS = [round(5 * 1.4**step) for step in range(16)]
IMAGES = [random_image(seed, size=32) for seed in range(16)]
PNG = {"content-type": "image/png"}
KEYS = {"load": "key of the load", "small": "key of one who asks for too much"}
KEY_FILE = "\n".join(
    f'[keys.{name}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\nquota = "{quota}"'
    for (name, key), quota in zip(KEYS.items(), ("none", "1k"), strict=True)
)
# Every kind of budget and of bad request; whether one is met is the load's business.
SINGLES: tuple[tuple[dict[str, str], bytes | None], ...] = (
    ({}, None),
    ({"x-api-key": KEYS["small"]}, None),
    ({"cache-control": "max-age=60"}, None),
    ({"compute-budget": "80%"}, None),
    ({"accuracy-floor": "0.74"}, None),
    ({"slice-width": "1"}, None),
    ({"latency-budget": "20s"}, None),
    ({"latency-budget": "30ms"}, None),
    ({"latency-budget": "0.001ms"}, None),
    ({"compute-budget": "0.001k"}, None),
    ({"compute-budget": "lots"}, None),
    ({}, b"rubbish"),
)
# Always firing: what alerts leave behind is to be seen.
TEST_RULES = """
groups:
  - name: test
    rules: [{alert: SlicewiseTest, expr: vector(1)}]
"""


def need(program: str) -> str:
    """The path of a program; the test is skipped where there is none."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"needs {program}: apt-get install prometheus")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: list[str], log: Path, ready_url: str, **environment: str) -> Iterator[None]:
    """A process that answers ``ready_url`` with 200, ended afterwards."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLICEWISE_")} | environment
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: answers(ready_url) or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code == 200
    return False


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, "it did not come to be"
        time.sleep(0.05)


def hang_up(client: httpx.Client, port: int, delay_s: float) -> None:
    """Send a batch and leave before it is answered: its images are in the queues, and nobody wants them.

    Few images are looked at by the gate and wait for their bodies; many are not even looked at.
    """
    files = [("image", image) for image in (IMAGES * 3)[: random.choice((8, 16, 32, 48))]]
    request = client.build_request("POST", "/v1/classify/batch", files=files, headers={"cache-control": "no-cache"})
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(f"POST /v1/classify/batch HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        time.sleep(delay_s)


class Load:
    """Sends until it is told to stop: single images of every kind, batches, and batches whose caller leaves."""

    def __init__(self, port: int) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self._stop = threading.Event()
        self._budgets_ms = itertools.cycle(BATCH_BUDGETS_MS)
        self._threads = [threading.Thread(target=self._repeat, args=(work,)) for work in (self._singles, self._batches)]
        self.failures: list[Exception] = []

    def _repeat(self, work: Callable[[httpx.Client], None]) -> None:
        try:
            with httpx.Client(base_url=self.url, timeout=30, headers={"x-api-key": KEYS["load"]}) as client:
                while not self._stop.is_set():
                    # Refused bodies may end in a reset; what is to be seen is what the service counts.
                    with contextlib.suppress(httpx.TransportError, ConnectionError):
                        work(client)
        except Exception as error:  # noqa: BLE001  a thread cannot fail a test; __exit__ does
            self.failures.append(error)

    def _singles(self, client: httpx.Client) -> None:
        for headers, body in SINGLES:
            # Most are to be computed, although the pictures are few and the cache would know them all.
            own = {"cache-control": "no-cache"} | PNG | headers
            client.post("/v1/classify", content=body or random.choice(IMAGES), headers=own)
            self._stop.wait(0.01)

    def _batches(self, client: httpx.Client) -> None:
        hang_up(client, self.port, random.uniform(0.002, 0.05))
        files = [("image", image) for image in IMAGES * 4]
        headers = {"latency-budget": f"{next(self._budgets_ms)}ms", "cache-control": "no-cache"}
        client.post("/v1/classify/batch", files=files, headers=headers)
        self._stop.wait(0.05)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        assert not self.failures


class Prometheus(NamedTuple):
    """The API of a Prometheus that scrapes a loaded service. give_up: when data is no longer waited for."""

    url: str
    give_up: float

    def get(self, path: str, **parameters: str | float) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def ask(self, expr: str, instant: bool = False) -> list[dict[str, str]]:
        """The labels of every series with a number in it, over the last seconds as a graph asks, or at this moment."""
        if instant:
            found = [(s["metric"], [s["value"]]) for s in self.get("query", query=expr)["result"]]
        else:
            now_s = time.time()
            result = self.get("query_range", query=expr, start=now_s - 10, end=now_s, step=1)["result"]
            found = [(s["metric"], s["values"]) for s in result]
        return [labels for labels, values in found if any(value != "NaN" for _, value in values)]

    def wait_for(self, expr: str, instant: bool = False) -> list[dict[str, str]]:
        """The same, asked until there is something or patience ends."""
        while True:
            found = self.ask(expr, instant)
            if found or time.monotonic() > self.give_up:
                return found
            time.sleep(0.25)


def configure(folder: Path, service_port: int) -> Path:
    """The shipped configuration, with another target and another pace."""
    shutil.copytree(ROOT / "deploy" / "prometheus", folder)
    (folder / "rules" / "test.yml").write_text(TEST_RULES)
    config = folder / "prometheus.yml"
    changes = {
        config: [
            ("service:8000", f"127.0.0.1:{service_port}"),
            ("scrape_interval: 5s", "scrape_interval: 1s"),
            ("evaluation_interval: 15s", "evaluation_interval: 1s"),
        ],
        folder / "rules" / "recording.yml": [("interval: 1m", "interval: 1s")],
    }
    for path, replacements in changes.items():
        text = path.read_text()
        for old, new in replacements:
            assert text.count(old) == 1, f"{old} in {path}"
            text = text.replace(old, new)
        path.write_text(text)
    return config


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    program = need("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    service_port, port = free_port(), free_port()
    service_url, url = f"http://127.0.0.1:{service_port}", f"http://127.0.0.1:{port}"
    keys = folder / "keys.toml"
    keys.write_text(KEY_FILE)
    flags = [part for name, value in SETTINGS.items() for part in (f"--{name}", value)]
    service = [sys.executable, "-m", "service", "serve", "--port", str(service_port), "--keys-file", str(keys), *flags]
    config = configure(folder / "config", service_port)
    scraper = [
        program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    with (
        running(service, folder / "service.log", f"{service_url}/readyz"),
        running(scraper, folder / "prometheus.log", f"{url}/-/ready", GOMAXPROCS="1"),
        Load(service_port),
    ):
        yield Prometheus(url, time.monotonic() + PATIENCE_S)
