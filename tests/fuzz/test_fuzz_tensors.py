"""Broken inference requests: images or a documented error, within memory that follows what was sent.

What a request declares (shapes, counts, lengths) must cost nothing before the bytes behind it are there.
"""

import copy
import gzip
import zlib

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import KIB, MIB, allocating_at_most, broken, examples, raised_or

from service.api.open_inference_request import InputShape, images_of, merged_budget, wanted_outputs
from service.api.open_inference_wire import inflate, parse_call
from service.errors import BadRequestError, NotBuiltError, TooLargeError, UnsupportedMediaTypeError
from service.request import Budget

ALLOWED = InputShape(4, 4, 8)
LIMIT_BYTES = 32 * KIB
DOCUMENTED = (BadRequestError, TooLargeError, NotBuiltError)
ODD = (
    None, True, False, 0, -1, 1, 2.5, 2**31, 2**63, 2**64 - 1, 1e308, -0.0, "", "x", "image", "FP32", "A" * 300, [], {},
    [[]], [0], [[[[[[[[[1]]]]]]]]], {"a": {"a": 1}}, [2**62] * 8, [10**15, 3, 4, 4],
)  # fmt: skip


def binary(elements):
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def documents():
    """Valid requests: (JSON, what follows it)."""
    images = [b"abc", b"", b"\xff" * 40]
    pixels = np.linspace(-1, 1, 96, dtype="<f4")
    tail = binary(images)
    parameters = {
        "compute_budget": "40%", "latency_budget_ms": 25, "accuracy_floor": 0.5, "slice_width": 1, "timeout": 1000,
        "priority": 1, "binary_data_output": True,
    }  # fmt: skip
    outputs = [{"name": "logits", "parameters": {"classification": 3, "binary_data": False}}, {"name": "gate_logits"}]
    image = {"name": "image", "datatype": "BYTES", "shape": [3]}
    pixel = {"name": "pixels", "datatype": "FP32", "shape": [2, 3, 4, 4]}
    for tensor, behind in (
        (image | {"parameters": {"binary_data_size": len(tail)}}, tail),
        (image | {"data": ["YWJj", "", "/w=="]}, b""),
        (pixel | {"parameters": {"binary_data_size": 4 * 96}}, pixels.tobytes()),
        (pixel | {"data": pixels.tolist()}, b""),
        (pixel | {"data": pixels.reshape(2, 3, 4, 4).tolist()}, b""),
    ):
        yield {"id": "a", "parameters": parameters, "inputs": [tensor], "outputs": outputs}, behind


DOCUMENTS = tuple(documents())


def places(value, path=()):
    """Every way into a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from places(part, (*path, key))
    elif isinstance(value, list):
        for index, part in enumerate(value[:6]):
            yield from places(part, (*path, index))


@st.composite
def requests(draw):
    """(body, length of its JSON or None): parts of the JSON replaced or gone, lengths that lie, bytes broken."""
    document, behind = draw(st.sampled_from(DOCUMENTS))
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 2))):
        path = draw(st.sampled_from([path for path in places(document) if path]))
        holder = document
        for step in path[:-1]:
            holder = holder[step]
        if draw(st.booleans()):
            holder[path[-1]] = copy.deepcopy(draw(st.sampled_from(ODD)))
        else:
            del holder[path[-1]]
    text = orjson.dumps(document)
    if draw(st.integers(0, 3)) == 0:
        text = draw(broken(text, most=2))
    if behind and draw(st.booleans()):
        behind = draw(broken(behind, most=2))
    length = len(text) + draw(st.sampled_from((0, 0, 0, 0, 1, -1, 10**6, -len(text))))
    return text + behind, None if draw(st.integers(0, 5)) == 0 else max(0, length)


def understood(body, json_bytes):
    call = parse_call(body, json_bytes, LIMIT_BYTES)
    budget = merged_budget(Budget(), call.parameters, 5)
    outputs = wanted_outputs(call, budget.forced is not None)
    return images_of(call, ALLOWED), outputs


@pytest.mark.parametrize(("document", "behind"), DOCUMENTS)
def test_the_seeds_are_valid(document, behind):
    document = document | {"outputs": None}
    text = orjson.dumps(document)
    assert len(understood(text + behind, len(text) if behind else None)[0]) in (2, 3)


@examples(60_000, 150)
@given(requests())
def test_broken_requests(request_):
    body, json_bytes = request_
    with allocating_at_most(128 * KIB + 60 * len(body)):
        found, message = raised_or(lambda: understood(body, json_bytes), *DOCUMENTED)
    assert len(message) < 2000
    assert found is None or (1 <= len(found[0]) <= 8 and 1 <= len(found[1]) <= 5)


PLAIN = (b"", b"abc" * 1000, bytes(LIMIT_BYTES), bytes(LIMIT_BYTES + 1), bytes(20 * MIB))
PACKED = tuple(pack(data) for data in PLAIN for pack in (gzip.compress, zlib.compress))


@examples(10_000, 60)
@given(st.sampled_from(("gzip", "deflate", "br", "gzip, gzip")), st.sampled_from(PACKED).flatmap(broken))
def test_broken_compression(encoding, body):
    with allocating_at_most(4 * LIMIT_BYTES + 256 * KIB):
        try:
            data = inflate(body, encoding, LIMIT_BYTES)
        except (*DOCUMENTED, UnsupportedMediaTypeError):
            return
        assert len(data) <= LIMIT_BYTES
