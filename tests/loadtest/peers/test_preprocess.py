import numpy as np
import pytest
from support import random_image

from models.transform import load_image

pytest.importorskip("cv2")

from loadtest.peers.preprocess import Transform, crop_and_resize, load_into


def loaded(data: bytes, transform: Transform) -> np.ndarray:
    out_CHW = np.full((3, transform.height, transform.width), np.nan, np.float32)
    load_into(data, transform, out_CHW)
    return out_CHW


def test_at_the_size_of_the_network_it_is_the_transform_of_training(manifest):
    path, spec = manifest("same")
    data = random_image(1, size=16)
    np.testing.assert_allclose(loaded(data, Transform.from_manifest(path)), load_image(data, spec), atol=1e-5)


@pytest.mark.parametrize("size", [56, 84, 200])
def test_a_photograph_comes_out_close_to_the_transform_of_training(manifest, size):
    path, spec = manifest("cropped")
    data = random_image(2, size=size)
    difference = np.abs(loaded(data, Transform.from_manifest(path)) - load_image(data, spec))
    assert difference.mean() < 0.05
    assert difference.max() < 0.6


@pytest.mark.parametrize("shape", [(10, 40), (40, 10), (24, 20), (300, 21), (23, 19), (1, 1)])
def test_any_picture_comes_out_at_the_size_of_the_network(manifest, shape):
    path, _ = manifest("cropped")
    pixels_HWC = np.zeros((*shape, 3), np.uint8)
    assert crop_and_resize(pixels_HWC, Transform.from_manifest(path)).shape == (24, 20, 3)


def test_the_middle_is_kept(manifest):
    path, _ = manifest("cropped")
    pixels_HWC = np.zeros((28, 280, 3), np.uint8)
    pixels_HWC[:, 130:150] = 255
    assert crop_and_resize(pixels_HWC, Transform.from_manifest(path)).min() == 255


@pytest.mark.parametrize("data", [b"", b"no image", random_image(0)[:20]])
def test_bytes_that_are_no_image_are_refused(manifest, data):
    path, _ = manifest()
    with pytest.raises(ValueError, match=f"{len(data)} bytes are not a readable image"):
        loaded(data, Transform.from_manifest(path))
