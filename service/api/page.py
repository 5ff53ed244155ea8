"""The page at ``/`` to try the service from, and its files. They lie in the package and need no other host."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

from service.errors import NotFoundError

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).parents[1] / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True, slots=True)
class _File:
    """One file of the page, as it is sent."""

    body: bytes
    media_type: str
    etag: str


def _read(path: Path) -> _File:
    body = path.read_bytes()
    return _File(body, _MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


# Read once: they change with the package only, and no request waits for the disk.
_FILES = {path.name: _read(path) for path in sorted(STATIC.iterdir()) if path.suffix in _MEDIA_TYPES}
_INDEX = "index.html"
_ASSETS = tuple(name for name in _FILES if name != _INDEX)


@router.get("/")
async def index(request: Request) -> Response:
    """The page. What it refers to is relative, so it works under any prefix."""
    return _answer(request, _FILES[_INDEX])


@router.get("/assets/{name}")
async def asset(request: Request, name: str) -> Response:
    """Its style, scripts and icon."""
    if name not in _ASSETS:
        raise NotFoundError(f"no such file: {name:.100}; there: {', '.join(_ASSETS)}")
    return _answer(request, _FILES[name])


def _answer(request: Request, file: _File) -> Response:
    """The file, or 304 where the browser has it. Asked anew each time, so an update never mixes old and new files."""
    headers = {
        "etag": file.etag,
        "cache-control": "no-cache",
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    if _is_known(request.headers.getlist("if-none-match"), file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers=headers, media_type=file.media_type)


def _is_known(given: list[str], etag: str) -> bool:
    """Whether If-None-Match names the file; weakly, because a proxy that compresses marks its copies ``W/``."""
    tags = {tag.strip().removeprefix("W/") for field in given for tag in field.split(",")}
    return "*" in tags or etag in tags
