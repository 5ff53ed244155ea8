import pickle
import zipfile

import numpy as np
import pytest
from support import TINY_INPUT, random_image

from models.training.loading import EncodedImages, ImageFiles
from models.transform import ImageError, decode, resize


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as file:
        names = ("bee/1.PNG", "ant/0.png", "__MACOSX/ant/._0.png", "ant/.hidden.png", "ant/notes.txt")
        for seed, name in enumerate(names):
            file.writestr(name, random_image(seed))
        file.mkdir("bee/folder.png")
    return path


def test_names_are_sorted_and_leave_out_what_archivers_add(archive, tmp_path):
    assert ImageFiles(archive).names() == ("ant/0.png", "bee/1.PNG")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "images")
    assert ImageFiles(tmp_path / "images").names() == ("ant/0.png", "bee/1.PNG")


def test_class_folders_may_be_links(archive, tmp_path):
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "images")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "ant").symlink_to(tmp_path / "images" / "ant")
    assert ImageFiles(tmp_path / "some").names() == ("ant/0.png",)


def test_indexing_decodes_as_the_service_does_in_the_order_asked_for(archive):
    files = ImageFiles(archive)
    images = EncodedImages(files, files.names(), TINY_INPUT)
    ant, bee = (resize(decode(files.read(name)), TINY_INPUT) for name in files.names())
    assert not np.array_equal(ant, bee)
    assert np.array_equal(images[np.array([1, 0, 1])], [bee, ant, bee])
    assert np.array_equal(images.take(np.array([1]))[np.array([0])], [bee])
    assert np.array_equal(images.decode_all(), [ant, bee])
    assert images.decoded_bytes == images.decode_all().nbytes


def test_another_process_opens_its_own_handle(archive):
    files = ImageFiles(archive)
    data = files.read("ant/0.png")  # the handle is open, and cannot be sent
    sent = pickle.loads(pickle.dumps(files))
    assert sent.read("ant/0.png") == data
    assert sent.archive is not files.archive


def test_a_file_that_cannot_be_read_is_named(archive, tmp_path):
    files = ImageFiles(archive)
    with zipfile.ZipFile(archive) as file:
        start = file.getinfo("bee/1.PNG").header_offset
    data = bytearray(archive.read_bytes())
    data[start + 60] ^= 255  # its checksum is now wrong
    archive.write_bytes(data)
    with pytest.raises(ImageError, match=r"images\.zip: bee/1\.PNG cannot be read: Bad CRC"):
        files.read("bee/1.PNG")
    with pytest.raises(ImageError, match=r"gone\.png cannot be read"):
        ImageFiles(tmp_path).read("gone.png")
