from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from aiohttp.test_utils import TestServer

from loadtest.closed_loop import Load, Recorder, drive, main, parse, requests_of
from loadtest.corpus import Body, EncodedImage, batch_bodies, single_bodies
from loadtest.mix import Mix
from loadtest.servers import free_port

IMAGES = [EncodedImage("image/jpeg", bytes([k]) * 20) for k in range(6)]


def load(url: object, **changes: object) -> Load:
    return Load(**{"url": str(url), "images": Path(), "clients": 3, "warm_up_s": 0.05, "seconds": 0.2} | changes)


async def driven(app, bodies, **changes):
    """Drive a server in this process; the outcome and what was announced."""
    heard: list[str] = []
    async with TestServer(app) as server:
        outcome = await drive(load(server.make_url("/classify"), **changes), bodies, heard.append)
    assert heard == ["begin", "end"]
    return outcome


async def test_every_client_keeps_its_connection_and_sends_raw_images(fake_app):
    app, seen = fake_app()
    outcome = await driven(app, single_bodies(IMAGES))
    assert outcome.images == len(outcome.latencies_ms) > 0
    assert outcome.failed == {}
    assert len(seen.peers) == 3
    assert {kind for kind, _ in seen.bodies} == {"image/jpeg"}
    assert {data for _, data in seen.bodies} == {image.data for image in IMAGES}
    assert outcome.cpu_s > 0


async def test_answers_of_the_warm_up_are_not_counted(fake_app):
    app, seen = fake_app()
    outcome = await driven(app, single_bodies(IMAGES))
    assert outcome.images < len(seen.bodies)


async def test_a_status_other_than_200_is_a_failure_without_latency(fake_app):
    outcome = await driven(fake_app(fail_every=3)[0], single_bodies(IMAGES))
    assert set(outcome.failed) == {"503"}
    assert outcome.images == len(outcome.latencies_ms) == sum(outcome.served.values())


async def test_a_server_that_is_not_there_is_a_failure_by_name():
    outcome = await drive(load(f"http://127.0.0.1:{free_port()}/"), single_bodies(IMAGES), lambda _: None)
    assert outcome.images == 0
    assert set(outcome.failed) == {"ConnectionRefusedError"}


async def test_failed_items_of_a_batch_are_no_images(fake_app):
    outcome = await driven(fake_app(item_errors=2)[0], batch_bodies(IMAGES, 3), images_per_request=3)
    requests = len(outcome.latencies_ms)
    assert requests > 0
    assert outcome.images == requests
    assert outcome.failed == {"item": 2 * requests}


async def test_header_values_are_sent_by_their_shares_and_answers_tallied(fake_app):
    outcome = await driven(fake_app()[0], single_bodies(IMAGES), mix="Slice-Width=0:3,2:1")
    assert set(outcome.served) == {"0", "2"}
    assert sum(outcome.served.values()) == outcome.images


def test_requests_keep_the_mix_and_cycle_through_the_bodies():
    bodies = single_bodies(IMAGES)
    sent = list(islice(requests_of(bodies, Mix.parse("Slice-Width=0:3,2:1"), seed=5), 12))
    assert Counter(request.headers["Slice-Width"] for request in sent) == {"0": 9, "2": 3}
    assert Counter(request.body.data for request in sent) == {image.data: 2 for image in IMAGES}


def test_without_a_mix_only_the_content_type_is_sent():
    request = next(requests_of([Body("image/png", b"x", 1)], None, seed=0))
    assert request.headers == {"Content-Type": "image/png"}


def test_the_recorder_counts_between_begin_and_end_only():
    recorder = Recorder()
    recorder.answered(1, 0, 0.5, "0")
    recorder.failed("503")
    recorder.begin()
    recorder.answered(4, 1, 0.25, "3")
    recorder.failed("504")
    outcome = recorder.end()
    recorder.answered(1, 0, 0.5, "0")
    recorder.failed("503")
    assert (outcome.images, outcome.latencies_ms) == (3, [250.0])
    assert (outcome.failed, outcome.served) == ({"item": 1, "504": 1}, {"3": 1})


def test_flags_say_the_whole_load():
    asked = Load("http://host/x", Path("images.zip"), 4, 1.5, 0.25, 32, "Slice-Width=0:3,2:1", 7, "Slice-Reason")
    assert parse(asked.flags()) == asked


def test_flags_that_are_absent_take_their_defaults():
    assert parse(["--url=u", "--images=i"]) == Load("u", Path("i"))


@pytest.mark.parametrize(
    ("changes", "complaint"), [({"images": "absent"}, "no such folder"), ({"mix": "W=0:0"}, "allowed: HEADER=")]
)
def test_what_cannot_be_sent_is_said_in_one_line(image_folder, capsys, changes, complaint):
    flags = {"images": image_folder, "url": "http://127.0.0.1:9/", "warm_up_s": 0, "seconds": 0} | changes
    assert main(Load(**flags).flags()) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert err.count("\n") == 1
