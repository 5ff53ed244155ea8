"""Encoded image -> network input, as fast as OpenCV and NumPy do it. Shared by the peers.

Shapes: H height, W width, C = 3 channels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import cv2
import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

cv2.setNumThreads(1)  # as many images as cores are in work already


@dataclass(frozen=True, slots=True)
class Transform:
    """What the network wants to see.

    height, width  pixels of the input.
    shorter_side   pixels of the shorter side before the centre crop.
    scale, shift   per RGB channel: input = pixel * scale - shift, with pixels of 0..255.
    """

    height: int
    width: int
    shorter_side: int
    scale: tuple[np.float32, np.float32, np.float32]
    shift: tuple[np.float32, np.float32, np.float32]

    @classmethod
    def from_manifest(cls, path: Path) -> Self:
        """Read the ``input`` of a checkpoint's manifest."""
        spec = json.loads(path.read_bytes())["input"]
        (mean_r, mean_g, mean_b), (std_r, std_g, std_b) = spec["mean"], spec["std"]
        scale = (np.float32(1 / (255 * std_r)), np.float32(1 / (255 * std_g)), np.float32(1 / (255 * std_b)))
        shift = (np.float32(mean_r / std_r), np.float32(mean_g / std_g), np.float32(mean_b / std_b))
        return cls(spec["height"], spec["width"], spec["resize"]["shorter_side"], scale, shift)


def load_into(data: bytes, transform: Transform, out_CHW: F32) -> None:
    """Decode, crop, resize and normalise into ``out_CHW``. Raises ValueError for bytes that are no image."""
    normalise_into(crop_and_resize(decode(data), transform), transform, out_CHW)


def decode(data: bytes) -> U8:
    """[H, W, BGR], upright. Raises ValueError for bytes that are no image."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if pixels is None:
        raise ValueError(f"{len(data)} bytes are not a readable image")
    return np.asarray(pixels, np.uint8)


def crop_and_resize(pixels_HWC: U8, transform: Transform) -> U8:
    """The centre of the picture, as if its shorter side had been resized first; [H, W, C] of the network.

    Cropping first saves resizing what is thrown away.
    """
    height, width = pixels_HWC.shape[:2]
    scale = transform.shorter_side / min(height, width)
    crop_height, crop_width = (
        min(height, round(transform.height / scale)),
        min(width, round(transform.width / scale)),
    )
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    crop_HWC = pixels_HWC[top : top + crop_height, left : left + crop_width]
    if (crop_height, crop_width) == (transform.height, transform.width):
        return crop_HWC
    # INTER_AREA averages when it shrinks; it does not interpolate when it enlarges.
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized_HWC = cv2.resize(crop_HWC, (transform.width, transform.height), interpolation=method)
    return np.asarray(resized_HWC, np.uint8)


def normalise_into(pixels_HWC: U8, transform: Transform, out_CHW: F32) -> None:
    """BGR bytes -> normalised RGB planes, channel by channel, without an array in between."""
    for channel in range(3):
        plane_HW = out_CHW[channel]
        np.multiply(pixels_HWC[..., 2 - channel], transform.scale[channel], out=plane_HW)
        plane_HW -= transform.shift[channel]
