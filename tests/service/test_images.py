from __future__ import annotations

import asyncio
import io
import struct
import threading
import warnings
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray
from PIL import Image

from models.transform import ImageTooLargeError, InputSpec, decode, load_pixels
from service import images, logs
from service.errors import BadImageError, TooLargeError
from service.images import MEDIA_TYPES, ImageDecoder, sniff_media_type

SPEC = InputSpec(height=8, width=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), shorter_side=8)
FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "BMP": "image/bmp", "GIF": "image/gif"}


def encoded(kind: str, size: tuple[int, int] = (12, 10)) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, kind)
    return out.getvalue()


@pytest_asyncio.fixture
async def decoder() -> AsyncIterator[ImageDecoder]:
    decoder = ImageDecoder(threads=1, max_pixels=1000)
    yield decoder
    decoder.close()


class SlowCodec:
    """Stands in for the transform: holds its thread until it is released, and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.begun, self.released = threading.Event(), threading.Event()

    def __call__(self, data: bytes, spec: InputSpec, max_pixels: int | None) -> NDArray[np.uint8]:
        self.seen.append(data)
        self.begun.set()
        assert self.released.wait(10)
        return np.zeros((spec.height, spec.width, 3), np.uint8)

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, 10)


@pytest.fixture
def codec(monkeypatch: pytest.MonkeyPatch) -> SlowCodec:
    codec = SlowCodec()
    monkeypatch.setattr(images, "load_pixels", codec)
    return codec


async def cancel(task: asyncio.Task[object]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("kind", FORMATS)
async def test_every_format_becomes_what_training_saw(decoder: ImageDecoder, kind: str) -> None:
    pixels_HWC, waited_s, decode_s = await decoder.decode(encoded(kind), SPEC)
    assert pixels_HWC.dtype == np.uint8
    np.testing.assert_array_equal(pixels_HWC, load_pixels(encoded(kind), SPEC))
    assert 0 < decode_s < 60
    assert 0 <= waited_s < 60


@pytest.mark.parametrize("data", [b"", b"not an image", encoded("PNG")[:60], encoded("JPEG")[:-40]])
async def test_what_does_not_decode_is_a_bad_image_and_harms_nobody(decoder: ImageDecoder, data: bytes) -> None:
    with pytest.raises(BadImageError):
        await decoder.decode(data, SPEC)
    await decoder.decode(encoded("PNG"), SPEC)


async def test_a_bmp_that_only_python_could_decode_is_refused(decoder: ImageDecoder) -> None:
    header = struct.pack("<IIIHHIIIIII", 40, 900, 1, 1, 8, 1, 4, 0, 0, 0, 0)  # BI_RLE8
    data = b"BM" + struct.pack("<IHHI", 14 + len(header) + 1024 + 4, 0, 0, 14 + len(header) + 1024)
    data += header + bytes(1024) + b"\x01\x00\x00\x00"
    assert Image.open(io.BytesIO(data)).info["compression"] == 1
    with pytest.raises(BadImageError, match="run-length encoded BMP; allowed: BMP without compression"):
        await decoder.decode(data, SPEC)


def test_what_pillow_warns_of_is_neither_printed_nor_remembered(capfd: pytest.CaptureFixture[str]) -> None:
    header = struct.pack("<IIIIHHIIIIII", 54, 40, 10_001, 9_001, 1, 24, 0, 0, 0, 0, 0, 0)
    remembered = vars(Image).setdefault("__warningregistry__", {})
    with warnings.catch_warnings():
        warnings.resetwarnings()
        logs.configure("json", "info")
        remembered.clear()
        with pytest.raises(ImageTooLargeError):
            decode(b"BM" + bytes(8) + header, max_pixels=1000)
    assert not [key for key in remembered if key != "version"]
    assert capfd.readouterr().err == ""


async def test_too_many_pixels_are_refused_with_both_numbers(decoder: ImageDecoder) -> None:
    with pytest.raises(TooLargeError, match="1024 pixels; allowed: at most 1000 pixels"):
        await decoder.decode(encoded("PNG", (32, 32)), SPEC)


async def test_a_decode_that_waits_for_a_thread_never_runs_once_its_caller_has_gone(
    decoder: ImageDecoder, codec: SlowCodec
) -> None:
    first, second, third = (asyncio.ensure_future(decoder.decode(name, SPEC)) for name in (b"1", b"2", b"3"))
    await codec.has_begun()
    await cancel(second)
    codec.released.set()
    await first
    await third
    assert codec.seen == [b"1", b"3"]


async def test_a_caller_that_leaves_while_its_image_is_decoded_leaves_the_thread_to_the_next(
    decoder: ImageDecoder, codec: SlowCodec
) -> None:
    gone, next_one = (asyncio.ensure_future(decoder.decode(name, SPEC)) for name in (b"1", b"2"))
    await codec.has_begun()
    await cancel(gone)
    assert not next_one.done()
    codec.released.set()
    await next_one
    assert codec.seen == [b"1", b"2"]


async def test_what_waits_when_the_pool_closes_is_still_decoded(decoder: ImageDecoder, codec: SlowCodec) -> None:
    waiting = [asyncio.ensure_future(decoder.decode(name, SPEC)) for name in (b"1", b"2")]
    await codec.has_begun()
    decoder.close()
    codec.released.set()
    await asyncio.gather(*waiting)
    assert codec.seen == [b"1", b"2"]


@pytest.mark.parametrize(("kind", "media_type"), FORMATS.items())
def test_media_types_are_told_from_the_first_bytes(kind: str, media_type: str) -> None:
    assert sniff_media_type(encoded(kind)) == media_type
    assert media_type in MEDIA_TYPES


@pytest.mark.parametrize(
    "data", [b"", b"BM", b"BMW is not a bitmap file", b"RIFF1234WAVE", b"GIF88a", b"%PDF-1.7", b"\xff\xd8"]
)
def test_other_bytes_have_no_media_type(data: bytes) -> None:
    assert sniff_media_type(data) is None


@pytest.mark.parametrize("kind", FORMATS)
def test_a_tiny_image_is_decoded_at_once_and_equally(kind: str, decoder: ImageDecoder) -> None:
    decoded = decoder.decode_tiny(encoded(kind), SPEC)
    assert decoded is not None
    assert np.array_equal(decoded.pixels_HWC, load_pixels(encoded(kind), SPEC))


def test_what_is_not_tiny_is_left_to_the_threads() -> None:
    decoder = ImageDecoder(threads=1, max_pixels=10**6)
    large = InputSpec(height=65, width=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), shorter_side=65)
    assert decoder.decode_tiny(encoded("PNG"), large) is None  # the network's input
    assert decoder.decode_tiny(encoded("BMP", (64, 63)), SPEC) is None  # bytes
    many_pixels = io.BytesIO()
    Image.new("RGB", (65, 64)).save(many_pixels, "PNG")
    assert len(many_pixels.getvalue()) < 1000
    assert decoder.decode_tiny(many_pixels.getvalue(), SPEC) is None
    decoder.close()


def test_a_tiny_image_that_is_damaged_is_said_to_be(decoder: ImageDecoder) -> None:
    with pytest.raises(BadImageError):
        decoder.decode_tiny(encoded("PNG")[:100], SPEC)
