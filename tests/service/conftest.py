import contextlib
import threading
import time

import httpx
import pytest
import uvicorn

from service.app import create_app, load_checkpoints
from service.settings import Settings


class Server:
    """A real uvicorn on a free port, in a thread; ``state`` reaches inside for faults and figures."""

    def __init__(self, settings):
        self.app = create_app(settings, load_checkpoints(settings))
        self.state = self.app.state.service
        config = uvicorn.Config(self.app, host="127.0.0.1", port=0, log_config=None, access_log=False)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        give_up = time.monotonic() + 60
        while not self.server.started:
            assert time.monotonic() < give_up
            time.sleep(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=30)
        return self

    def wait_ready(self):
        give_up = time.monotonic() + 60
        while self.client.get("/readyz").status_code != 200:
            assert time.monotonic() < give_up
            time.sleep(0.02)
        return self

    def __exit__(self, *exc):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def metric(self, name, **labels):
        return self.state.telemetry.registry.get_sample_value(name, labels) or 0

    def metric_sum(self, name, **labels):
        """Sum of a series over every label that is not given."""
        return sum(
            sample.value
            for family in self.state.telemetry.registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@pytest.fixture(scope="session")
def make_settings(repository):
    def make(**changes):
        defaults = {"repository": repository, "model": ["tiny"], "workers": 2, "profile_limit_s": 0.3}
        return Settings(_cli_parse_args=[], **(defaults | changes))

    return make


@pytest.fixture(scope="session")
def start(make_settings):
    """Context manager factory: a server with changed settings."""

    @contextlib.contextmanager
    def run(**changes):
        with Server(make_settings(**changes)) as server:
            yield server.wait_ready()

    return run


@pytest.fixture(scope="module")
def server(start):
    with start() as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client
