import zipfile

import numpy as np
import pytest
import torch
from support import TINY_INPUT, random_image

from models.training.data import Batches, LabelledImages, augment, load_folder, split_hold_out


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for k, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir(parents=True)
        for i in range(6):
            (root / name / f"{i}.png").write_bytes(random_image(10 * k + i))
    (root / "readme.txt").write_text("not an image")
    return root


def labelled(count, classes=2):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64) % classes
    return LabelledImages(pixels, labels, tuple(map(str, range(classes))), tuple(map(str, range(count))))


def test_a_folder_and_its_zip_read_the_same(folder, tmp_path):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, path.relative_to(folder).as_posix())
    a, b = load_folder(folder, TINY_INPUT), load_folder(archive, TINY_INPUT)
    assert a.classes == b.classes == ("ant", "bee", "cat")
    assert a.names == b.names
    assert np.array_equal(a.pixels, b.pixels)
    assert a.labels.tolist() == b.labels.tolist() == sorted(a.labels.tolist())


def test_what_is_wrong_with_a_folder_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match="bee"):
        load_folder(folder, TINY_INPUT, ("ant", "cat"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        load_folder(tmp_path / "empty", TINY_INPUT)
    with pytest.raises(ValueError, match="neither"):
        load_folder(tmp_path / "absent", TINY_INPUT)


def test_the_hold_out_is_stratified_disjoint_and_decided_by_the_seed():
    images = labelled(100, 5)
    rest, held = split_hold_out(images, 20, seed=3)
    assert np.bincount(held.labels).tolist() == [4] * 5
    assert set(rest.names) | set(held.names) == set(images.names)
    assert not set(rest.names) & set(held.names)
    assert split_hold_out(images, 20, seed=3)[1].names == held.names
    assert split_hold_out(images, 20, seed=4)[1].names != held.names


@pytest.mark.parametrize("count", [7, 100, 1000])
def test_a_hold_out_that_does_not_divide_or_takes_all_is_refused(count):
    with pytest.raises(ValueError, match="hold-out"):
        split_hold_out(labelled(100, 5), count, seed=0)


def test_augmentation_crops_and_flips_and_nothing_else():
    pixels = torch.from_numpy(labelled(64).pixels)
    out = augment(pixels, torch.Generator().manual_seed(0), padding=2)
    padded = torch.nn.functional.pad(pixels.permute(0, 3, 1, 2).float(), (2,) * 4, mode="reflect").to(torch.uint8)
    seen = set()
    for image, source in zip(out.permute(0, 3, 1, 2), padded, strict=True):
        matches = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(image, source[:, top : top + 16, left : left + 16].flip(2 if flip else ()))
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 20


def test_an_epoch_repeats_and_another_differs():
    batches = Batches(labelled(40), TINY_INPUT, 8, seed=1, padding=2)
    first, again, other = (list(batches.epoch(e)) for e in (0, 0, 1))
    assert len(first) == len(batches) == 5
    assert all(torch.equal(a, b) and torch.equal(y, z) for (a, y), (b, z) in zip(first, again, strict=True))
    assert not all(torch.equal(y, z) for (_, y), (_, z) in zip(first, other, strict=True))


def test_batches_normalise_as_the_service_does():
    from models.transform import normalise

    images = labelled(5)
    x = torch.cat([x for x, _ in Batches(images, TINY_INPUT, 2, 0, 0).in_order()])
    assert torch.allclose(x, torch.from_numpy(normalise(images.pixels, TINY_INPUT)), atol=1e-6)
