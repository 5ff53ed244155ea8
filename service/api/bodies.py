"""Request bodies -> image bytes: bounded in size and time, by media type."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import orjson
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from service.api.state import Lease
from service.errors import BadRequestError, RequestTimeoutError, TooLargeError, UnsupportedMediaTypeError
from service.images import MEDIA_TYPES, sniff_media_type

_ALLOWED = f"{', '.join(MEDIA_TYPES)}, multipart/form-data with a part 'image', application/json"


DISCARD_S = 2.0
DISCARD_TIMES = 4
"""Of a body that is too large, this many times the limit is read and thrown away, so that the client
can finish writing and read its 413. Beyond it the connection is closed."""


PIECE_BYTES = 65_536
"""So much of a multipart body is parsed in one go, then others have the event loop."""


ARRIVED = "slicewise.arrived_s"
"""In a request's scope: when its last byte was there, where the protocol has seen that."""


_NO_LIMIT = contextlib.nullcontext()


class _InMemoryParser(MultiPartParser):
    """The body is bounded before it is parsed, so that nothing needs to spill to disk."""

    spool_max_size = 2**40


def media_type(request: Request) -> str:
    """The Content-Type without parameters, lower case; empty when absent."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_body(request: Request, lease: Lease, limit_bytes: int, timeout_s: float) -> bytes:
    """The whole body.

    Raises TooLargeError above the limit, RequestTimeoutError when it is too slow, QueueFullError when
    all bodies together hold too much.
    """
    announced = request.headers.get("content-length", "")
    too_large = announced.isascii() and announced.isdigit() and int(announced) > limit_bytes
    stream = request.stream()
    chunks: list[bytes] = []
    is_here = ARRIVED in request.scope  # nothing will be waited for
    try:
        async with _NO_LIMIT if is_here else asyncio.timeout(timeout_s):
            async for chunk in stream:
                if too_large or lease.body_bytes + len(chunk) > limit_bytes:
                    too_large = True
                    break
                lease.grow(len(chunk))
                chunks.append(chunk)
    except TimeoutError as error:
        raise RequestTimeoutError(
            f"{lease.body_bytes} bytes arrived within {timeout_s:g} s and the body was not complete; "
            f"allowed: {timeout_s:g} s"
        ) from error
    if too_large:
        await _discard(stream, limit_bytes)
        given = f"{announced} bytes" if announced else f"over {limit_bytes} bytes"
        raise TooLargeError(f"body is {given}; allowed: at most {limit_bytes} bytes")
    return b"".join(chunks)


def arrived_s(request: Request) -> float:
    """Monotonic, when the last byte of a body that has been read was there."""
    known: float | None = request.scope.get(ARRIVED)
    return time.monotonic() if known is None else known


async def _discard(stream: AsyncIterator[bytes], most_bytes: int) -> None:
    """Read on for a moment: many clients write their whole body before they look for an answer."""
    seen = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            async for chunk in stream:
                seen += len(chunk)
                if seen > DISCARD_TIMES * most_bytes:
                    return


async def one_image(request: Request, body: bytes) -> bytes:
    """The image of a one-image request, still encoded."""
    kind = media_type(request)
    if kind == "multipart/form-data":
        images = await image_parts(request, body, limit_images=1)
        if len(images) != 1:
            raise BadRequestError(f"multipart body has {len(images)} parts 'image'; allowed: exactly 1")
        return images[0]
    if kind == "application/json":
        return _from_json(body)
    if kind in MEDIA_TYPES:
        return body
    if kind in ("", "application/octet-stream") and sniff_media_type(body) is not None:
        return body
    raise UnsupportedMediaTypeError(f"Content-Type is {kind or 'absent'!r:.100}; allowed: {_ALLOWED}")


async def image_parts(request: Request, body: bytes, limit_images: int) -> list[bytes]:
    """The file parts named ``image``, in order. Raises TooLargeError above ``limit_images``."""
    if media_type(request) != "multipart/form-data":
        raise UnsupportedMediaTypeError(
            f"Content-Type is {media_type(request) or 'absent'!r:.100}; allowed: multipart/form-data"
        )

    async def stream() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), PIECE_BYTES):
            yield body[start : start + PIECE_BYTES]
            await asyncio.sleep(0)

    # One more than allowed is let through, so that the excess is answered by us, with the number allowed.
    parser = _InMemoryParser(request.headers, stream(), max_files=limit_images + 1, max_fields=16)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise TooLargeError(f"more than {limit_images} images; allowed: at most {limit_images} images") from error
        raise BadRequestError(f"malformed multipart body: {error.message}") from error
    except (KeyError, ValueError) as error:  # no boundary in the header; broken encodings in part headers
        raise BadRequestError("malformed multipart body: no usable boundary or part header") from error
    try:
        parts = form.getlist("image")
        if len(parts) > limit_images:
            raise TooLargeError(f"{len(parts)} images; allowed: at most {limit_images} images")
        if not all(isinstance(part, UploadFile) for part in parts):
            raise BadRequestError("part 'image' is a plain field; allowed: a file part with a filename")
        return [await part.read() for part in parts if isinstance(part, UploadFile)]
    finally:
        await form.close()


def _from_json(body: bytes) -> bytes:
    try:
        data: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"malformed JSON: {error}") from error
    if not isinstance(data, dict) or set(data) != {"image"} or not isinstance(data["image"], str):
        raise BadRequestError('JSON body must be {"image": "<base64>"} and nothing else')
    try:
        return base64.b64decode(data["image"], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequestError(f"field image is not base64: {error}") from error
