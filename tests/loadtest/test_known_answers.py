import json

import pytest

from loadtest.known_answers import APART, TOLERANCE, Ending, distinct, ending, is_right, item_is_right
from loadtest.outcomes import NOT_SENT, Exchange

KNOWN = {0: {"cat": 0.75, "dog": 0.25}, 1: {"cat": 0.5, "dog": 0.5}}


def said(width, **probabilities):
    predictions = [{"index": 0, "label": label, "probability": p} for label, p in probabilities.items()]
    return {"predictions": predictions, "slice": {"width": width}}


def exchange(status=200, body=b"", failure=""):
    return Exchange(0.0, 0.0, 0.01 if status else None, status, failure, {}, body)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (said(0, cat=0.75, dog=0.25), True),
        (said(0, cat=0.75 + TOLERANCE / 2, dog=0.25), True),
        (said(0, cat=0.75 + TOLERANCE * 2, dog=0.25), False),
        (said(1, cat=0.75, dog=0.25), False),
        (said(2, cat=0.75, dog=0.25), False),
        (said(0, cat=0.75), False),
        ({"error": "no"}, False),
        ([], False),
        ({"predictions": None, "slice": {"width": 0}}, False),
    ],
)
def test_an_answer_is_right_at_the_slice_that_it_names(answer, right):
    assert item_is_right(answer, KNOWN) == right
    assert is_right(json.dumps(answer).encode(), KNOWN) == right


def test_what_is_no_json_is_wrong():
    assert not is_right(b"<html>", KNOWN)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (exchange(body=json.dumps(said(0, cat=0.75, dog=0.25)).encode()), Ending.RIGHT),
        (exchange(body=b"{}"), Ending.WRONG),
        (exchange(400), Ending.CLIENT_ERROR),
        (exchange(429), Ending.REFUSED),
        (exchange(503), Ending.REFUSED),
        (exchange(504), Ending.EXPIRED),
        (exchange(500), Ending.SERVER_ERROR),
        (exchange(0, failure="TimeoutError"), Ending.HUNG),
        (exchange(0, failure="ConnectionResetError"), Ending.CUT),
        (exchange(0, failure=NOT_SENT), Ending.NOT_SENT),
    ],
)
def test_endings(given, expected):
    assert ending(given, KNOWN) is expected


def test_an_answer_that_nobody_knows_is_not_looked_at():
    assert ending(exchange(body=b"?"), None) is Ending.RIGHT


def test_images_are_chosen_whose_answers_differ_at_every_slice():
    def image(first, second):
        return {0: {"cat": first, "dog": 1 - first}, 1: {"cat": second, "dog": 1 - second}}

    images = [image(0.1, 0.1), image(0.1 + APART / 2, 0.9), image(0.9, 0.1), image(0.5, 0.5), image(0.7, 0.7)]
    assert distinct(images, 9) == [0, 3, 4]
    assert distinct(images, 2) == [0, 3]
