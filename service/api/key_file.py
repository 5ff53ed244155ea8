"""The key file on disk: read at start, and again when it has changed."""

from __future__ import annotations

import time
from pathlib import Path

import structlog

from service.api.keys import KeyFileError, Keyring, parse_keys
from service.quota import Limit
from service.settings import SettingError

log = structlog.get_logger()

LOOK_S = 1.0
"""How often the file is looked at, at most, when requests come: a key that is taken back is refused this soon."""
MOST_BYTES = 1024 * 1024

Signature = tuple[int, int, int]


class KeyFile:
    """Keys that follow their file. Used on the event loop.

    A file that is missing or wrong at the start is a SettingError. One that becomes so later changes nothing
    and is logged once: the keys that were read stay in force.
    """

    def __init__(self, path: Path, default: Limit | None, burst_s: int) -> None:
        self._path, self._default, self._burst_s = path, default, burst_s
        self._looked_s = time.monotonic()
        try:
            self._seen: Signature | None = self._signature()
            self._keyring = self._read()
        except (OSError, KeyFileError) as error:
            raise SettingError(f"setting keys_file, {path}: {_reason(error)}") from error

    @property
    def keyring(self) -> Keyring:
        """The keys in force."""
        now_s = time.monotonic()
        if now_s >= self._looked_s + LOOK_S:
            self._looked_s = now_s
            self._look()
        return self._keyring

    def _look(self) -> None:
        try:
            signature: Signature | None = self._signature()
        except OSError:
            signature = None
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._keyring = self._read()
        except (OSError, KeyFileError) as error:
            log.error("keys_unreadable", reason=_reason(error), keys_in_force=len(self._keyring.keys))
        else:
            log.info("keys_read", keys=len(self._keyring.keys))

    def _signature(self) -> Signature:
        facts = self._path.stat()
        return facts.st_mtime_ns, facts.st_size, facts.st_ino

    def _read(self) -> Keyring:
        with self._path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise KeyFileError(f"more than {MOST_BYTES} bytes; allowed: at most these")
        return parse_keys(data, self._default, self._burst_s)


def _reason(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) else str(error)
