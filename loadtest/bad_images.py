"""PURE: images that a service must refuse: bombs, truncated and corrupted ones."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Sequence

from loadtest.corpus import EncodedImage

BOMB_SIDE = 30_000
_PNG = b"\x89PNG\r\n\x1a\n"
_START_OF_FRAME = (0xC0, 0xC1, 0xC2)


def png_bomb(side: int = BOMB_SIDE) -> EncodedImage:
    """A whole PNG of ``side`` x ``side`` black pixels, one bit each: small here, enormous decoded."""
    row_bytes = 1 + (side + 7) // 8
    packer, rows = zlib.compressobj(9), bytes(row_bytes)
    pixels = b"".join(packer.compress(rows) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return EncodedImage("image/png", _PNG + b"".join(_chunk(kind, data) for kind, data in chunks))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def jpeg_bomb(jpeg: bytes, side: int = BOMB_SIDE) -> EncodedImage:
    """A JPEG whose header claims ``side`` x ``side`` pixels. Raises ValueError for what is no JPEG."""
    place = 2
    while place + 9 <= len(jpeg) and jpeg[place] == 0xFF:
        if jpeg[place + 1] in _START_OF_FRAME:
            return EncodedImage("image/jpeg", jpeg[: place + 5] + struct.pack(">HH", side, side) + jpeg[place + 9 :])
        place += 2 + struct.unpack(">H", jpeg[place + 2 : place + 4])[0]
    raise ValueError("no start of frame; allowed: a baseline or progressive JPEG")


def truncated(image: EncodedImage, share: float) -> EncodedImage:
    """Its first part."""
    return EncodedImage(image.media_type, image.data[: max(1, int(len(image.data) * share))])


def corrupted(image: EncodedImage, flips: int, seed: int) -> EncodedImage:
    """With so many bytes behind the first ones replaced at random; it may still decode, to something else."""
    rng, data = random.Random(seed), bytearray(image.data)
    for _ in range(flips):
        data[rng.randrange(min(20, len(data) - 1), len(data))] = rng.randrange(256)
    return EncodedImage(image.media_type, bytes(data))


def first_jpeg(images: Sequence[EncodedImage]) -> EncodedImage | None:
    """One of them that is a JPEG."""
    return next((image for image in images if image.media_type == "image/jpeg"), None)
