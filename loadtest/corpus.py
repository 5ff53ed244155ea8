"""Image files, still encoded, as request bodies that are ready to send."""

from __future__ import annotations

import random
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

MEDIA_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
BOUNDARY = b"slicewise-load-a3f1c97be2d84065"


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One file's bytes and their media type."""

    media_type: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Body:
    """One request's body, and how many images are in it."""

    content_type: str
    data: bytes
    images: int


def read_images(path: Path, limit_images: int, seed: int) -> list[EncodedImage]:
    """Up to ``limit_images`` JPEG, PNG or WebP files of a folder (with what is below it) or a zip file.

    They are picked and ordered by the seed, so that folders named after classes do not come one after
    another. Raises ValueError when there is none.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such folder or zip file")
    if path.is_dir():
        files = {str(f.relative_to(path)): f for f in path.rglob("*") if f.suffix.lower() in MEDIA_TYPES}
        return [_image(name, files[name].read_bytes()) for name in _picked(list(files), path, limit_images, seed)]
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if PurePath(name).suffix.lower() in MEDIA_TYPES]
        return [_image(name, archive.read(name)) for name in _picked(names, path, limit_images, seed)]


def _picked(names: list[str], path: Path, limit_images: int, seed: int) -> list[str]:
    if not names:
        raise ValueError(f"{path}: no image; expected files named {', '.join(MEDIA_TYPES)}")
    names.sort()
    random.Random(seed).shuffle(names)
    return names[:limit_images]


def _image(name: str, data: bytes) -> EncodedImage:
    return EncodedImage(MEDIA_TYPES[PurePath(name).suffix.lower()], data)


def single_bodies(images: list[EncodedImage]) -> list[Body]:
    """Each image as a raw body."""
    return [Body(image.media_type, image.data, 1) for image in images]


def batch_bodies(images: list[EncodedImage], images_per_request: int) -> list[Body]:
    """Multipart bodies of equally many parts ``image``; images that do not fill a body are left out.

    Raises ValueError when there are too few for one.
    """
    if len(images) < images_per_request:
        raise ValueError(f"{len(images)} images; a request needs {images_per_request}")
    starts = range(0, len(images) - images_per_request + 1, images_per_request)
    return [_multipart(images[start : start + images_per_request]) for start in starts]


def _multipart(images: list[EncodedImage]) -> Body:
    parts = (
        b'--%b\r\nContent-Disposition: form-data; name="image"; filename="%d"\r\nContent-Type: %b\r\n\r\n%b\r\n'
        % (BOUNDARY, index, image.media_type.encode(), image.data)
        for index, image in enumerate(images)
    )
    data = b"".join(parts) + b"--%b--\r\n" % BOUNDARY
    return Body(f"multipart/form-data; boundary={BOUNDARY.decode()}", data, len(images))


def endless(bodies: list[Body], seed: int) -> Iterator[Body]:
    """Bodies without end; every cycle sends each once, and each is shuffled anew."""
    order, cycle = random.Random(seed), list(bodies)
    while True:
        order.shuffle(cycle)
        yield from cycle
