"""The wire format of the Open Inference Protocol: what is written is read, and no bytes do harm."""

import contextlib
import gzip
import json
import math
import tracemalloc
import zlib

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.api.open_inference_wire import (
    MAX_RANK,
    MAX_TENSORS,
    Call,
    Output,
    Tensor,
    Wanted,
    byte_values,
    float_values,
    inflate,
    json_length,
    parse_call,
    render,
)
from service.errors import BadRequestError, NotBuiltError, SlicewiseError, TooLargeError, UnsupportedMediaTypeError

LIMIT = 1_000_000
NAMES = st.text(st.characters(codec="utf-8"), max_size=20)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def request(inputs, binary=b"", **others):
    head = orjson.dumps({"inputs": inputs, **others})
    return parse_call(head + binary, len(head), LIMIT)


def entry(name, datatype, shape, size=None, data=None):
    parameters = {} if size is None else {"parameters": {"binary_data_size": size}}
    values = {} if data is None else {"data": data}
    return {"name": name, "datatype": datatype, "shape": shape, **parameters, **values}


def byte_tensor(elements):
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


@st.composite
def float_arrays(draw):
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=MAX_RANK - 3))
    values = draw(st.lists(FINITE, min_size=math.prod(shape), max_size=math.prod(shape)))
    return np.array(values, "<f4").reshape(shape)


@given(st.lists(float_arrays(), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_what_a_client_sends_is_read(arrays, binary, nested):
    def sent(index, array):
        shape = list(array.shape)
        if binary:
            return entry(f"t{index}", "FP32", shape, array.nbytes)
        return entry(f"t{index}", "FP32", shape, data=(array if nested else array.ravel()).tolist())

    behind = b"".join(array.tobytes() for array in arrays) if binary else b""
    call = request([sent(index, array) for index, array in enumerate(arrays)], behind)
    for tensor, array in zip(call.inputs, arrays, strict=True):
        np.testing.assert_array_equal(float_values(tensor), array)


@given(st.lists(st.binary(max_size=30), max_size=6))
def test_byte_elements_are_read_as_they_were_sent(elements):
    behind = byte_tensor(elements)
    (tensor,) = request([entry("image", "BYTES", [len(elements)], len(behind))], behind).inputs
    assert [bytes(value) for value in byte_values(tensor)] == elements


@given(NAMES, st.lists(float_arrays(), max_size=3), st.lists(st.text(max_size=9), max_size=4), st.booleans())
def test_what_is_answered_is_read_by_the_rules_of_the_protocol(identity, arrays, texts, binary):
    outputs = [Output(f"o{index}", "FP32", array.shape, array, binary) for index, array in enumerate(arrays)]
    outputs.append(Output("text", "BYTES", (len(texts),), [text.encode() for text in texts], binary))
    body, length = render({"id": identity}, outputs)
    assert (length is not None) is binary
    answer = json.loads(body[:length])
    assert answer["id"] == identity
    rest = body[length:] if binary else b""
    for told, output in zip(answer["outputs"], outputs, strict=True):
        assert (told["name"], told["datatype"], tuple(told["shape"])) == (output.name, output.datatype, output.shape)
        if not binary:
            got = told["data"]
        else:
            size = told["parameters"]["binary_data_size"]
            part, rest = rest[:size], rest[size:]
            if output.datatype == "FP32":
                got = np.frombuffer(part, "<f4")
            else:
                elements = byte_values(Tensor("text", "BYTES", output.shape, memoryview(part)))
                got = [bytes(element).decode() for element in elements]
        expected = output.values.ravel() if output.datatype == "FP32" else texts
        np.testing.assert_array_equal(np.asarray(got, getattr(expected, "dtype", None)), expected)
    assert rest == b""


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | NAMES,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(NAMES, values, max_size=3),
    max_leaves=6,
)
SIZES = st.integers(-2, 2**63 - 1) | st.integers(0, 60)


@st.composite
def nearly_requests(draw):
    """Requests with any of their values replaced by any other."""

    def maybe(strategy):
        return draw(strategy if draw(st.integers(0, 3)) else JSON_VALUES)

    inputs = [
        {
            "name": maybe(st.sampled_from(["image", "pixels"])),
            "datatype": maybe(st.sampled_from(["BYTES", "FP32"])),
            "shape": maybe(st.lists(SIZES, max_size=4)),
            draw(st.sampled_from(["parameters", "data", "x"])): maybe(
                st.fixed_dictionaries({"binary_data_size": SIZES})
            ),
        }
        for _ in range(draw(st.integers(0, 3)))
    ]
    document = {"inputs": maybe(st.just(inputs)), "outputs": maybe(st.just([]))}
    document |= draw(st.dictionaries(st.sampled_from(["id", "parameters"]), JSON_VALUES, max_size=2))
    head = orjson.dumps(document)
    length = len(head) + draw(st.just(0) | st.integers(-3, 3))
    return head + draw(st.binary(max_size=60)), draw(st.none() | st.just(length))


@given(st.tuples(st.binary(max_size=200), st.none() | st.integers(0, 300)) | nearly_requests())
@example((b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[9223372036854775807],"data":[]}]}', None))
@example((b"[" * 2000, None))
@example((b'{"inputs":' + b"[" * 900 + b"]" * 900 + b"}", None))
def test_no_bytes_do_more_than_raise_our_own_error(given_bytes):
    body, length = given_bytes
    try:
        call = parse_call(body, length, LIMIT)
    except (BadRequestError, NotBuiltError, TooLargeError):
        return
    for tensor in call.inputs:
        for read in (float_values, byte_values):
            try:
                values = read(tensor)
            except BadRequestError:
                continue
            assert np.size(values) == tensor.elements or len(values) == tensor.elements


@given(st.binary(max_size=200), st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
def test_binary_data_is_whole_or_refused(data, shape):
    tensor = Tensor("x", "BYTES", tuple(shape), memoryview(data))
    for read in (float_values, byte_values):
        try:
            values = read(tensor)
        except BadRequestError:
            continue
        assert len(values) == shape[0] if read is float_values else len(values) == tensor.elements


@pytest.mark.parametrize("shape", [[2**31, 2**31, 2**31], [10**12], [64, 3, 10**9, 10**9], [0, 2**62, 2**62]])
@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
def test_nothing_is_made_of_the_size_that_a_request_claims(shape, datatype):
    behind = b"\xff\xff\xff\xff" * 4
    head = orjson.dumps({"inputs": [entry("x", datatype, shape, len(behind))]})
    tracemalloc.start()
    try:
        (tensor,) = parse_call(head + behind, len(head), LIMIT).inputs
        with pytest.raises(BadRequestError):
            (float_values if datatype == "FP32" else byte_values)(tensor)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_tensors_are_views_of_the_body():
    behind = np.arange(250_000, dtype="<f4").tobytes()
    head = orjson.dumps({"inputs": [entry("x", "FP32", [250_000], len(behind))]})
    body = head + behind
    tracemalloc.start()
    try:
        (tensor,) = parse_call(body, len(head), LIMIT).inputs
        assert float_values(tensor)[-1] == 249_999
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("inputs", "behind", "words"),
    [
        ([entry("x", "FP32", [2], 9)], b"12345678", ["9 bytes", "8 bytes"]),
        ([entry("x", "FP32", [2], -1)], b"", ["-1", "at least 0"]),
        ([entry("x", "FP32", [2], 2**63)], b"", [str(2**63)]),
        ([entry("x", "FP32", [2], 1.5)], b"", ["1.5"]),
        ([entry("x", "FP32", [2], True)], b"", ["True"]),
        ([entry("x", "FP32", [2], 8)], b"123456789", ["9 bytes follow", "8 bytes"]),
        ([entry("x", "FP32", [2], 8, [1, 2])], b"12345678", ["both"]),
        ([entry("x", "FP32", [2])], b"", ["absent"]),
        ([entry("x", "FP32", [-2], 8)], b"12345678", ["-2"]),
        ([entry("x", "FP32", [], 4)], b"1234", ["1..8 integers"]),
        ([entry("x", "FP32", [1] * 9, 4)], b"1234", ["1..8 integers"]),
        ([entry("x", "FP32", "2", 8)], b"12345678", ["'2'"]),
        ([entry("x", "FP32", [True], 4)], b"1234", ["True"]),
        ([entry(3, "FP32", [1], 4)], b"1234", ["name is 3"]),
        ([entry("x", None, [1], 4)], b"1234", ["datatype is absent"]),
        ([entry("x", "FP32", [1], 4), entry("x", "FP32", [1], 4)], b"12341234", ["twice"]),
        ([entry(str(k), "FP32", [1], 0) for k in range(MAX_TENSORS + 1)], b"", [f"at most {MAX_TENSORS}"]),
        ({"x": 1}, b"", ["list"]),
        ([3], b"", ["objects"]),
        ([{"name": "x", "parameters": 3}], b"", ["parameters of input x is 3"]),
    ],
)
def test_lying_requests_are_refused_with_what_was_given_and_what_is_allowed(inputs, behind, words):
    with pytest.raises(BadRequestError) as caught:
        request(inputs, behind)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("behind", "shape", "words"),
    [
        (b"\x01\x00\x00", [1], ["cut off", "3 bytes are left"]),
        (b"\x05\x00\x00\x00abcd", [1], ["cut off", "8 bytes are left"]),
        (b"\xff\xff\xff\xffabcd", [1], ["cut off"]),
        (byte_tensor([b"a", b"b"]), [1], ["2 elements", "needs 1"]),
        (byte_tensor([b"a"]), [2], ["1 elements", "needs 2"]),
        (b"", [1], ["0 elements", "needs 1"]),
    ],
)
def test_truncated_elements(behind, shape, words):
    (tensor,) = request([entry("image", "BYTES", shape, len(behind))], behind).inputs
    with pytest.raises(BadRequestError) as caught:
        byte_values(tensor)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [[1, "2"], ["1", "2"], [True, False], [None, 1], [[1, 2], [3]], [[[1]], [[2]]], [1], [1, 2, 3], [{}, {}], []],
)
def test_json_data_that_does_not_fit_its_shape(data):
    (tensor,) = request([entry("x", "FP32", [2, 1], data=data)]).inputs
    with pytest.raises(BadRequestError, match="input x"):
        float_values(tensor)


def test_numbers_beyond_float32_become_infinite_without_a_warning():
    (tensor,) = request([entry("x", "FP32", [2], data=[1e300, -1e300])]).inputs
    assert np.isinf(float_values(tensor)).all()


@pytest.mark.parametrize("data", [[1], ["a", 2], [["a"]], [None]])
def test_json_elements_of_bytes_are_strings(data):
    (tensor,) = request([entry("image", "BYTES", [len(data)], data=data)]).inputs
    with pytest.raises(BadRequestError, match="list of strings"):
        byte_values(tensor)


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b"\xff", b'{"a":', b'{"inputs": NaN}', b"3"])
def test_what_is_not_a_json_object(body):
    with pytest.raises(BadRequestError, match="request"):
        parse_call(body, None, LIMIT)


def test_the_length_of_the_json_is_within_the_body_and_the_limit():
    with pytest.raises(BadRequestError, match=r"3 bytes; allowed: at most the body's 2 bytes"):
        parse_call(b"{}", 3, LIMIT)
    with pytest.raises(TooLargeError, match="send tensors as binary"):
        parse_call(b"{}" + b" " * 100, None, 100)
    with pytest.raises(BadRequestError, match="malformed JSON"):
        parse_call(b'{"inputs": []}', 5, LIMIT)


@pytest.mark.parametrize(
    "values", [[b"-1"], [b"+1"], [b"1.0"], [b""], [b"1", b"1"], [b"9" * 16], [b"0x1"], ["²".encode()]]
)
def test_malformed_lengths(values):
    with pytest.raises(BadRequestError, match="Inference-Header-Content-Length"):
        json_length(values)


def test_lengths():
    assert json_length([]) is None
    assert json_length([b" 12\t"]) == 12


def test_outputs_and_parameters_are_read():
    call = request(
        [], id="a", parameters={"binary_data_output": True, "mine": "x"},
        outputs=[
            {"name": "logits", "parameters": {"binary_data": False, "classification": 3}},
            {"name": "madds"},
        ],
    )  # fmt: skip
    assert call == Call(
        "a", {"binary_data_output": True, "mine": "x"}, (), (Wanted("logits", False, 3), Wanted("madds", True)), True
    )
    assert request([], outputs=[]).outputs is request([], outputs=None, parameters=None).outputs is None
    assert request([]).id is None


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"id": 3}, "id is 3"),
        ({"parameters": [1]}, "parameters of request"),
        ({"parameters": {"binary_data_output": 1}}, "binary_data_output is 1"),
        ({"outputs": [{"name": "a"}, {"name": "a"}]}, "twice"),
        ({"outputs": [{"name": "a", "parameters": {"classification": -1}}]}, "classification is -1"),
        ({"outputs": [{"name": "a", "parameters": {"classification": "3"}}]}, "classification is '3'"),
        ({"outputs": [{"name": "a", "parameters": {"binary_data": "yes"}}]}, "binary_data is 'yes'"),
        ({"outputs": [{}]}, "name is absent"),
    ],
)
def test_malformed_outputs_and_parameters(others, words):
    with pytest.raises(BadRequestError, match=words):
        request([], **others)


@pytest.mark.parametrize(
    "others",
    [
        {"parameters": {"sequence_id": 7}},
        {"outputs": [{"name": "a", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 4}}]},
    ],
)
def test_extensions_that_are_not_built_are_told_apart_from_mistakes(others):
    with pytest.raises(NotBuiltError, match="not built"):
        request([], **others)
    shared = entry("x", "FP32", [1]) | {"parameters": {"shared_memory_region": "r"}}
    with pytest.raises(NotBuiltError, match="shared memory"):
        request([shared])


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_bodies(encoding, compress):
    body = b"abc" * 1000
    packed = compress(body)
    assert inflate(packed, encoding, 3000) == body
    with pytest.raises(TooLargeError, match="2999 bytes"):
        inflate(packed, encoding, 2999)
    for broken in (packed[:-1], packed + b"x", b"", b"no"):
        with pytest.raises(BadRequestError, match=encoding):
            inflate(broken, encoding, 3000)
    with pytest.raises(UnsupportedMediaTypeError, match="br"):
        inflate(body, "br", 3000)


def test_a_bomb_is_not_unpacked():
    bomb = zlib.compress(bytes(200_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(TooLargeError):
            inflate(bomb, "deflate", 100_000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=100), st.sampled_from(["gzip", "deflate"]))
def test_no_compressed_bytes_do_more_than_raise_our_own_error(body, encoding):
    with contextlib.suppress(SlicewiseError):
        assert len(inflate(body, encoding, 1000)) <= 1000
