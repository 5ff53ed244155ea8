import contextlib
import io
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import HEIGHT, TURNED, WIDTH, exif_of, saved, smooth, spec
from PIL import Image
from support import encode

from models.transform import (
    FORMATS,
    ImageError,
    ImageTooLargeError,
    InputSpec,
    decode,
    load_image,
    load_pixels,
    normalise,
    resize,
    upright_rgb,
)


def pixels(data: bytes) -> np.ndarray:
    picture = decode(data)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of raw, unfiltered rows: for the forms that Pillow reads but does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def assert_near(actual: np.ndarray, expected: np.ndarray) -> None:
    """Alike but for the losses of a lossy format; a picture turned or mirrored is 40 and more away."""
    assert actual.shape == expected.shape
    assert np.abs(actual.astype(int) - expected).mean() <= 8


@pytest.mark.parametrize("image_format", ["PNG", "BMP"])
def test_lossless_formats_decode_to_their_pixels(image_format):
    assert np.array_equal(pixels(encode(smooth(), image_format)), smooth())


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP"])
def test_lossy_formats_decode_close_to_their_pixels(image_format):
    assert_near(pixels(encode(smooth(), image_format)), smooth())


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    for image_format in ("GIF", "WEBP"):
        data = saved(frames[0], image_format, save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(pixels(data), np.full((6, 8, 3), (255, 0, 0)), atol=3)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation(image_format, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(smooth()), image_format, exif=exif)
    assert_near(pixels(data), upright(smooth()))


def test_broken_metadata_beside_a_sound_orientation():
    unit_as_text = (0x0128, 2, 2, b"x\0")  # an integer by the standard; Pillow cannot write it back
    data = saved(Image.fromarray(smooth()), "JPEG", exif=exif_of(TURNED, unit_as_text))
    assert_near(pixels(data), np.rot90(smooth(), -1))


@pytest.mark.parametrize(
    "exif", [exif_of(TURNED)[:14], exif_of((0x0112, 2, 2, b"6\0")), exif_of(TURNED)[:10] + b"\xff" * 40]
)
def test_metadata_without_a_readable_orientation_is_as_good_as_none(exif):
    data = saved(Image.fromarray(smooth()), "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow says that the metadata is corrupt
        assert_near(pixels(data), smooth())


def test_greyscale():
    grey = smooth()[:, :, 0]
    assert np.array_equal(pixels(encode(grey)), np.repeat(grey[:, :, None], 3, axis=2))


def test_black_and_white():
    bits = smooth()[:, :, 0] > 128
    assert np.array_equal(pixels(encode(bits)), np.repeat(bits[:, :, None], 3, axis=2) * np.uint8(255))


def test_palette():
    picture = Image.new("P", (3, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    picture.putdata([2, 0, 1])
    assert pixels(saved(picture, "PNG")).tolist() == [[[10, 20, 30], [255, 0, 0], [0, 255, 0]]]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])])
def test_palette_with_transparency_lies_on_white(transparency):
    picture = Image.new("P", (3, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 0])
    picture.putdata([0, 1, 2])
    first, second, third = pixels(saved(picture, "PNG", transparency=transparency))[0].tolist()
    assert (first, second) == ([255, 0, 0], [255, 255, 255])
    assert third == ([0, 0, 0] if transparency == 1 else [127, 127, 127])


def test_a_gifs_transparent_colour_lies_on_white():
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 0])
    picture.putdata([0, 1])
    assert pixels(saved(picture, "GIF", transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_alpha_lies_on_white():
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], dtype=np.uint8)
    blended = [round(0.2 * c + 0.8 * 255) for c in (200, 100, 0)]
    assert pixels(encode(rgba)).tolist() == [[[200, 100, 0], [255, 255, 255], blended]]
    picture = Image.new("LA", (2, 1), (80, 255))
    picture.putpixel((1, 0), (80, 0))
    assert pixels(saved(picture, "PNG")).tolist() == [[[80] * 3, [255] * 3]]


def test_a_transparent_colour_without_alpha_channel_lies_on_white():
    data = saved(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), "PNG", transparency=(1, 2, 3))
    assert pixels(data).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_16_bit_grey_keeps_the_high_byte():
    values = np.array([[0, 255, 256, 0x7FFF, 0x8000, 0xFFFF]], dtype=np.uint16)
    expected = [0, 0, 1, 0x7F, 0x80, 0xFF]
    assert pixels(encode(values))[0, :, 0].tolist() == expected
    assert pixels(png(6, 1, 16, 0, b"\0" + values.astype(">u2").tobytes()))[0, :, 2].tolist() == expected


def test_16_bit_colour_keeps_the_high_byte():
    row = np.array([0x1234, 0xFFFF, 0x00FF], dtype=">u2").tobytes()
    assert pixels(png(1, 1, 16, 2, b"\0" + row)).tolist() == [[[0x12, 0xFF, 0x00]]]


PEAK = """
import sys
from models.transform import decode

def peak_bytes():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

small, large = (open(name, "rb").read() for name in sys.argv[1:])
decode(small)
before = peak_bytes()
width, height = decode(large).size
print((peak_bytes() - before) / (width * height))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("mode", "bytes_per_pixel"), [("RGB", 4), ("RGBA", 8), ("LA", 8), ("P", 5), ("L", 5), ("I;16", 6)]
)
def test_decoding_holds_the_picture_as_it_was_and_as_rgb_only(tmp_path, mode, bytes_per_pixel):
    for name, side in (("small", 600), ("large", 3000)):
        options = {"transparency": 0} if mode == "P" else {}
        (tmp_path / name).write_bytes(saved(Image.new(mode, (side, side)), "PNG", compress_level=1, **options))
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert float(printed) < bytes_per_pixel + 1


@pytest.mark.parametrize("tile_pixels", [1, 7, 100, HEIGHT * WIDTH])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "I;16", "P", "CMYK"])
def test_tiles_leave_no_trace(monkeypatch, mode, tile_pixels):
    grey16 = Image.fromarray(smooth()[:, :, 0].astype(np.uint16) * 257)
    picture = grey16 if mode == "I;16" else Image.fromarray(smooth()).convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray(smooth()[:, :, 1]))
    if mode == "P":
        picture.info["transparency"] = bytes(range(256))
    whole = np.asarray(upright_rgb(picture.copy()))
    monkeypatch.setattr("models.transform._TILE_PIXELS", tile_pixels)
    assert np.array_equal(upright_rgb(picture.copy()), whole)


def test_cmyk_jpeg():
    data = saved(Image.fromarray(smooth()).convert("CMYK"), "JPEG", quality=95)
    assert_near(pixels(data), smooth())


@pytest.mark.parametrize("image_format", FORMATS)
def test_truncated_images_are_refused(image_format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(noise, image_format)
    for kept in (0.1, 0.5, 0.9):
        with pytest.raises(ImageError):
            decode(data[: int(len(data) * kept)])


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"<svg/>"])
def test_bytes_that_are_no_image(data):
    with pytest.raises(ImageError, match=f"{len(data)} bytes are not a readable image; allowed: JPEG, PNG"):
        decode(data)


@pytest.mark.parametrize("image_format", ["TIFF", "ICO", "PPM", "PCX"])
def test_other_formats_are_refused(image_format):
    with pytest.raises(ImageError, match="not a readable image"):
        decode(encode(smooth(), image_format))


def test_damaged_bytes_never_raise_anything_else():
    rng = np.random.default_rng(0)
    originals = [encode(smooth(), image_format) for image_format in FORMATS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for trial in range(400):
            data = np.frombuffer(originals[trial % len(originals)], np.uint8).copy()
            data[rng.integers(0, len(data), 5)] = rng.integers(0, 256, 5)
            with contextlib.suppress(ImageError, ImageTooLargeError):
                assert decode(data.tobytes(), max_pixels=10_000).mode == "RGB"


def test_the_pixel_limit_is_checked_before_anything_is_decoded():
    announced = png(300, 200, 8, 2, b"")  # no pixel follows the header
    with pytest.raises(ImageTooLargeError, match=r"300x200 = 60000 pixels; allowed: at most 59999 pixels"):
        decode(announced, max_pixels=59_999)
    with pytest.raises(ImageError, match="PNG image of 300x200 pixels is damaged"):
        decode(announced, max_pixels=60_000)


def test_an_absurd_size_is_too_large_without_any_limit_of_ours():
    with pytest.raises(ImageTooLargeError):
        decode(png(60_000, 60_000, 8, 2, b""))


def test_nothing_changes_at_equal_size():
    picture = Image.fromarray(smooth(32, 32))
    assert np.array_equal(resize(picture, spec(32, 32, 32)), smooth(32, 32))


def test_a_crop_without_scaling_is_the_centre():
    picture = Image.fromarray(smooth(32, 48))
    assert np.array_equal(resize(picture, spec(32, 32, 32)), smooth(32, 48)[:, 8:40])
    assert np.array_equal(resize(picture, spec(24, 24, 32)), smooth(32, 48)[4:28, 12:36])


@pytest.mark.parametrize("resize_filter", ["bicubic", "bilinear", "box"])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (97, 131), (40, 40), (500, 60)])
def test_resizing_the_crops_box_is_resizing_then_cropping(size, resize_filter):
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    wanted = spec(56, 56, 64, resize_filter)
    scale = 64 / min(size)
    whole = tuple(round(side * scale) for side in size)
    left, top = (whole[0] - 56) // 2, (whole[1] - 56) // 2
    reference = picture.resize(whole, Image.Resampling[resize_filter.upper()])
    reference = np.asarray(reference.crop((left, top, left + 56, top + 56))).astype(int)
    difference = np.abs(resize(picture, wanted).astype(int) - reference)
    assert difference.mean() < 2.0  # half a pixel of crop rounding, and no more


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 7), (31, 33)])
def test_any_size_gives_the_input_size(size):
    picture = Image.new("RGB", size, (9, 8, 7))
    assert np.array_equal(resize(picture, spec(20, 28, 32)), np.full((20, 28, 3), (9, 8, 7)))


def test_normalise_is_per_channel_and_channels_first():
    wanted = spec(2, 3, 4)
    batch = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 3), dtype=np.uint8)
    expected = ((batch / 255 - np.array(wanted.mean)) / np.array(wanted.std)).transpose(0, 3, 1, 2)
    given = normalise(batch, wanted)
    assert given.dtype == np.float32
    np.testing.assert_allclose(given, expected, atol=1e-6)
    np.testing.assert_allclose(normalise(batch[0], wanted), expected[0], atol=1e-6)


def test_load_image_is_the_three_steps():
    wanted = spec(16, 16, 18)
    data = encode(smooth())
    expected = normalise(resize(decode(data), wanted), wanted)
    given = load_image(data, wanted)
    assert given.shape == (3, 16, 16)
    assert np.array_equal(given, expected)
    with pytest.raises(ImageTooLargeError):
        load_image(data, wanted, max_pixels=HEIGHT * WIDTH - 1)


def test_the_spec_round_trips_through_json():
    wanted = spec(16, 20, 24, "box")
    assert InputSpec.from_json(wanted.to_json()) == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 0}, "must cover"),
        ({"mean": [0.5, 0.5]}, "values to unpack"),
        ({"std": [0.2, 0.0, 0.2]}, "std above 0"),
        ({"std": None}, "input transform"),
        ({"width": 60}, "shorter_side 24 must cover the 16x60 input"),
        ({"resize": {"shorter_side": 24, "filter": "nearest", "crop": "center"}}, "allowed: bicubic, bilinear, box"),
        ({"resize": {"shorter_side": 24, "filter": "box", "crop": "random"}}, "crop 'random'; allowed: center"),
        ({"resize": {"shorter_side": 24, "filter": "box"}}, "'crop'"),
    ],
)
def test_a_spec_that_means_nothing(change, message):
    with pytest.raises(ValueError, match=message):
        InputSpec.from_json(spec(16, 20, 24).to_json() | change)


def photograph(side: int) -> bytes:
    """A JPEG with detail at all scales."""
    rng = np.random.default_rng(0)
    pixels = sum(
        np.asarray(Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((side, side)), np.float32)
        for n in (4, 16, 64, 256)
    )
    buffer = io.BytesIO()
    Image.fromarray((pixels / 4).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("side", "decoded"), [(64, 64), (95, 95), (96, 96), (191, 191), (192, 96), (384, 96), (800, 100)]
)
def test_large_jpegs_are_decoded_small_but_never_smaller_than_the_filter_needs(side, decoded):
    assert decode(photograph(side), shorter_side=64).size == (decoded, decoded)
    assert decode(photograph(side)).size == (side, side)


def test_decoding_small_changes_the_network_input_by_little():
    spec = InputSpec(64, 64, (0.5,) * 3, (0.2,) * 3, shorter_side=72)
    whole = resize(decode(photograph(512)), spec).astype(int)
    assert np.abs(load_pixels(photograph(512), spec) - whole).mean() < 1.5


def test_the_pixel_limit_counts_what_the_file_announces():
    with pytest.raises(ImageTooLargeError, match="512x512"):
        decode(photograph(512), 1000, shorter_side=16)
