"""The knobs on the wire: request headers -> Budget. PURE.

Numbers are exact from the text to the Budget. Every value is bounded in length and matched against
its whole grammar before it is converted, so a hostile value costs no more than an honest one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeVar

from service.errors import BadRequestError
from service.request import Budget, Forced

T = TypeVar("T")
RawHeaders = Iterable[tuple[bytes, bytes]]
"""Header fields as ASGI hands them over: lower-case names, values as they arrived."""

MAX_VALUE_CHARS = 64
"""Longer values of these headers are malformed: nothing that anybody means needs more digits."""
MAX_LATENCY_S = 3600
"""A longer Latency-Budget means the same: nothing waits that long here."""
DEFAULT_URGENCY = 3

GRAMMARS = {
    "Compute-Budget": (
        "a decimal above 0 in MAdds with optional suffix k, M or G, or a percentage in (0%, 100%] of the widest slice"
    ),
    "Latency-Budget": "a decimal above 0 with suffix ms or s, or without one in milliseconds",
    "Accuracy-Floor": "a decimal in (0, 1], or a percentage in (0%, 100%]",
    "Slice-Width": "a slice index, narrowest, widest or auto",
    "Priority": "an RFC 9218 dictionary with u=0 (most urgent) .. u=7, such as u=3",
    "X-Request-ID": "1..128 of the characters A-Z a-z 0-9 . _ -",
}
_NAMES = {name.lower().encode(): name for name in GRAMMARS}

_QUANTITY = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>[a-z]*|%)", re.IGNORECASE | re.ASCII)
_INTEGER = re.compile(r"-?[0-9]+", re.ASCII)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")

_MADDS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_NAMED_WIDTHS: dict[str, Forced | None] = {"narrowest": "narrowest", "widest": "widest", "auto": None}
_SECONDS = {"": Fraction(1, 1000), "ms": Fraction(1, 1000), "s": Fraction(1)}

# Structured fields for HTTP, RFC 9651 section 3: just enough to step over members that are not ours.
_KEY = r"[a-z*][a-z0-9_.*-]*"
_BARE = (
    r"(?:@?-?[0-9]+(?:\.[0-9]+)?"
    r'|%?"(?:[ !#-\[\]-~]|\\["\\])*"'
    r"|[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*"
    r"|:[A-Za-z0-9+/=]*:"
    r"|\?[01])"
)
_PARAMETERS = rf"(?:; *{_KEY}(?:={_BARE})?)*"
_ITEM = rf"{_BARE}{_PARAMETERS}"
_INNER_LIST = rf"\( *(?:{_ITEM}(?: +{_ITEM})* *)?\)"
_MEMBER = re.compile(rf"(?P<key>{_KEY})(?:=(?P<value>{_BARE}|{_INNER_LIST}))?{_PARAMETERS}", re.ASCII)
_COMMA = re.compile(r"[ \t]*,[ \t]*")

# The same grammars for whoever generates requests from /openapi.json; tests hold both to each other.
_ABOVE_0 = r"(0*[1-9][0-9]*(\.[0-9]+)?|0+\.0*[1-9][0-9]*)"
_PERCENTAGE = r"(0*100(\.0+)?|0*[1-9][0-9]?(\.[0-9]+)?|0+\.0*[1-9][0-9]*)%"
_OTHER_KEY = r"(?:[a-tv-z*][a-z0-9_.*-]*|u[a-z0-9_.*-]+)"
_ANY_MEMBER = rf"(?:u=(?:-?0+|0*[1-7])|{_OTHER_KEY}(?:=(?:{_BARE}|{_INNER_LIST}))?){_PARAMETERS}"
PATTERNS = {
    "Compute-Budget": rf"^({_ABOVE_0}[kKmMgG]?|{_PERCENTAGE})$",
    "Latency-Budget": rf"^{_ABOVE_0}([mM]?[sS])?$",
    "Accuracy-Floor": rf"^(0*1(\.0+)?|0+\.0*[1-9][0-9]*|{_PERCENTAGE})$",
    "Slice-Width": r"^(narrowest|widest|auto|[0-9]+)$",
    "Priority": rf"^(?:{_ANY_MEMBER}(?:[ \t]*,[ \t]*{_ANY_MEMBER})*)?$",
}
"""Regular expressions of JSON Schema for the values that ``parse_budget`` takes, beside their length."""


def header_parameters() -> list[dict[str, Any]]:
    """OpenAPI declarations of the request headers that every classification takes."""
    described = {**GRAMMARS, "Cache-Control": "no-cache: compute the answer, whatever the answer cache holds"}
    bounded = {name: {"pattern": pattern, "maxLength": MAX_VALUE_CHARS} for name, pattern in PATTERNS.items()}
    return [
        {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": "string"} | more}
        for name, text in described.items()
        for more in (bounded.get(name, {}),)
    ]


def parse_budget(headers: RawHeaders) -> Budget:
    """What the client grants, from Compute-Budget, Latency-Budget, Accuracy-Floor, Slice-Width and Priority.

    Other headers are ignored. A compute budget is floored to whole MAdds, possibly to 0. Raises
    BadRequestError, naming the header, its value and its grammar, when one is malformed or repeated.
    """
    texts = _own(headers)
    madds, share = _parse(texts, "Compute-Budget", _compute) or (None, None)
    forced = _parse(texts, "Slice-Width", _forced)
    urgency = _parse(texts, "Priority", _urgency)
    return Budget(
        compute_madds=madds,
        compute_share=share,
        latency_s=_parse(texts, "Latency-Budget", _latency_s),
        accuracy_floor=_parse(texts, "Accuracy-Floor", _floor),
        forced=forced,
        urgency=DEFAULT_URGENCY if urgency is None else urgency,
    )


def request_id(headers: RawHeaders) -> str | None:
    """X-Request-ID when it is given once and matches ``[A-Za-z0-9._-]{1,128}``; else None, and the caller makes one."""
    given = [value for name, value in headers if name == b"x-request-id"]
    return given[0].decode() if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) else None


def _own(headers: RawHeaders) -> dict[str, bytes]:
    """Our headers by name, without the whitespace around their values."""
    texts: dict[str, bytes] = {}
    for raw_name, value in headers:
        name = _NAMES.get(raw_name)
        if name is None:
            continue
        if name in texts:
            raise BadRequestError(f"{name} is given more than once; allowed: once, {GRAMMARS[name]}")
        texts[name] = value.strip(b" \t")
    return texts


def _parse(texts: Mapping[str, bytes], name: str, read: Callable[[str], T]) -> T | None:
    """One header through its reader, which raises ValueError for what the grammar does not allow."""
    raw = texts.get(name)
    if raw is None:
        return None
    try:
        if len(raw) > MAX_VALUE_CHARS:
            raise ValueError("too long")
        return read(raw.decode("ascii"))
    except ValueError as error:
        # Cut before it is escaped: an escaped megabyte is a larger one.
        given = f"{raw[:MAX_VALUE_CHARS].decode('latin-1')!r:.{MAX_VALUE_CHARS}}"
        raise BadRequestError(
            f"{name} is {given}; allowed: {GRAMMARS[name]}, in at most {MAX_VALUE_CHARS} characters"
        ) from error


def _quantity(text: str, units: Container[str]) -> tuple[Fraction, str]:
    """A decimal above 0 and its unit in lower case."""
    match = _QUANTITY.fullmatch(text)
    if match is None or match["unit"].lower() not in units:
        raise ValueError("no quantity")
    number = Fraction(match["number"])
    if number <= 0:
        raise ValueError("not above 0")
    return number, match["unit"].lower()


def _ratio(number: Fraction) -> Fraction:
    if number > 1:
        raise ValueError("above 1")
    return number


@lru_cache(maxsize=1024)
def _compute(text: str) -> tuple[int | None, Fraction | None]:
    """MAdds or share of the widest slice, of which the other is None."""
    number, unit = _quantity(text, (*_MADDS, "%"))
    if unit == "%":
        return None, _ratio(number / 100)
    return math.floor(number * _MADDS[unit]), None


@lru_cache(maxsize=1024)  # exact arithmetic is slow, and clients send the same few values
def _latency_s(text: str) -> float:
    number, unit = _quantity(text, _SECONDS)
    return float(min(number * _SECONDS[unit], Fraction(MAX_LATENCY_S)))


@lru_cache(maxsize=1024)
def _floor(text: str) -> Fraction:
    number, unit = _quantity(text, ("", "%"))
    return _ratio(number / 100 if unit else number)


def _forced(text: str) -> Forced | None:
    if text in _NAMED_WIDTHS:
        return _NAMED_WIDTHS[text]
    if not text.isdigit():
        raise ValueError("no index")
    return int(text)


def _urgency(text: str) -> int:
    """The member ``u`` of the dictionary, of which the last counts; members that are not ours are ignored."""
    urgency, position = DEFAULT_URGENCY, 0
    while position < len(text):
        member = _MEMBER.match(text, position)
        if member is None:
            raise ValueError("no member")
        if member["key"] == "u":
            urgency = _urgency_value(member["value"])
        position = member.end()
        comma = _COMMA.match(text, position)
        if comma is None:
            break
        position = comma.end()
        if position == len(text):
            raise ValueError("trailing comma")
    if position < len(text):
        raise ValueError("not a dictionary")
    return urgency


def _urgency_value(text: str | None) -> int:
    if text is None or not _INTEGER.fullmatch(text) or not 0 <= int(text) <= 7:
        raise ValueError("not an urgency")
    return int(text)
