"""Images of an ImageFolder directory or zip: which there are, and their pixels whenever they are asked for.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from models.transform import FORMATS, U8, ImageError, ImageTooLargeError, InputSpec, load_pixels

_SUFFIXES = {f".{name.lower()}" for name in FORMATS} | {".jpg"}


def _is_image(name: str) -> bool:
    """Whether ``name`` is to be read: by its suffix, and nothing hidden or added by an archiver."""
    path = PurePosixPath(name)
    added = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in _SUFFIXES and not added


class ImageFiles:
    """The files below a directory or in a zip. It may be sent to another process, which opens its own handle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        if not path.is_dir() and not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is neither a directory nor a zip file")

    def __reduce__(self) -> tuple[type[ImageFiles], tuple[Path]]:
        return type(self), (self.path,)

    @property
    def archive(self) -> zipfile.ZipFile | None:
        """The open zip; None for a directory."""
        if self._archive is None and not self.path.is_dir():
            self._archive = zipfile.ZipFile(self.path)
        return self._archive

    def names(self) -> tuple[str, ...]:
        """class/name of every image, sorted."""
        if self.archive is None:
            folders = os.walk(self.path, followlinks=True)  # class folders are often links to those of a larger set
            files = (Path(folder, name) for folder, _, names in folders for name in names)
            found = (file.relative_to(self.path).as_posix() for file in files if file.is_file())
        else:
            found = (info.filename for info in self.archive.infolist() if not info.is_dir())
        return tuple(sorted(name for name in found if _is_image(name)))

    def read(self, name: str) -> bytes:
        """The encoded image; ImageError names the file that cannot be read."""
        try:
            return (self.path / name).read_bytes() if self.archive is None else self.archive.read(name)
        # RuntimeError: encrypted, or compressed in a way that is not supported.
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise ImageError(f"{self.path}: {name} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class EncodedImages:
    """Images that stay where they are and are decoded whenever they are indexed.

    It is indexed as an array uint8 [N, H, W, 3] is by an array of indices, and gives the same.
    """

    files: ImageFiles
    names: tuple[str, ...]
    spec: InputSpec

    def __len__(self) -> int:
        return len(self.names)

    @property
    def decoded_bytes(self) -> int:
        """What all pixels take in memory."""
        return len(self) * self.spec.height * self.spec.width * 3

    def picture(self, index: int) -> U8:
        """One image [H, W, 3]; ImageError names a file that is no image or is damaged."""
        name = self.names[index]
        data = self.files.read(name)
        try:
            return load_pixels(data, self.spec)
        except (ImageError, ImageTooLargeError) as error:
            raise ImageError(f"{self.files.path}: {name}: {error}") from error

    def __getitem__(self, indices: NDArray[np.int64]) -> U8:
        return np.stack([self.picture(int(index)) for index in indices])

    def take(self, indices: NDArray[np.int64]) -> EncodedImages:
        """The images at ``indices``, still encoded."""
        return EncodedImages(self.files, tuple(self.names[i] for i in indices), self.spec)

    def decode_all(self) -> U8:
        """All pixels, decoded by as many threads as there are cores."""
        pixels_NHWC = np.empty((len(self), self.spec.height, self.spec.width, 3), np.uint8)

        def put(index: int) -> None:
            pixels_NHWC[index] = self.picture(index)

        with ThreadPoolExecutor() as pool:
            for _ in pool.map(put, range(len(self))):  # consumed, because that raises what a thread raised
                pass
        return pixels_NHWC
