"""Keys: what a key file says, which key a request shows, and what that key grants. PURE.

A key file is TOML, one table per client; it holds digests, never keys:

    [keys.camera-7]
    sha256 = "…"               # of the key: printf %s "$KEY" | sha256sum
    role = "user"              # or "admin", who may load and unload models as well
    quota = "200M"             # MAdds per second, or "none"; absent: as the settings say
    compute_budget = "60%"     # budgets of requests that state none, as in the headers
    latency_budget = "100ms"
    accuracy_floor = "0.85"
    most_urgent = 3            # more urgent requests are taken as this urgent

A plain digest is enough because keys are to be random: no dictionary holds 128 random bits.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from service.api.budget_headers import RawHeaders, parse_budget
from service.errors import BadRequestError
from service.quota import Limit
from service.request import Budget

MOST_KEYS = 1000
"""Every request is compared with all of them, for about a tenth of a millisecond at this number."""
MOST_KEY_BYTES = 512

Role = Literal["user", "admin"]

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BUDGETS = {
    "compute_budget": b"compute-budget",
    "latency_budget": b"latency-budget",
    "accuracy_floor": b"accuracy-floor",
}
_FIELDS = {"sha256", "role", "quota", "most_urgent", *_BUDGETS}


class KeyFileError(ValueError):
    """A key file that cannot be used; the message names the key and the field, never a digest."""


@dataclass(frozen=True, slots=True)
class Key:
    """One client.

    limit        its quota, None for none.
    defaults     budgets of requests that state none.
    most_urgent  the least RFC 9218 urgency that counts for it, 0..7; 0 is the most urgent.
    """

    name: str
    digest: bytes
    role: Role
    limit: Limit | None
    defaults: Budget
    most_urgent: int

    def grant(self, stated: Budget) -> Budget:
        """A request's budget with this key's defaults and its ceiling of urgency.

        With a forced slice only the latency is filled in: such a request says itself what it costs.
        """
        compute_stated = stated.compute_madds is not None or stated.compute_share is not None
        is_forced = stated.forced is not None
        budget = replace(
            stated,
            latency_s=self.defaults.latency_s if stated.latency_s is None else stated.latency_s,
            urgency=max(stated.urgency, self.most_urgent),
        )
        if not (compute_stated or is_forced):
            budget = replace(
                budget, compute_madds=self.defaults.compute_madds, compute_share=self.defaults.compute_share
            )
        if stated.accuracy_floor is None and not is_forced:
            budget = replace(budget, accuracy_floor=self.defaults.accuracy_floor)
        return budget


@dataclass(frozen=True, slots=True)
class Keyring:
    """All keys of a file."""

    keys: tuple[Key, ...]

    def find(self, secret: bytes) -> Key | None:
        """The key that ``secret`` is; compared with every one, in a time that tells nothing of which."""
        digest, found = hashlib.sha256(secret).digest(), None
        for key in self.keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found


def parse_keys(data: bytes, default: Limit | None, burst_s: int) -> Keyring:
    """The keys in ``data``. Raises KeyFileError, which says what is wrong and what is allowed.

    default, burst_s  the quota of keys that name none, and the seconds that every quota can save up.
    """
    try:
        document = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        # The reason alone: it names a place, while the text around it may hold what should not be shown.
        raise KeyFileError("it is not TOML in UTF-8") from error
    tables = document.get("keys", {})
    if document.keys() - {"keys"} or not isinstance(tables, dict):
        raise KeyFileError("it has something beside tables [keys.NAME]; allowed: these alone")
    if len(tables) > MOST_KEYS:
        raise KeyFileError(f"{len(tables)} keys; allowed: at most {MOST_KEYS}")
    keys = tuple(_key(name, table, default, burst_s) for name, table in tables.items())
    if len({key.digest for key in keys}) < len(keys):
        raise KeyFileError("two keys have the same sha256; allowed: one name for each")
    return Keyring(keys)


def shown_key(headers: RawHeaders) -> bytes | None:
    """The key in Authorization (Bearer) or X-API-Key; None without one, or with two that differ."""
    shown = set(_shown(headers))
    secret = shown.pop() if len(shown) == 1 else None
    return secret if secret and len(secret) <= MOST_KEY_BYTES else None


def _shown(headers: RawHeaders) -> Iterable[bytes]:
    for name, value in headers:
        if name == b"x-api-key":
            yield value.strip(b" \t")
        elif name == b"authorization":
            scheme, _, secret = value.strip(b" \t").partition(b" ")
            if scheme.lower() == b"bearer":
                yield secret.strip(b" \t")


def _key(name: str, table: Any, default: Limit | None, burst_s: int) -> Key:
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"key {name!r:.70}: allowed: 1..64 of the characters A-Z a-z 0-9 . _ -")
    if not isinstance(table, dict) or table.keys() - _FIELDS:
        raise KeyFileError(f"key {name} has fields that nothing reads; allowed: {', '.join(sorted(_FIELDS))}")
    digest = table.get("sha256")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise KeyFileError(f"key {name}: sha256 is missing or malformed; allowed: 64 lower-case hexadecimal digits")
    role = table.get("role", "user")
    if role not in ("user", "admin"):
        raise KeyFileError(f"key {name}: role is {role!r:.64}; allowed: user, admin")
    most_urgent = table.get("most_urgent", 0)
    if type(most_urgent) is not int or not 0 <= most_urgent <= 7:
        raise KeyFileError(f"key {name}: most_urgent is {most_urgent!r:.64}; allowed: 0 (the most urgent) .. 7")
    limit = _limit(name, table, default, burst_s)
    return Key(name, bytes.fromhex(digest), role, limit, _defaults(name, table), most_urgent)


def _defaults(name: str, table: Mapping[str, Any]) -> Budget:
    fields = [(header, _text(name, field, table)) for field, header in _BUDGETS.items() if field in table]
    try:
        return parse_budget(fields)
    except BadRequestError as error:
        raise KeyFileError(f"key {name}: {error}") from error


def _limit(name: str, table: Mapping[str, Any], default: Limit | None, burst_s: int) -> Limit | None:
    if "quota" not in table:
        return default
    text = _text(name, "quota", table)
    if text == b"none":
        return None
    try:
        madds_per_s = parse_budget([(b"compute-budget", text)]).compute_madds
        return Limit(madds_per_s or 0, burst_s)
    except ValueError as error:
        raise KeyFileError(f"key {name}: {error}") from error
    except BadRequestError as error:
        raise KeyFileError(
            f"key {name}: quota is {text.decode()!r:.64}; allowed: none, or a decimal above 0 in MAdds per second "
            "with optional suffix k, M or G"
        ) from error


def _text(name: str, field: str, table: Mapping[str, Any]) -> bytes:
    value = table[field]
    if type(value) not in (str, int, float):
        raise KeyFileError(f"key {name}: {field} is no text and no number; allowed: the text of its header")
    return str(value).encode()
