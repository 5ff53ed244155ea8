"""An inference request against a model: images, budgets, outputs, and what is answered."""

import base64
import contextlib
from fractions import Fraction

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.open_inference_outputs import answer_parameters, class_texts, output_tensors
from service.api.open_inference_request import (
    DEFAULT_OUTPUTS,
    OUTPUTS,
    InputShape,
    images_of,
    merged_budget,
    wanted_outputs,
)
from service.api.open_inference_wire import Call, Tensor, Wanted, parse_call
from service.errors import BadRequestError, TooLargeError
from service.request import Budget, Prediction, Reason, Route, Timings

ALLOWED = InputShape(2, 4, 3)
PLAIN = Budget()


def pixels(images=1, value=0.5):
    return np.full((images, 3, 2, 4), value, "<f4")


def call(*tensors, outputs=None, binary=False):
    return Call(None, {}, tensors, outputs, binary)


def pixel_tensor(array):
    return Tensor("pixels", "FP32", array.shape, memoryview(array.tobytes()))


def test_pixels_come_out_as_one_array_per_image():
    sent = np.arange(48, dtype="<f4").reshape(2, 3, 2, 4)
    images = images_of(call(pixel_tensor(sent)), ALLOWED)
    assert len(images) == 2
    for image, expected in zip(images, sent, strict=True):
        np.testing.assert_array_equal(image, expected)


def test_images_come_out_as_bytes_also_from_base64_in_json():
    behind = b"\x02\x00\x00\x00ab\x00\x00\x00\x00"
    assert images_of(call(Tensor("image", "BYTES", (2,), memoryview(behind))), ALLOWED) == [b"ab", b""]
    text = base64.b64encode(b"\xff\xd8").decode()
    assert images_of(call(Tensor("image", "BYTES", (1,), [text])), ALLOWED) == [b"\xff\xd8"]
    for bad in ("*", "YQ", "é", "YQ==\n"):
        with pytest.raises(BadRequestError, match="element 0, is not base64"):
            images_of(call(Tensor("image", "BYTES", (1,), [bad])), ALLOWED)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([], ["0 inputs", "exactly one", "image BYTES [N] or pixels FP32 [N, 3, 2, 4]"]),
        ([pixel_tensor(pixels()), Tensor("image", "BYTES", (1,), [])], ["2 inputs (pixels, image)"]),
        ([Tensor("picture", "BYTES", (1,), [])], ["'picture' is unknown"]),
        ([Tensor("image", "FP32", (1,), [])], ["FP32 [1]", "image BYTES [N]"]),
        ([Tensor("image", "BYTES", (1, 1), [])], ["BYTES [1, 1]"]),
        ([Tensor("pixels", "FP16", (1, 3, 2, 4), [])], ["FP16 [1, 3, 2, 4]"]),
        ([Tensor("pixels", "FP32", (3, 2, 4), [])], ["FP32 [3, 2, 4]"]),
        ([Tensor("pixels", "FP32", (1, 3, 4, 2), [])], ["FP32 [1, 3, 4, 2]"]),
        ([Tensor("pixels", "FP32", (0, 3, 2, 4), [])], ["[0, 3, 2, 4]", "at least 1 image"]),
        ([Tensor("image", "BYTES", (0,), [])], ["at least 1 image"]),
        ([pixel_tensor(pixels(value=np.nan))], ["image 0", "nan", "finite", "-1000..1000"]),
        ([pixel_tensor(pixels(value=np.inf))], ["inf"]),
        ([pixel_tensor(np.concatenate([pixels(), pixels(value=-1001)]))], ["image 1", "-1001"]),
    ],
)
def test_inputs_that_the_model_does_not_take(tensors, words):
    with pytest.raises(BadRequestError) as caught:
        images_of(call(*tensors), ALLOWED)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("shape", [(4, 3, 2, 4), (2**62, 3, 2, 4)])
def test_too_many_images_are_refused_before_their_data_is_looked_at(shape):
    with pytest.raises(TooLargeError, match="at most 3 images"):
        images_of(call(Tensor("pixels", "FP32", shape, memoryview(b""))), ALLOWED)


@given(st.binary(max_size=80), st.sampled_from(["image", "pixels"]), st.lists(st.integers(0, 4), max_size=4))
def test_no_tensor_does_more_than_raise_our_own_error(data, name, shape):
    tensor = Tensor(name, "BYTES" if name == "image" else "FP32", (*shape, 3, 2, 4), memoryview(data))
    for given_tensor in (tensor, Tensor(tensor.name, tensor.datatype, tuple(shape) or (1,), tensor.data)):
        try:
            assert len(images_of(call(given_tensor), ALLOWED)) == given_tensor.shape[0]
        except (BadRequestError, TooLargeError):
            continue


@pytest.mark.parametrize(
    ("parameters", "budget"),
    [
        ({}, PLAIN),
        ({"compute_budget": 5_000_000}, Budget(compute_madds=5_000_000)),
        ({"compute_budget": "5M"}, Budget(compute_madds=5_000_000)),
        ({"compute_budget": 5e6}, Budget(compute_madds=5_000_000)),
        ({"compute_budget": "40%"}, Budget(compute_share=Fraction(2, 5))),
        ({"latency_budget_ms": 25}, Budget(latency_s=0.025)),
        ({"latency_budget_ms": 0.00001}, Budget(latency_s=1e-8)),
        ({"timeout": 30_000}, Budget(latency_s=0.03)),
        ({"timeout": 0}, PLAIN),
        ({"timeout": 30_000, "latency_budget_ms": 25}, Budget(latency_s=0.025)),
        ({"timeout": 2**63}, Budget(latency_s=3600)),
        ({"accuracy_floor": 0.9}, Budget(accuracy_floor=Fraction(9, 10))),
        ({"accuracy_floor": "90%"}, Budget(accuracy_floor=Fraction(9, 10))),
        ({"slice_width": 2}, Budget(forced=2)),
        ({"slice_width": 2.0}, Budget(forced=2)),
        ({"timeout": 30_000.0, "priority": 1.0}, Budget(latency_s=0.03, urgency=0)),
        ({"compute_budget": 1e-300, "latency_budget_ms": 1e300}, Budget(compute_madds=0, latency_s=3600)),
        ({"slice_width": "widest"}, Budget(forced="widest")),
        ({"slice_width": "auto"}, PLAIN),
        ({"priority": 0}, PLAIN),
        ({"priority": 1}, Budget(urgency=0)),
        ({"priority": 8}, Budget(urgency=7)),
        ({"priority": 2**40}, Budget(urgency=7)),
        ({"mine": "x", "binary_data_output": True}, PLAIN),
    ],
)
def test_parameters_mean_what_the_headers_mean(parameters, budget):
    assert merged_budget(PLAIN, parameters, 3) == budget


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("compute_budget", 0),
        ("compute_budget", -1),
        ("compute_budget", "101%"),
        ("compute_budget", True),
        ("compute_budget", float("inf")),
        ("compute_budget", None),
        ("compute_budget", "1" * 65),
        ("compute_budget", "\uff11"),
        ("latency_budget_ms", "25ms"),
        ("latency_budget_ms", 0),
        ("accuracy_floor", 1.1),
        ("accuracy_floor", [0.9]),
        ("slice_width", -1),
        ("slice_width", 1.5),
        ("slice_width", "wide"),
        ("timeout", -1),
        ("timeout", 1.5),
        ("timeout", "1"),
        ("priority", -1),
        ("priority", True),
    ],
)
def test_malformed_parameters_are_named(name, value):
    with pytest.raises(BadRequestError, match=name):
        merged_budget(PLAIN, {name: value}, 3)


def test_of_two_budgets_the_stricter_holds():
    header = Budget(1000, Fraction(1, 2), 0.5, Fraction(1, 2), None, 5)
    looser = {"compute_budget": 2000, "latency_budget_ms": 600, "timeout": 700_000, "accuracy_floor": 0.4}
    assert merged_budget(header, looser, 3) == header
    stricter = {
        "compute_budget": 500,
        "latency_budget_ms": 400,
        "timeout": 300_000,
        "accuracy_floor": 0.6,
        "priority": 2,
    }
    assert merged_budget(header, stricter | {"priority": 2}, 3) == Budget(
        500, Fraction(1, 2), 0.3, Fraction(3, 5), None, 1
    )
    assert merged_budget(header, {"compute_budget": "25%"}, 3).compute_share == Fraction(1, 4)


@pytest.mark.parametrize(
    ("header", "parameter"), [(3, "widest"), ("narrowest", 0), (2, 2), ("widest", "widest"), (2, "auto")]
)
def test_the_same_slice_may_be_forced_twice(header, parameter):
    assert merged_budget(Budget(forced=header), {"slice_width": parameter}, 3).forced == header
    with pytest.raises(BadRequestError, match="Slice-Width"):
        merged_budget(Budget(forced=header), {"slice_width": 1}, 3)


def test_outputs():
    assert wanted_outputs(call(binary=True), False) == tuple(Wanted(name, True) for name in DEFAULT_OUTPUTS)
    named = (Wanted("madds", False), Wanted("logits", True, 2))
    assert wanted_outputs(call(outputs=named), False) == named
    for bad, forced, words in (
        (Wanted("labels", True), False, "'labels' is unknown; allowed: logits"),
        (Wanted("madds", True, 3), False, "classification of output madds"),
        (Wanted("gate_logits", True), True, "forced slice"),
    ):
        with pytest.raises(BadRequestError, match=words):
            wanted_outputs(call(outputs=(bad,)), forced)


def prediction(width, gate=(0.0, 1.0)):
    logits_K = np.array([0.5, 2, 2, -1], np.float32) + width
    probabilities_K = np.exp(logits_K.astype(np.float64)) / np.exp(logits_K.astype(np.float64)).sum()
    gate_logits_G = None if gate is None else np.array(gate, np.float32)
    route = Route(width, Reason.GATE, None if gate is None else width)
    return Prediction((1,), (0.4,), route, 100 + width, Timings(), logits_K, probabilities_K, gate_logits_G)


def test_tensors_have_the_datatypes_and_shapes_that_the_metadata_states():
    wanted = [Wanted(name, False) for name in OUTPUTS]
    tensors = output_tensors(wanted, [prediction(0), prediction(2)], "abcd")
    kinds = {"FP32": np.float32, "INT32": np.int32, "INT64": np.int64}
    for tensor in tensors:
        assert tensor.datatype == OUTPUTS[tensor.name]
        assert tensor.values.dtype == kinds[tensor.datatype]
        assert tensor.values.shape == tensor.shape
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    assert shapes == {
        "logits": (2, 4),
        "probabilities": (2, 4),
        "slice_width": (2,),
        "gate_logits": (2, 2),
        "madds": (2,),
    }
    with pytest.raises(BadRequestError, match="gate did not run"):
        output_tensors([Wanted("gate_logits", False)], [prediction(0), prediction(1, None)], "abcd")


def test_classes_are_strings_of_score_index_and_label_best_first():
    texts = class_texts(np.array([[0.5, 2, 2, -1], [1, 0, 0, 0]], np.float32), ["a", "b", "c:d", "ü"], 3)
    assert texts[:3] == [b"2.000000:1:b", b"2.000000:2:c:d", b"0.500000:0:a"]
    assert texts[3] == b"1.000000:0:a"
    (tensor,) = output_tensors([Wanted("logits", True, 9)], [prediction(0), prediction(1)], "abcd")
    assert (tensor.datatype, tensor.shape, len(tensor.values)) == ("BYTES", (2, 4), 8)


def test_parameters_repeat_headers():
    headers = {"slice-width": "2", "Slice-Gate-Width": "none", "compute-madds": "10", "x-request-id": "007"}
    assert answer_parameters(headers) == {
        "slice_width": 2, "slice_gate_width": "none", "compute_madds": 10, "x_request_id": "007",
    }  # fmt: skip


PARAMETER_NAMES = ["compute_budget", "latency_budget_ms", "accuracy_floor", "slice_width", "timeout", "priority"]
TEXTS = st.text(st.characters(codec="utf-8"))
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXTS


@given(st.dictionaries(st.sampled_from(PARAMETER_NAMES), SCALARS | st.lists(SCALARS, max_size=2)))
def test_no_parameters_do_more_than_raise_our_own_error(parameters):
    sent = orjson.loads(orjson.dumps({"inputs": [], "parameters": parameters}))
    with contextlib.suppress(BadRequestError):
        assert isinstance(merged_budget(PLAIN, parse_call(orjson.dumps(sent), None, 10**6).parameters, 3), Budget)
