import email
import email.policy
import zipfile
from itertools import islice

import pytest

from loadtest.corpus import EncodedImage, batch_bodies, endless, read_images, single_bodies


def test_a_folder_and_a_zip_of_it_give_the_same_images(image_folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in image_folder.rglob("*.*"):
            archive.write(file, file.relative_to(image_folder))
    images = read_images(image_folder, 100, seed=1)
    assert read_images(tmp_path / "images.zip", 100, seed=1) == images
    assert len(images) == 8
    assert {image.media_type for image in images} == {"image/jpeg"}


def test_the_seed_picks_and_orders(image_folder):
    assert read_images(image_folder, 3, seed=1) == read_images(image_folder, 8, seed=1)[:3]
    assert read_images(image_folder, 8, seed=1) != read_images(image_folder, 8, seed=2)


def test_a_path_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no image"):
        read_images(tmp_path, 10, seed=0)
    with pytest.raises(ValueError, match="no such"):
        read_images(tmp_path / "absent", 10, seed=0)


def test_a_batch_body_is_multipart_with_every_image_as_a_part():
    images = [EncodedImage("image/png", bytes([k]) * 5) for k in range(7)]
    bodies = batch_bodies(images, 3)
    assert [body.images for body in bodies] == [3, 3]
    head = f"Content-Type: {bodies[1].content_type}\r\n\r\n".encode()
    parts = list(email.message_from_bytes(head + bodies[1].data, policy=email.policy.HTTP).iter_parts())
    assert [part.get_payload(decode=True) for part in parts] == [image.data for image in images[3:6]]
    assert {part.get_param("name", header="content-disposition") for part in parts} == {"image"}
    assert {part.get_content_type() for part in parts} == {"image/png"}


def test_too_few_images_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="2 images; a request needs 32"):
        batch_bodies([EncodedImage("image/png", b"x")] * 2, 32)


def test_every_cycle_sends_every_body_once():
    bodies = single_bodies([EncodedImage("image/png", bytes([k])) for k in range(6)])
    sent = list(islice(endless(bodies, seed=0), 12))
    for cycle in (sent[:6], sent[6:]):
        assert {body.data for body in cycle} == {body.data for body in bodies}
    assert sent[:6] != sent[6:]
