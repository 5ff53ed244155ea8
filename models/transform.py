"""Image bytes -> network input. The one transform of training, evaluation and serving.

Channel statistics, size and resize rule travel in the manifest, so that a served image is treated
exactly as a test image was.

Shapes: H height, W width, C = 3 channels, N images.
"""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from simplejpeg import decode_jpeg, decode_jpeg_header

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

_RUN_LENGTHS = (1, 2)
"""BI_RLE8 and BI_RLE4: Pillow decodes them in Python, pixel by pixel, and holds the interpreter lock all the while."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "box": Image.Resampling.BOX}

SPARE = 1.5
"""How much larger than asked a JPEG is decoded at least, so that the filter still has something to weigh."""
_JPEG, _APP1 = b"\xff\xd8\xff", b"\xff\xe1"
"""First bytes of a JPEG, and the marker of Exif and XMP, which may say how to turn it."""
_TILE_PIXELS = 2**18  # converted at once: a few MB, nothing beside a large picture


class ImageError(ValueError):
    """The bytes are not an image of a supported format, or are damaged."""


class ImageTooLargeError(ValueError):
    """The image announces more pixels than allowed; nothing was decoded."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What a checkpoint wants to see.

    height, width  pixels of the network input.
    mean, std      per RGB channel, on the 0..1 scale.
    shorter_side   pixels of the shorter side after resizing, before the centre crop.
    filter         one of ``FILTERS``.
    """

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    shorter_side: int
    filter: str = "bicubic"

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1 or self.shorter_side < max(self.height, self.width):
            raise ValueError(f"shorter_side {self.shorter_side} must cover the {self.height}x{self.width} input")
        if self.filter not in FILTERS:
            raise ValueError(f"resize filter {self.filter!r}; allowed: {', '.join(FILTERS)}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise ValueError(f"mean {self.mean} and std {self.std} need three values each, std above 0")

    def to_json(self) -> dict[str, Any]:
        return {
            "height": self.height,
            "width": self.width,
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": {"shorter_side": self.shorter_side, "filter": self.filter, "crop": "center"},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Parse ``to_json`` data; ValueError says what is missing or wrong."""
        try:
            resize = data["resize"]
            if resize["crop"] != "center":
                raise ValueError(f"crop {resize['crop']!r}; allowed: center")
            mean_r, mean_g, mean_b = map(float, data["mean"])
            std_r, std_g, std_b = map(float, data["std"])
            return cls(
                int(data["height"]), int(data["width"]), (mean_r, mean_g, mean_b), (std_r, std_g, std_b),
                int(resize["shorter_side"]), str(resize["filter"]),
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise ValueError(f"input transform: {error!r}") from error


def decode(data: bytes, max_pixels: int | None = None, shorter_side: int | None = None) -> Image.Image:
    """Decode to an RGB picture, upright (EXIF orientation applied); the first frame of an animation.

    shorter_side  pixels that the caller will shrink it to. A JPEG of twice that and more is then decoded at
                  1/2, 1/4 or 1/8 of its size, at least ``SPARE`` times what is asked: a third of the time
                  at 4 times the size, and the resized pixels differ by about 1 of 255 in the mean.

    Alpha is composed over white, 16-bit grey is scaled to 8 bit, CMYK is converted. The size is
    checked from the header, before any pixel is decoded.

    Raises ImageError for bytes that are no supported image or are truncated, ImageTooLargeError
    above ``max_pixels``.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"image has too many pixels: {error}") from error
    except Exception as error:  # decoders meet hostile bytes and raise almost anything
        raise ImageError(f"{len(data)} bytes are not a readable image; allowed: {', '.join(FORMATS)}") from error
    width, height = picture.size
    if max_pixels is not None and width * height > max_pixels:
        raise ImageTooLargeError(
            f"image is {width}x{height} = {width * height} pixels; allowed: at most {max_pixels} pixels"
        )
    if picture.format == "BMP" and picture.info.get("compression") in _RUN_LENGTHS:
        raise ImageError("a run-length encoded BMP; allowed: BMP without compression")
    if shorter_side is not None and picture.format == "JPEG":
        enough = math.ceil(SPARE * shorter_side)
        picture.draft(None, (enough, enough))
    try:
        return upright_rgb(picture)
    except Exception as error:  # as above: a broken image must never look like our own fault
        raise ImageError(f"{picture.format} image of {width}x{height} pixels is damaged: {error}") from error


def upright_rgb(picture: Image.Image) -> Image.Image:
    """As ``decode`` for a picture that is already open, which it turns in place.

    An upright RGB picture is returned as it is. Any other is converted tile by tile, so that the most
    that is held is the picture as it was and as it becomes, 4 bytes a pixel each.
    """
    picture.load()
    with contextlib.suppress(Exception):  # broken metadata around sound pixels is as good as none
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    width, height = picture.size
    rgb = Image.new("RGB", (width, height))
    columns = min(width, _TILE_PIXELS)
    rows = _TILE_PIXELS // columns
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            tile = picture.crop((left, top, min(width, left + columns), min(height, top + rows)))
            rgb.paste(_rgb(tile), (left, top))
    return rgb


def _rgb(picture: Image.Image) -> Image.Image:
    """Converted as ``decode`` says; the intermediate copies take up to 16 bytes a pixel."""
    if picture.mode.startswith("I"):  # 16-bit grey: keep the high byte
        high = np.asarray(picture).clip(0, 65535) >> 8
        return Image.fromarray(high.astype(np.uint8)).convert("RGB")
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")


def resize(picture: Image.Image, spec: InputSpec) -> U8:
    """Shorter side to ``spec.shorter_side``, centre crop; [H, W, 3] uint8. Nothing changes at equal size."""
    width, height = picture.size
    scale = spec.shorter_side / min(width, height)
    target = (max(spec.width, round(width * scale)), max(spec.height, round(height * scale)))
    left, top = (target[0] - spec.width) / 2 / scale, (target[1] - spec.height) / 2 / scale
    box = (left, top, min(width, left + spec.width / scale), min(height, top + spec.height / scale))
    # Resizing only the crop's box costs less than resizing all of a long picture and cropping it.
    if (width, height) != (spec.width, spec.height) or scale != 1:
        picture = picture.resize((spec.width, spec.height), FILTERS[spec.filter], box=box)
    return np.array(picture, dtype=np.uint8)


def normalise(pixels: U8, spec: InputSpec) -> F32:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W]: (x / 255 - mean) / std."""
    scale = 1.0 / (255.0 * np.asarray(spec.std, np.float32))
    shift = np.asarray(spec.mean, np.float32) / np.asarray(spec.std, np.float32)
    out = np.empty((*pixels.shape[:-3], 3, *pixels.shape[-3:-1]), np.float32)
    for channel in range(3):
        np.multiply(pixels[..., channel], scale[channel], out=out[..., channel, :, :])
        out[..., channel, :, :] -= shift[channel]
    return out


def load_pixels(data: bytes, spec: InputSpec, max_pixels: int | None = None) -> U8:
    """Bytes -> uint8 [H, W, 3], the network's input before ``normalise``; errors as ``decode``."""
    if max_pixels is None or spec.height * spec.width <= max_pixels:
        pixels = _as_it_is(data, spec)
        if pixels is not None:
            return pixels
    return resize(decode(data, max_pixels, spec.shorter_side), spec)


def _as_it_is(data: bytes, spec: InputSpec) -> U8 | None:
    """A sound JPEG of the network's own size, to be neither turned nor resized; None for whatever else it is.

    The pixels are those that ``decode`` gives, from the same codec without the Python around it, which for a small
    picture is most of the work (docs/adr/0017).
    """
    if not data.startswith(_JPEG) or min(spec.height, spec.width) != spec.shorter_side:
        return None
    try:
        height, width, colours, _ = decode_jpeg_header(data)
        if (height, width) != (spec.height, spec.width) or colours not in ("YCbCr", "Gray") or _APP1 in data:
            return None
        pixels: U8 = decode_jpeg(data)
    except (ValueError, KeyError):  # damaged, which Pillow mends or puts into words; subsampling without a name
        return None
    return pixels


def load_image(data: bytes, spec: InputSpec, max_pixels: int | None = None) -> F32:
    """Bytes -> normalised float32 [3, H, W], ready for the trunk."""
    return normalise(load_pixels(data, spec, max_pixels), spec)
