"""Encoded bytes -> network input, on a bounded pool of threads."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.transform import ImageError, ImageTooLargeError, InputSpec, load_pixels
from service.caching import image_digest
from service.errors import BadImageError, TooLargeError
from service.priority import yield_to_others

MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp", "image/bmp", "image/gif")

INLINE_DIGEST_BYTES = 256 * 1024
"""Below it, hashing on the event loop costs less than the way to a thread and back."""
INLINE_DECODE_BYTES, INLINE_DECODE_PIXELS = 8192, 64 * 64
"""Up to both, for a network whose input is no larger, images are decoded on the event loop: it takes a tenth of a
millisecond, less than the way to a thread and back."""
_BMP_HEADER_BYTES = (12, 40, 52, 56, 64, 108, 124)


class Decoded(NamedTuple):
    """Pixels [H, W, 3] of the network's size; seconds it waited for a thread, and seconds on it."""

    pixels_HWC: NDArray[np.uint8]
    waited_s: float
    decode_s: float


class ImageDecoder:
    """Decodes and resizes images off the event loop, unless they are tiny.

    threads     images that are decoded at once; the codecs release the interpreter lock.
    are_idle    they get what no other thread wants, as the workers do then: else decoding would stop these.
    max_pixels  per image, checked from its header before any pixel is decoded.

    What waits here is not bounded again: every caller holds a place in a model's bounded queue.
    """

    def __init__(self, threads: int, max_pixels: int, *, are_idle: bool = False) -> None:
        self._max_pixels = max_pixels
        begin = partial(yield_to_others, "idle") if are_idle else None
        self._pool = ThreadPoolExecutor(threads, "decode", begin)

    def decode_tiny(self, data: bytes, spec: InputSpec) -> Decoded | None:
        """The same as ``decode``, at once; None for an image or an input that is not tiny."""
        if len(data) > INLINE_DECODE_BYTES or spec.height * spec.width > INLINE_DECODE_PIXELS:
            return None
        try:
            return self._load(data, spec, min(self._max_pixels, INLINE_DECODE_PIXELS), time.perf_counter())
        except ImageTooLargeError:
            return None  # few bytes can be many pixels
        except ImageError as error:
            raise BadImageError(str(error)) from error

    async def decode(self, data: bytes, spec: InputSpec) -> Decoded:
        """The network input of one encoded image, and where its time went.

        Raises BadImageError for bytes that do not decode and TooLargeError for too many pixels. When
        the caller is cancelled, a decode that has not begun never does, and one that has is discarded.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._pool, self._load, data, spec, self._max_pixels, time.perf_counter()
            )
        except ImageTooLargeError as error:
            raise TooLargeError(str(error)) from error
        except ImageError as error:
            raise BadImageError(str(error)) from error

    async def digest(self, data: bytes) -> bytes:
        """``caching.image_digest``; of large images on a thread, because it takes milliseconds."""
        if len(data) <= INLINE_DIGEST_BYTES:
            return image_digest(data)
        return await asyncio.get_running_loop().run_in_executor(self._pool, image_digest, data)

    def close(self) -> None:
        """Take nothing new. Does not wait; what is queued still runs, so that no caller hangs."""
        self._pool.shutdown(wait=False)

    def _load(self, data: bytes, spec: InputSpec, max_pixels: int, submitted_s: float) -> Decoded:
        began_s = time.perf_counter()
        pixels_HWC = load_pixels(data, spec, max_pixels)
        return Decoded(pixels_HWC, began_s - submitted_s, time.perf_counter() - began_s)


def sniff_media_type(data: bytes) -> str | None:
    """The media type that the first bytes announce, or None when it is none of MEDIA_TYPES."""
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    # Two letters alone would take any text that begins with BM for a picture.
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADER_BYTES:
        return "image/bmp"
    return None
