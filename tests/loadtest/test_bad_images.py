import io
import random

import pytest
from PIL import Image
from support import random_image

from loadtest.bad_images import corrupted, first_jpeg, jpeg_bomb, png_bomb, truncated
from loadtest.corpus import EncodedImage

JPEG = EncodedImage("image/jpeg", random_image(1, 64, "JPEG"))


def test_a_small_bomb_is_a_whole_image():
    bomb = png_bomb(side=100)
    with Image.open(io.BytesIO(bomb.data)) as image:
        image.load()
        assert image.size == (100, 100)
        assert image.getextrema() == (0, 0)


def test_a_large_bomb_is_small_on_the_wire():
    bomb = png_bomb(side=4000)
    assert len(bomb.data) < 4000 * 4000 / 8 / 500


def test_a_jpeg_claims_what_it_does_not_hold():
    with Image.open(io.BytesIO(jpeg_bomb(JPEG.data, 3000).data)) as image:
        assert image.size == (3000, 3000)
    with pytest.raises(ValueError, match="no start of frame"):
        jpeg_bomb(random_image(1))


def test_a_truncated_image_does_not_decode():
    for share in (0.5, 0.9):
        with (
            pytest.raises(OSError, match=r"(?i)truncated"),
            Image.open(io.BytesIO(truncated(JPEG, share).data)) as image,
        ):
            image.load()


def test_corruption_is_the_same_for_the_same_seed_and_spares_the_first_bytes():
    spoilt = corrupted(JPEG, 8, seed=3)
    assert spoilt == corrupted(JPEG, 8, seed=3)
    assert spoilt.data != JPEG.data
    assert len(spoilt.data) == len(JPEG.data)
    assert spoilt.data[:20] == JPEG.data[:20]
    assert corrupted(EncodedImage("image/png", random.Random(0).randbytes(5)), 8, 0).media_type == "image/png"


def test_the_first_jpeg_is_found():
    png = EncodedImage("image/png", b"")
    assert first_jpeg([png, JPEG]) is JPEG
    assert first_jpeg([png]) is None
