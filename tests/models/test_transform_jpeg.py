"""JPEGs of the network's own size: decoded without Pillow, to the pixels that Pillow gives."""

from itertools import product

import numpy as np
import pytest
from pictures import TURNED, exif_of, saved, smooth, spec
from PIL import Image
from support import encode

from models import transform
from models.transform import ImageError, ImageTooLargeError, InputSpec, decode, load_pixels, resize


def by_pillow(data: bytes, at: InputSpec) -> np.ndarray:
    return resize(decode(data), at)


@pytest.fixture
def no_pillow(monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("decoded by Pillow")

    monkeypatch.setattr(transform, "decode", fail)


JPEGS = [
    {"quality": quality, "subsampling": subsampling, "progressive": progressive, "restart_marker_blocks": restart}
    for quality, subsampling, progressive, restart in product((5, 75, 100), (0, 1, 2), (False, True), (0, 2))
]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_of_the_networks_size_is_the_same_without_pillow(mode, no_pillow):
    picture = Image.fromarray(smooth(32, 32)).convert(mode)
    for options in JPEGS:
        data = saved(picture, "JPEG", **options)
        assert np.array_equal(load_pixels(data, spec(32, 32, 32)), by_pillow(data, spec(32, 32, 32)))


@pytest.mark.parametrize(
    "data",
    [
        encode(smooth(32, 32), "PNG"),
        saved(Image.fromarray(smooth(32, 32)), "JPEG", exif=exif_of(TURNED)),
        saved(Image.fromarray(smooth(32, 32)).convert("CMYK"), "JPEG"),
        saved(Image.fromarray(smooth(32, 32)), "JPEG", keep_rgb=True),
        saved(Image.fromarray(smooth(64, 64)), "JPEG"),
    ],
    ids=["no JPEG", "turned", "CMYK", "RGB", "larger"],
)
def test_every_other_image_goes_through_pillow(data, monkeypatch):
    at = spec(32, 32, 32)
    assert np.array_equal(load_pixels(data, at), by_pillow(data, at))
    monkeypatch.setattr(transform, "decode", lambda *_: Image.new("RGB", (32, 32), "red"))
    assert (load_pixels(data, at) == (255, 0, 0)).all()


def test_an_input_that_is_cropped_from_its_resized_picture_goes_through_pillow():
    data, at = saved(Image.fromarray(smooth(32, 32)), "JPEG", quality=95), spec(32, 32, 40)
    assert np.array_equal(load_pixels(data, at), by_pillow(data, at))


def test_a_damaged_jpeg_of_the_networks_size_is_what_pillow_makes_of_it():
    rng, at = np.random.default_rng(0), spec(32, 32, 32)
    original = saved(Image.fromarray(smooth(32, 32)), "JPEG")
    mended = refused = 0
    for trial in range(300):
        data = np.frombuffer(original[: rng.integers(20, len(original))] if trial % 2 else original, np.uint8).copy()
        data[rng.integers(2, len(data), 3)] = rng.integers(0, 256, 3)
        try:
            expected = by_pillow(data.tobytes(), at)
        except ImageError:
            refused += 1
            with pytest.raises(ImageError):
                load_pixels(data.tobytes(), at)
        else:
            mended += 1
            assert np.array_equal(load_pixels(data.tobytes(), at), expected)
    assert min(mended, refused) > 20


def test_a_jpeg_of_the_networks_size_may_be_too_large():
    data = saved(Image.fromarray(smooth(32, 32)), "JPEG")
    with pytest.raises(ImageTooLargeError, match="1024 pixels; allowed: at most 1023"):
        load_pixels(data, spec(32, 32, 32), max_pixels=1023)


@pytest.mark.parametrize("factors", [0x11, 0x14, 0x41, 0x42, 0x44, 0x31, 0x00, 0x55])
@pytest.mark.parametrize("side", [32, 64])
def test_however_colours_are_sampled_it_is_what_pillow_makes_of_it(factors, side):
    """0x14 has no name in simplejpeg. With factors that the data does not have, the picture is damaged as well."""
    data, at = bytearray(saved(Image.fromarray(smooth(side, side)), "JPEG", subsampling=2)), spec(32, 32, 32)
    frame = data.index(b"\xff\xc0")
    data[frame + 11] = factors
    try:
        expected = by_pillow(bytes(data), at)
    except ImageError:
        with pytest.raises(ImageError):
            load_pixels(bytes(data), at)
    else:
        assert np.array_equal(load_pixels(bytes(data), at), expected)
