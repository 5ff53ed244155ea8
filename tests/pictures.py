"""Pictures and files of them."""

import io
import struct

import numpy as np
from PIL import Image

from models.transform import InputSpec

HEIGHT, WIDTH = 20, 30


def smooth(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture without sharp edges, so that lossy formats come close to it; every corner differs."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, 255 - (x + y) * 127 / (width + height)], axis=2).astype(
        np.uint8
    )


def saved(picture: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def exif_of(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Little-endian EXIF of (tag, type, count, value padded to 4 bytes)."""
    directory = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)


TURNED = (0x0112, 3, 1, struct.pack("<H", 6))


def spec(height: int, width: int, shorter_side: int, resize_filter: str = "bicubic") -> InputSpec:
    return InputSpec(height, width, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), shorter_side, resize_filter)
