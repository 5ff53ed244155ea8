"""What reaches the log."""

import logging

import pytest

from service import logs


@pytest.fixture
def untouched():
    """The loggers of others as they were."""
    root = logging.getLogger()
    handlers, level, uvicorn = root.handlers, root.level, logging.getLogger("uvicorn.error").filters[:]
    yield
    root.handlers, logging.getLogger("uvicorn.error").filters = handlers, uvicorn
    root.setLevel(level)
    logging.getLogger("python_multipart").setLevel(logging.NOTSET)


@pytest.mark.usefixtures("untouched")
def test_malformed_requests_are_not_logged_and_everything_else_is(capsys):
    logs.configure("json", "info")
    logs.configure("json", "info")
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    logging.getLogger("python_multipart.multipart").warning("Did not find boundary character %r at index %d", 1, 2)
    assert capsys.readouterr().err == ""
    logging.getLogger("uvicorn.error").warning("Exceeded concurrency limit.")
    logging.getLogger("python_multipart.multipart").error("no room")
    assert [line.count("{") for line in capsys.readouterr().err.splitlines()] == [1, 1]
    assert len(logging.getLogger("uvicorn.error").filters) == 1
