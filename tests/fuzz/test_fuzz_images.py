"""Broken images: a picture of the asked size or one of two errors, within bounded memory."""

import asyncio
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import EDGES, MIB, broken, examples, raised_or, resident_at_most
from PIL import Image
from support import TINY_INPUT

from models.transform import ImageError, ImageTooLargeError, load_pixels
from service.errors import BadImageError, TooLargeError
from service.images import ImageDecoder, sniff_media_type

LIMIT_PIXELS = 4096
LIMIT_BYTES = 80 * MIB
"""Of one image, as the kernel counts the process: codecs allocate beside Python. Pillow lets the texts of a PNG take
64 MiB by themselves."""
SIZE = (13, 9)


def seeds():
    """A valid image of every format and most of its variants."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8))
    rgba = Image.fromarray(rng.integers(0, 256, (*SIZE[::-1], 4), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, SIZE[::-1], dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    wanted = [
        (rgb, "JPEG", {"exif": exif}), (rgb, "JPEG", {"progressive": True}), (rgb.convert("L"), "JPEG", {}),
        (rgb.convert("CMYK"), "JPEG", {}), (rgb, "PNG", {"exif": exif}), (rgba, "PNG", {}), (deep, "PNG", {}),
        (rgb.convert("P"), "PNG", {"transparency": 3}), (rgb.convert("1"), "PNG", {}), (rgb, "WEBP", {"exif": exif}),
        (rgba, "WEBP", {"lossless": True}), (rgb, "WEBP", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        (rgb, "BMP", {}), (rgb.convert("P"), "BMP", {}), (rgb.convert("1"), "BMP", {}),
        (rgb, "GIF", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        (rgb.convert("P"), "GIF", {"transparency": 1}),
    ]  # fmt: skip
    for picture, kind, options in wanted:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        yield buffer.getvalue()


SEEDS = tuple(seeds())
PNGS = tuple(seed for seed in SEEDS if seed.startswith(b"\x89PNG"))


def chunks_of(png):
    at = 8
    while at < len(png):
        (size,) = struct.unpack_from(">I", png, at)
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        at += 12 + size


@st.composite
def sealed_pngs(draw):
    """PNGs whose chunks are broken, repeated or made up, and whose checksums are right all the same."""
    chunks = list(chunks_of(draw(st.sampled_from(PNGS))))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(chunks) - 1))
        kind, body = chunks[at]
        match draw(st.integers(0, 4)):
            case 0:
                chunks[at] = kind, draw(broken(body))
            case 1:
                chunks.insert(at, (kind, body))
            case 2:
                bomb = zlib.compress(bytes(draw(st.sampled_from((10**3, 10**6, 3 * 10**6)))))
                chunks.insert(1, (b"zTXt", b"k\0\0" + bomb))
            case 3:
                chunks.insert(1, (b"iCCP", b"k\0\0" + zlib.compress(bytes(draw(st.sampled_from((10**3, 2 * 10**6)))))))
            case _ if kind == b"IHDR":
                width, height = (draw(st.sampled_from(EDGES)) for _ in range(2))
                chunks[at] = kind, struct.pack(">II", width, height) + body[8:]
    sealed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return PNGS[0][:8] + b"".join(sealed)


def check(data):
    sniff_media_type(data)
    with warnings.catch_warnings(), resident_at_most(LIMIT_BYTES):
        warnings.simplefilter("ignore")  # in production they are not errors either
        pixels, message = raised_or(lambda: load_pixels(data, TINY_INPUT, LIMIT_PIXELS), ImageError, ImageTooLargeError)
    assert pixels is None or (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    assert len(message) < 1000


@pytest.mark.parametrize("seed", SEEDS)
def test_the_seeds_are_valid(seed):
    assert load_pixels(seed, TINY_INPUT, LIMIT_PIXELS).shape == (16, 16, 3)
    assert sniff_media_type(seed) is not None


@examples(30_000, 150)
@given(st.sampled_from(SEEDS).flatmap(lambda seed: broken(seed, SEEDS)))
def test_broken_images(data):
    check(data)


@examples(15_000, 60)
@given(sealed_pngs())
def test_broken_pngs_with_right_checksums(data):
    check(data)


@examples(3_000, 20)
@given(st.lists(st.sampled_from(SEEDS).flatmap(lambda seed: broken(seed, SEEDS)), min_size=1, max_size=4))
def test_the_decoder_raises_what_has_a_status(images):
    async def decoded():
        return await asyncio.gather(*(decoder.decode(data, TINY_INPUT) for data in images), return_exceptions=True)

    decoder = ImageDecoder(2, LIMIT_PIXELS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = asyncio.run(decoded())
    decoder.close()
    faults = [result for result in results if isinstance(result, BaseException)]
    assert all(isinstance(fault, BadImageError | TooLargeError) for fault in faults), faults
