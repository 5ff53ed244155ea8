import gc
import multiprocessing
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import TINY_INPUT, random_image

from models.training.data import Batches, LabelledImages, augment, erase, load_folder, split_hold_out
from models.training.loading import EncodedImages

# PyTorch advises against more workers than cores; a machine with one core passes these tests too.
WORKERS_MAY_OUTNUMBER_CORES = pytest.mark.filterwarnings("ignore:This DataLoader will create")


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


def zipped(folder, archive):
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, path.relative_to(folder).as_posix())
    return archive


def equal(some, others):
    return all(
        torch.equal(x, other_x) and torch.equal(y, other_y)
        for (x, y), (other_x, other_y) in zip(some, others, strict=True)
    )


def test_a_folder_and_its_zip_read_the_same(folder, tmp_path):
    archive = zipped(folder, tmp_path / "images.zip")
    a, b = load_folder(folder, TINY_INPUT), load_folder(archive, TINY_INPUT)
    assert a.classes == b.classes == ("ant", "bee", "cat")
    assert a.names == b.names
    assert np.array_equal(a.pixels, b.pixels)
    assert a.labels.tolist() == b.labels.tolist() == sorted(a.labels.tolist())


def test_what_is_wrong_with_a_folder_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has classes \['bee'\] which are not among \['ant', 'cat'\]"):
        load_folder(folder, TINY_INPUT, ("ant", "cat"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        load_folder(tmp_path / "empty", TINY_INPUT)
    with pytest.raises(ValueError, match="neither"):
        load_folder(tmp_path / "absent", TINY_INPUT)
    (folder / "stray.png").write_bytes(random_image(0))
    with pytest.raises(ValueError, match="1 images outside of class folders"):
        load_folder(folder, TINY_INPUT)


def test_class_folders_lie_side_by_side(folder):
    ant = folder / "more" / "ant"
    ant.mkdir(parents=True)
    (ant / "0.png").write_bytes(random_image(0))
    with pytest.raises(ValueError, match=r"has class folders in \., more; needed: all in one folder"):
        load_folder(folder, TINY_INPUT)


def test_one_class_is_refused_unless_the_classes_are_given(tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "0.png").write_bytes(random_image(0))
    with pytest.raises(ValueError, match="one class, ant"):
        load_folder(tmp_path, TINY_INPUT)
    assert load_folder(tmp_path, TINY_INPUT, ("bee", "ant")).labels.tolist() == [1]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_images_stay_encoded_above_the_limit_and_are_the_same(folder, tmp_path, kind):
    path = folder if kind == "folder" else zipped(folder, tmp_path / "images.zip")
    size = 18 * 16 * 16 * 3
    memory, encoded = (load_folder(path, TINY_INPUT, limit_bytes=limit) for limit in (size, size - 1))
    assert isinstance(memory.pixels, np.ndarray)
    assert isinstance(encoded.pixels, EncodedImages)
    for a, b in zip(split_hold_out(memory, 6, 0), split_hold_out(encoded, 6, 0), strict=True):
        assert isinstance(b.pixels, EncodedImages)
        assert (a.names, a.classes, a.labels.tolist()) == (b.names, b.classes, b.labels.tolist())
        rows = np.arange(len(a))[::-1]
        assert np.array_equal(a.pixels[rows], b.pixels[rows])
        assert not np.array_equal(a.pixels[rows], b.pixels[rows[::-1]])


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
    assert equal(first, again)
    assert not equal(first, other)
    assert equal(first[:3], list(batches.epoch(0, 3)))


def test_every_image_is_in_an_epoch_once_and_epochs_and_seeds_differ_in_order():
    images = LabelledImages(np.zeros((40, 16, 16, 3), np.uint8), np.arange(40), (), tuple(map(str, range(40))))
    orders = [
        torch.cat([y for _, y in Batches(images, TINY_INPUT, 8, seed, 0).epoch(epoch)]).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_every_batch_of_every_epoch_is_augmented_in_its_own_way():
    pixels = np.repeat(labelled(1).pixels, 16, axis=0)
    images = LabelledImages(pixels, np.zeros(16, np.int64), ("a",), ("same",) * 16)
    seen = [x for epoch in range(3) for x, _ in Batches(images, TINY_INPUT, 8, 0, 4).epoch(epoch)]
    assert len({x.numpy().tobytes() for x in seen}) == 6


def test_fewer_images_than_a_batch_takes_are_refused():
    with pytest.raises(ValueError, match="7 images do not fill a batch of 8"):
        Batches(labelled(7), TINY_INPUT, 8, 0, 0).epoch(0)
    assert [len(y) for _, y in Batches(labelled(7), TINY_INPUT, 4, 0, 0).in_order()] == [4, 3]


@WORKERS_MAY_OUTNUMBER_CORES
@pytest.mark.parametrize("limit", [10**6, 0], ids=["memory", "encoded"])
def test_workers_change_no_bit_and_leave_nothing_behind(folder, tmp_path, limit, capfd):
    images = load_folder(zipped(folder, tmp_path / "images.zip"), TINY_INPUT, limit_bytes=limit)
    alone, one, two = (Batches(images, TINY_INPUT, 4, 1, 2, erase_pixels=5, workers=n) for n in (0, 1, 2))
    before = torch.random.get_rng_state()
    for epoch, others in ((0, one), (1, two)):
        expected = list(alone.epoch(epoch))
        assert len(expected) == 4
        assert equal(expected, list(others.epoch(epoch)))
    assert equal(list(alone.in_order()), list(two.in_order()))
    unfinished = two.epoch(0)
    next(unfinished)
    assert len(multiprocessing.active_children()) == 2
    del unfinished
    gc.collect()
    assert not multiprocessing.active_children()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named(folder, workers):
    (folder / "bee" / "3.png").write_bytes(random_image(0)[:60])
    with pytest.raises(ValueError, match=r"images: bee/3\.png: "):
        load_folder(folder, TINY_INPUT)
    batches = Batches(load_folder(folder, TINY_INPUT, limit_bytes=0), TINY_INPUT, 6, 0, 0, workers=workers)
    with pytest.raises(ValueError, match=r"images: bee/3\.png: "):
        list(batches.in_order())


def test_batches_are_channels_last():
    x, labels = next(Batches(labelled(8), TINY_INPUT, 4, 0, 0).epoch(0))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert (x.dtype, labels.dtype) == (torch.float32, torch.int64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_for_cuda_arrive_there(workers):
    cpu, cuda = (
        Batches(labelled(40), TINY_INPUT, 8, 0, 2, workers=workers, device=torch.device(d)) for d in ("cpu", "cuda")
    )
    for (x, y), (cuda_x, cuda_y) in zip(cpu.epoch(0), cuda.epoch(0), strict=True):
        assert (cuda_x.device.type, cuda_y.device.type) == ("cuda", "cuda")
        assert cuda_x.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(x, cuda_x.cpu(), atol=1e-6)
        assert torch.equal(y, cuda_y.cpu())


@given(side=st.integers(1, 20), seed=st.integers(0, 1000))
def test_erasing_fills_one_square_per_image_that_may_leave_the_image(side, seed):
    pixels = torch.full((8, 12, 10, 3), 9, dtype=torch.uint8)
    fill = torch.tensor([1, 2, 3], dtype=torch.uint8)
    out = erase(pixels, torch.Generator().manual_seed(seed), side, fill)
    for image in out:
        hit = (image == fill).all(-1)
        assert (image[~hit] == 9).all()
        rows, columns = hit.any(1).nonzero().flatten(), hit.any(0).nonzero().flatten()
        assert hit.sum() == len(rows) * len(columns) > 0  # a rectangle
        for lines, size in ((rows, 12), (columns, 10)):
            cut = lines[0] == 0 or lines[-1] == size - 1
            assert len(lines) == lines[-1] - lines[0] + 1
            assert len(lines) == side or (cut and side // 2 <= len(lines) < side) or len(lines) == size


def test_images_are_erased_in_places_of_their_own_and_to_the_mean():
    pixels = np.full((8, 16, 16, 3), 250, np.uint8)
    images = LabelledImages(pixels, np.zeros(8, np.int64), ("a",), ("same",) * 8)
    x, _ = next(Batches(images, TINY_INPUT, 8, 0, 0, erase_pixels=6).epoch(0))
    erased = x.abs() < 0.6 / 255 / min(TINY_INPUT.std)
    assert 0.05 < erased.float().mean() < 36 / 256
    assert len({image.numpy().tobytes() for image in erased}) > 4
    plain, _ = next(Batches(images, TINY_INPUT, 8, 0, 0).epoch(0))
    assert torch.equal(x[~erased], plain[~erased])
    assert len(plain.unique()) == 3


def test_batches_normalise_as_the_service_does():
    from models.transform import normalise

    images = labelled(5)
    x = torch.cat([x for x, _ in Batches(images, TINY_INPUT, 2, 0, 0).in_order()])
    assert torch.allclose(x, torch.from_numpy(normalise(images.pixels, TINY_INPUT)), atol=1e-6)
