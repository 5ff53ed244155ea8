"""Labelled images, the stratified hold-out, and augmented batches of them.

Words: the *hold-out* is split off the training set and chooses everything; the *test* split is used
for final figures only.

Shapes: N images, B batch, H height, W width, C = 3 channels.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.context import BaseContext
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.training.loading import EncodedImages, ImageFiles
from models.transform import U8, InputSpec

LIMIT_BYTES = 4 * 2**30
"""Decoded pixels up to this are kept in memory; ImageNet at 224x224 is 180 GiB, CIFAR-10 0.2 GiB."""


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Images with their labels, int64 [N] into ``classes``, and one name each.

    pixels  uint8 [N, H, W, 3] in memory, or what decodes such rows when it is indexed.
    """

    pixels: U8 | EncodedImages
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> LabelledImages:
        names = tuple(self.names[i] for i in indices)
        # An encoded image stays encoded; indexing it would decode it.
        pixels = self.pixels.take(indices) if isinstance(self.pixels, EncodedImages) else self.pixels[indices]
        return LabelledImages(pixels, self.labels[indices], self.classes, names)


def _known_classes(path: Path, folders: Sequence[str], classes: tuple[str, ...] | None) -> tuple[str, ...]:
    """The classes of images that lie in ``folders``, one per image; ValueError as ``load_folder``."""
    found = sorted(set(folders))
    if "" in found:
        raise ValueError(f"{path} holds {folders.count('')} images outside of class folders; expected class/name.jpg")
    if classes is None and len(found) == 1:
        raise ValueError(f"{path} has one class, {found[0]}; needed: at least 2")
    unknown = sorted(set(found) - set(classes or found))
    if unknown:
        raise ValueError(f"{path} has classes {unknown} which are not among {list(classes or ())}")
    return classes or tuple(found)


def load_folder(
    path: Path, spec: InputSpec, classes: tuple[str, ...] | None = None, limit_bytes: int = LIMIT_BYTES
) -> LabelledImages:
    """Read ``class/name.jpg`` files; classes are the sorted folder names unless given.

    limit_bytes  decoded pixels that may be kept in memory; a hold-out taken from them is a copy. Above it
                 images stay encoded where they are, every batch decodes its own, and the files must stay.

    Raises ValueError when there is no image, an image lies in no folder, the folders do not lie side by side,
    one is not among the given classes, none are given and there is but one, or (at once in memory, else with
    its batch) an image cannot be decoded.
    """
    files = ImageFiles(path)
    names = files.names()
    if not names:
        raise ValueError(f"{path} holds no images laid out as class/name.jpg")
    parents = [PurePosixPath(name).parent for name in names]
    roots = sorted({parent.parent.as_posix() for parent in parents})
    if len(roots) > 1:  # classes of one name would become one, splits would be mixed
        raise ValueError(f"{path} has class folders in {', '.join(roots[:12])}; needed: all in one folder")
    folders = [parent.name for parent in parents]
    known = _known_classes(path, folders, classes)
    index = {name: i for i, name in enumerate(known)}
    labels = np.array([index[folder] for folder in folders], dtype=np.int64)
    encoded = EncodedImages(files, names, spec)
    pixels = encoded.decode_all() if encoded.decoded_bytes <= limit_bytes else encoded
    return LabelledImages(pixels, labels, known, names)


def split_hold_out(images: LabelledImages, count: int, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """(rest, hold-out): ``count`` images, the same number of each class, drawn by ``seed``.

    Raises ValueError when ``count`` does not divide by the number of classes, or takes none or all of one.
    """
    per_class, odd = divmod(count, len(images.classes))
    smallest = int(np.bincount(images.labels, minlength=len(images.classes)).min())
    if odd or not 1 <= per_class < smallest:
        raise ValueError(
            f"hold-out of {count} images: needs a multiple of {len(images.classes)} classes, at least 1 and fewer than "
            f"{smallest} per class"
        )
    generator = np.random.default_rng(seed)
    held = np.concatenate(
        [generator.permutation(np.flatnonzero(images.labels == k))[:per_class] for k in range(len(images.classes))]
    )
    held.sort()
    rest = np.setdiff1d(np.arange(len(images)), held)
    return images.take(rest), images.take(held)


# Ours, because torchvision's v2 transforms draw once per call, not per image (pytorch/vision#8484), and
# kornia, which draws per image, is a large dependency for two short functions.
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


def erase(pixels_NHWC: Tensor, generator: torch.Generator, side: int, fill_C: Tensor) -> Tensor:
    """A square of ``side`` pixels becomes ``fill_C``, its centre anywhere in the image, one for each image.

    Source: Cutout (DeVries and Taylor 2017, section 3.2): a square near the border is cut off there.
    """
    n, height, width, _ = pixels_NHWC.shape
    top = torch.randint(0, height, (n, 1), generator=generator) - side // 2
    left = torch.randint(0, width, (n, 1), generator=generator) - side // 2
    rows, columns = torch.arange(height), torch.arange(width)
    inside_NH = (rows >= top) & (rows < top + side)
    inside_NW = (columns >= left) & (columns < left + side)
    return torch.where((inside_NH[:, :, None] & inside_NW[:, None, :])[..., None], fill_C, pixels_NHWC)


def _generator(*key: int) -> torch.Generator:
    """A generator of its own for every key of non-negative numbers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _worker_context() -> BaseContext:
    """How worker processes start: from a server without threads, because a fork of a process with threads
    (PyTorch's, tqdm's, a test's) can inherit a lock that nobody will release.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # PyTorch is imported once by the server, not by every worker
    return context


@dataclass(frozen=True, slots=True)
class _Job:
    """One batch: its number in the epoch, and which images [B]."""

    batch: int
    chosen_B: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Source(Dataset[tuple[Tensor, Tensor]]):
    """What makes one batch, in this or in a worker process: uint8 [B, H, W, 3] and labels [B].

    key  of the generators: (seed, epoch); None: no augmentation.
    """

    pixels: Tensor | EncodedImages
    labels: NDArray[np.int64]
    key: tuple[int, int] | None
    padding: int
    erase_pixels: int
    fill_C: Tensor

    def __getitem__(self, job: _Job) -> tuple[Tensor, Tensor]:
        if isinstance(self.pixels, EncodedImages):
            pixels = torch.from_numpy(self.pixels[job.chosen_B])
        else:
            pixels = self.pixels[torch.from_numpy(job.chosen_B)]
        if self.key is not None:
            generator = _generator(*self.key, job.batch)
            pixels = augment(pixels, generator, self.padding)
            if self.erase_pixels:
                pixels = erase(pixels, generator, self.erase_pixels, self.fill_C)
        return pixels, torch.from_numpy(self.labels[job.chosen_B])


@dataclass(frozen=True, eq=False)
class Batches:
    """Normalised batches of one split, the same whatever the number of workers.

    The order of an epoch depends on (seed, epoch), the augmentation of a batch on (seed, epoch, number of
    the batch).

    padding       pixels reflected around an image before it is cropped at random.
    erase_pixels  side of the square that is erased to the mean colour; 0: none.
    workers       processes that decode and augment ahead, two batches each; 0: this process does it.
                  Images in memory are copied to shared memory for them. They end with the iteration,
                  the server that starts them ends with this process. As with every process that does
                  not begin as a fork, the main script needs its ``if __name__ == "__main__"``.
    device        where batches are normalised and left; they pass through pinned memory on the way to CUDA.
    """

    images: LabelledImages
    spec: InputSpec
    batch_size: int
    seed: int
    padding: int
    erase_pixels: int = 0
    workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, augmented, full batches: x [B, 3, H, W] and labels [B]; ``count``: only the first so many.

        Raises ValueError when there are fewer images than one batch takes.
        """
        if len(self) == 0:
            raise ValueError(f"{len(self.images)} images do not fill a batch of {self.batch_size}")
        order = torch.randperm(len(self.images), generator=_generator(self.seed, epoch)).numpy()
        full = order[: len(self) * self.batch_size].reshape(len(self), self.batch_size)
        return self._batches(list(full[:count]), (self.seed, epoch))

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in order, without augmentation; the last batch may be smaller."""
        rows = np.arange(len(self.images))
        return self._batches(
            [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)], None
        )

    def normalise(self, pixels_NHWC: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] on the device, channels last in memory."""
        std = torch.tensor(self.spec.std, device=self.device)
        scale, shift = 1.0 / (255.0 * std), torch.tensor(self.spec.mean, device=self.device) / std
        return (pixels_NHWC.to(self.device, non_blocking=True) * scale - shift).permute(0, 3, 1, 2)

    @cached_property
    def _pixels(self) -> Tensor | EncodedImages:
        if isinstance(self.images.pixels, EncodedImages):
            return self.images.pixels
        pixels = torch.from_numpy(self.images.pixels)
        if self.workers:  # a copy that all of them see; else each would be sent one of its own
            pixels.share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return pixels

    def _batches(
        self, chosen: Sequence[NDArray[np.int64]], key: tuple[int, int] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        fill_C = torch.tensor(self.spec.mean).mul(255).round().to(torch.uint8)
        source = _Source(self._pixels, self.images.labels, key, self.padding, self.erase_pixels, fill_C)
        loader = DataLoader(
            source, batch_size=None, sampler=[_Job(i, rows) for i, rows in enumerate(chosen)],
            num_workers=self.workers, multiprocessing_context=_worker_context() if self.workers else None,
            pin_memory=self.device.type == "cuda", generator=torch.Generator(),  # its own: not the global one's state
        )  # fmt: skip
        # Workers hand over bytes: a quarter of what normalised batches would take in shared memory.
        for pixels_NHWC, labels in loader:
            yield self.normalise(pixels_NHWC), labels.to(self.device, non_blocking=True)
