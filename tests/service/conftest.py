import pytest
from support import serving

from service.settings import Settings


@pytest.fixture(scope="session")
def make_settings(repository):
    def make(**changes):
        defaults = {"repository": repository, "model": ["tiny"], "workers": 2, "profile_limit_s": 0.3, "device": "cpu"}
        defaults["policy"] = "gate"  # a busy machine must not move widths under a test's feet
        return Settings(_cli_parse_args=[], **(defaults | changes))

    return make


@pytest.fixture(scope="session")
def start(make_settings):
    """Context manager factory: a warm server with changed settings."""
    return lambda **changes: serving(make_settings(**changes))


@pytest.fixture(scope="module")
def server(start):
    with start() as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client
