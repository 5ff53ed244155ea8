"""Structured logs: one event per line, with the request's id where there is one."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import structlog


class _NotOfClients(logging.Filter):
    """Lets pass what is not about one malformed request."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Invalid HTTP request received.")


def configure(log_format: str, level: str) -> None:
    """Set up structlog and bring the standard library's loggers (uvicorn's among them) to the same form.

    What Pillow warns of in images goes nowhere: it would be lines of another form, and each kind of warning with its
    numbers would be remembered for ever. Nor does what libraries warn of in requests: clients are answered with what is
    wrong, and would fill the log.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    uvicorn = logging.getLogger("uvicorn.error")
    if not any(isinstance(each, _NotOfClients) for each in uvicorn.filters):
        uvicorn.addFilter(_NotOfClients())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    json = log_format == "json"
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level.upper()),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    processors: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if json:
        processors.append(structlog.processors.format_exc_info)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[*processors, renderer])
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
