"""Labelled images in memory, the stratified hold-out, and augmentation on whole batches.

Words: the *hold-out* is split off the training set and chooses everything; the *test* split is used
for final figures only.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.transform import FORMATS, U8, InputSpec, decode, resize

_SUFFIXES = {f".{name.lower()}" for name in FORMATS} | {".jpg"}


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """pixels uint8 [N, H, W, 3]; labels int64 [N] into ``classes``; names one per image."""

    pixels: U8
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> LabelledImages:
        names = tuple(self.names[i] for i in indices)
        return LabelledImages(self.pixels[indices], self.labels[indices], self.classes, names)


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(class/name, bytes) of every image below an ImageFolder directory or zip."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in _SUFFIXES:
                yield file.relative_to(path).as_posix(), file.read_bytes()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if PurePosixPath(name).suffix.lower() in _SUFFIXES:
                    yield name, archive.read(name)
    else:
        raise ValueError(f"{path} is neither a directory nor a zip file")


def load_folder(path: Path, spec: InputSpec, classes: tuple[str, ...] | None = None) -> LabelledImages:
    """Read ``class/name.jpg`` files; classes are the sorted folder names unless given.

    Raises ValueError when there is no image, or a folder is not among the given classes.
    """
    entries = list(_files(path))
    if not entries:
        raise ValueError(f"{path} holds no images laid out as class/name.jpg")
    folders = [PurePosixPath(name).parent.name for name, _ in entries]
    known = classes or tuple(sorted(set(folders)))
    unknown = sorted(set(folders) - set(known))
    if unknown:
        raise ValueError(f"{path} has classes {unknown} which are not among {list(known)}")
    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(lambda entry: resize(decode(entry[1]), spec), entries)))
    index = {name: i for i, name in enumerate(known)}
    labels = np.array([index[folder] for folder in folders], dtype=np.int64)
    return LabelledImages(pixels, labels, known, tuple(name for name, _ in entries))


def split_hold_out(images: LabelledImages, count: int, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """(rest, hold-out): ``count`` images, the same number of each class, drawn by ``seed``.

    Raises ValueError when ``count`` does not divide by the number of classes or leaves a class empty.
    """
    per_class, odd = divmod(count, len(images.classes))
    smallest = int(np.bincount(images.labels, minlength=len(images.classes)).min())
    if odd or per_class >= smallest:
        raise ValueError(
            f"hold-out of {count} images: needs a multiple of {len(images.classes)} classes and fewer than "
            f"{smallest} per class"
        )
    generator = np.random.default_rng(seed)
    held = np.concatenate(
        [generator.permutation(np.flatnonzero(images.labels == k))[:per_class] for k in range(len(images.classes))]
    )
    held.sort()
    rest = np.setdiff1d(np.arange(len(images)), held)
    return images.take(rest), images.take(held)


def augment(pixels_NHWC: Tensor, generator: torch.Generator, padding: int) -> Tensor:
    """Random crop after reflecting ``padding`` pixels, and a random left-right flip; uint8 in and out."""
    n, height, width, _ = pixels_NHWC.shape
    padded = F.pad(pixels_NHWC.permute(0, 3, 1, 2).float(), (padding,) * 4, mode="reflect").to(torch.uint8)
    top = torch.randint(0, 2 * padding + 1, (n,), generator=generator)
    left = torch.randint(0, 2 * padding + 1, (n,), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + left[:, None]
    rows = torch.arange(height).expand(n, height) + top[:, None]
    image = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]


class Batches:
    """Normalised batches of one split; the order and the augmentation of epoch e depend on (seed, e)."""

    def __init__(self, images: LabelledImages, spec: InputSpec, batch_size: int, seed: int, padding: int) -> None:
        self.pixels_NHWC = torch.from_numpy(images.pixels)
        self.labels = torch.from_numpy(images.labels)
        self.batch_size, self.seed, self.padding = batch_size, seed, padding
        self.scale = 1.0 / (255.0 * torch.tensor(spec.std))
        self.shift = torch.tensor(spec.mean) / torch.tensor(spec.std)

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def normalise(self, pixels_NHWC: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> float32 [N, 3, H, W], channels last in memory."""
        return (pixels_NHWC * self.scale - self.shift).permute(0, 3, 1, 2)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, augmented, full batches: x [B, 3, H, W] and labels [B]."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield self.normalise(augment(self.pixels_NHWC[chosen], generator, self.padding)), self.labels[chosen]

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in order, without augmentation."""
        for start in range(0, len(self.labels), self.batch_size):
            stop = start + self.batch_size
            yield self.normalise(self.pixels_NHWC[start:stop]), self.labels[start:stop]
