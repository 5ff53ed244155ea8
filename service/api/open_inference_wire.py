"""Open Inference Protocol v2 on the wire: JSON with binary tensors behind it, both ways. PURE.

A body is a JSON object, and behind it the data of the inputs that state ``binary_data_size``, in their
order. Every length is compared with the bytes that are there before anything of that length is made:
tensors are views of the body, and what is built from JSON is bounded by the JSON's own size.

FP32 data is little-endian and row-major; an element of BYTES is its length in 4 little-endian bytes, then
its bytes. Shapes have at most ``MAX_RANK`` axes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.errors import BadRequestError, NotBuiltError, TooLargeError, UnsupportedMediaTypeError

F32 = NDArray[np.float32]
Parameters = Mapping[str, Any]

MAX_RANK = 8
MAX_TENSORS = 16
"""Inputs, and outputs, of one request: no model here has as many."""
_LENGTH_BYTES = 4
_LENGTH_DIGITS = 15
MOST_LENGTH = 10**_LENGTH_DIGITS - 1
"""Largest Inference-Header-Content-Length that is read as a number."""
_MOST_FLOAT = 2.0**64
_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_NUMBERS = {int, float}  # bool is a type of its own, and no number here


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input as it was sent. data: a view of the body, or the JSON value of ``data``."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: memoryview | list[Any]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One requested output. classes: how many best ones instead of the values; 0 = the values."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """One inference request; its tensors are not compared with any model yet.

    outputs  None when all the default ones are wanted. binary_outputs: whether those are binary.
    """

    id: str | None
    parameters: Parameters
    inputs: tuple[Tensor, ...]
    outputs: tuple[Wanted, ...] | None
    binary_outputs: bool


@dataclass(frozen=True, slots=True)
class Output:
    """One output tensor: an array of numbers, or for BYTES the elements in row-major order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: NDArray[Any] | Sequence[bytes]
    binary: bool


def json_length(values: Sequence[bytes]) -> int | None:
    """The length of the JSON part, from the values of Inference-Header-Content-Length; None when it is absent."""
    if not values:
        return None
    text = values[0].strip(b" \t")
    if len(values) > 1 or not text.isdigit() or len(text) > _LENGTH_DIGITS:
        raise BadRequestError(
            f"Inference-Header-Content-Length is {b', '.join(values)[:64]!r}; allowed: once, the number of bytes of "
            "JSON at the start of the body"
        )
    return int(text)


def inflate(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    """The body without its Content-Encoding, gzip or deflate (zlib's format).

    Raises TooLargeError as soon as more than ``limit_bytes`` come out, and UnsupportedMediaTypeError.
    """
    if encoding not in _WINDOW_BITS:
        raise UnsupportedMediaTypeError(f"Content-Encoding is {encoding!r:.64}; allowed: gzip, deflate, identity")
    stream = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        data = stream.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise BadRequestError(f"body of {len(body)} bytes is not {encoding}: {error}") from error
    if len(data) > limit_bytes:
        raise TooLargeError(f"body is over {limit_bytes} bytes when inflated; allowed: at most {limit_bytes} bytes")
    if not stream.eof or stream.unused_data:
        raise BadRequestError(f"body of {len(body)} bytes is not one whole {encoding} stream")
    return data


def parse_call(body: bytes, json_bytes: int | None, limit_bytes: int) -> Call:
    """The request in ``body``, whose first ``json_bytes`` are JSON; None = all of it.

    limit_bytes  of JSON: parsed, it takes up to 30 times its size.

    Raises BadRequestError, TooLargeError, and NotBuiltError for shared memory and sequences.
    """
    length = len(body) if json_bytes is None else json_bytes
    if length > len(body):
        raise BadRequestError(
            f"Inference-Header-Content-Length is {length} bytes; allowed: at most the body's {len(body)} bytes"
        )
    if length > limit_bytes:
        raise TooLargeError(f"JSON is {length} bytes; allowed: at most {limit_bytes} bytes, send tensors as binary")
    view = memoryview(body)
    document = parse_object(view[:length], "request")
    parameters = _parameters(document, "request")
    if parameters.get("sequence_id"):
        raise NotBuiltError("parameter sequence_id: the sequence extension is not built; allowed: single requests")
    binary_outputs = _flag(parameters, "binary_data_output", False)
    return Call(
        id=_identity(document),
        parameters=parameters,
        inputs=_inputs(document, view[length:]),
        outputs=_outputs(document, binary_outputs),
        binary_outputs=binary_outputs,
    )


def parse_object(data: bytes | memoryview, what: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"{what} of {len(data)} bytes is malformed JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRequestError(f"{what} is JSON of type {_kind(value)}; allowed: an object")
    return value


def float_values(tensor: Tensor) -> F32:
    """FP32 [shape]: a read-only view of the body, or made from JSON numbers, nested as the shape or flat."""
    count = tensor.elements
    if not count:  # the other axes could be of any size then
        raise BadRequestError(f"input {tensor.name} has shape {list(tensor.shape)}; allowed: at least 1 element")
    if isinstance(tensor.data, memoryview):
        if len(tensor.data) != 4 * count:
            raise BadRequestError(
                f"input {tensor.name} has {len(tensor.data)} bytes of FP32 data; its shape {list(tensor.shape)} "
                f"needs {4 * count} bytes"
            )
        return np.frombuffer(tensor.data, "<f4").reshape(tensor.shape)
    numbers: list[float] = []
    _flatten(tensor, tensor.data, numbers, 1)
    _check_count(tensor, len(numbers))
    with np.errstate(over="ignore"):  # becomes inf, which whoever wants finite numbers refuses
        return np.asarray(numbers, np.float64).astype(np.float32).reshape(tensor.shape)


def byte_values(tensor: Tensor) -> list[memoryview | str]:
    """The elements of a BYTES tensor in row-major order: views of the body, or the strings of flat JSON data.

    The caller bounds the tensor's elements: each costs some 200 bytes, also an empty one.
    """
    if not isinstance(tensor.data, memoryview):
        if not set(map(type, tensor.data)) <= {str}:
            raise BadRequestError(f"input {tensor.name}: data of BYTES in JSON must be a flat list of strings")
        _check_count(tensor, len(tensor.data))
        return list(tensor.data)
    elements: list[memoryview | str] = []
    rest = tensor.data
    while len(rest):
        size = int.from_bytes(rest[:_LENGTH_BYTES], "little")
        if len(rest) < _LENGTH_BYTES or size > len(rest) - _LENGTH_BYTES:
            raise BadRequestError(
                f"input {tensor.name}: element {len(elements)} is cut off, {len(rest)} bytes are left; an element is "
                "its length in 4 little-endian bytes, then its bytes"
            )
        if len(elements) == tensor.elements:
            _check_count(tensor, len(elements) + 1)
        elements.append(rest[_LENGTH_BYTES : _LENGTH_BYTES + size])
        rest = rest[_LENGTH_BYTES + size :]
    _check_count(tensor, len(elements))
    return elements


def render(answer: Mapping[str, Any], outputs: Sequence[Output]) -> tuple[bytes, int | None]:
    """The body of an answer and the length of its JSON part; None when all of it is JSON.

    answer  what stands beside ``outputs`` in the JSON.
    """
    rendered, buffers = [], []
    for output in outputs:
        entry: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if output.binary:
            buffer = _binary(output)
            entry["parameters"] = {"binary_data_size": len(buffer)}
            buffers.append(buffer)
        else:
            entry["data"] = _json_data(output)
        rendered.append(entry)
    head = orjson.dumps({**answer, "outputs": rendered}, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join((head, *buffers)), len(head) if buffers else None


def _binary(output: Output) -> bytes:
    if isinstance(output.values, np.ndarray):
        return output.values.astype(output.values.dtype.newbyteorder("<"), copy=False).tobytes()
    return b"".join(len(value).to_bytes(_LENGTH_BYTES, "little") + value for value in output.values)


def _json_data(output: Output) -> Any:
    if isinstance(output.values, np.ndarray):
        return np.ascontiguousarray(output.values).reshape(-1)
    return [value.decode() for value in output.values]


def _inputs(document: Mapping[str, Any], rest: memoryview) -> tuple[Tensor, ...]:
    """The inputs, each with its own part of the binary data, of which nothing may be left."""
    given = rest.nbytes
    tensors: list[Tensor] = []
    for entry in _objects(document, "inputs"):
        tensor, rest = _input(entry, rest)
        if any(tensor.name == other.name for other in tensors):
            raise BadRequestError(f"input {tensor.name} is given twice")
        tensors.append(tensor)
    if len(rest):
        raise BadRequestError(
            f"{given} bytes follow the JSON; allowed: the {given - len(rest)} bytes that binary_data_size of the "
            "inputs adds up to"
        )
    return tuple(tensors)


def _input(entry: Mapping[str, Any], rest: memoryview) -> tuple[Tensor, memoryview]:
    name = _text(entry, "name", "input")
    where = f"input {name}"
    parameters = _parameters(entry, where)
    _refuse_shared_memory(parameters, where)
    data: Any = entry.get("data")
    if "binary_data_size" in parameters:
        if data is not None:
            raise BadRequestError(f"{where} has both data and binary_data_size; allowed: one of them")
        size = _natural(parameters["binary_data_size"], f"{where}: binary_data_size")
        if size > len(rest):
            raise BadRequestError(f"{where}: binary_data_size is {size} bytes; {len(rest)} bytes are left in the body")
        data, rest = rest[:size], rest[size:]
    elif not isinstance(data, list):
        raise BadRequestError(f"{where}: data is {_kind(data)}; allowed: a list, or binary_data_size in its parameters")
    return Tensor(name, _text(entry, "datatype", where), _shape(entry, where), data), rest


def _shape(entry: Mapping[str, Any], where: str) -> tuple[int, ...]:
    shape = entry.get("shape")
    if not isinstance(shape, list) or not 1 <= len(shape) <= MAX_RANK:
        raise BadRequestError(f"{where}: shape is {_shown(shape)}; allowed: a list of 1..{MAX_RANK} integers")
    return tuple(_natural(size, f"{where}: shape") for size in shape)


def _outputs(document: Mapping[str, Any], binary: bool) -> tuple[Wanted, ...] | None:
    """The requested outputs; an empty list asks for the default ones, as an absent one does."""
    wanted: list[Wanted] = []
    for entry in _objects(document, "outputs"):
        name = _text(entry, "name", "output")
        where = f"output {name}"
        parameters = _parameters(entry, where)
        _refuse_shared_memory(parameters, where)
        if any(name == other.name for other in wanted):
            raise BadRequestError(f"{where} is asked for twice")
        classes = _natural(parameters.get("classification", 0), f"{where}: classification")
        wanted.append(Wanted(name, _flag(parameters, "binary_data", binary), classes))
    return tuple(wanted) or None


def _objects(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = document.get(key)
    if entries is None:
        return []
    if not isinstance(entries, list) or not set(map(type, entries)) <= {dict} or len(entries) > MAX_TENSORS:
        raise BadRequestError(f"{key} is {_shown(entries)}; allowed: a list of at most {MAX_TENSORS} objects")
    return entries


def _parameters(entry: Mapping[str, Any], where: str) -> Parameters:
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise BadRequestError(f"parameters of {where} is {_shown(parameters)}; allowed: an object")
    return parameters


def _identity(document: Mapping[str, Any]) -> str | None:
    identity = document.get("id")
    if identity is not None and not isinstance(identity, str):
        raise BadRequestError(f"id is {_shown(identity)}; allowed: a string")
    return identity


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise BadRequestError(f"{where}: {key} is {_shown(value)}; allowed: a string")
    return value[:256]


def _flag(parameters: Parameters, key: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise BadRequestError(f"parameter {key} is {_shown(value)}; allowed: true or false")
    return value


def whole(value: Any) -> int | None:
    """A JSON value as the integer of at least 0 that it is, or None. 3.0 is one: JSON has a single kind of number."""
    if type(value) is float and value.is_integer() and value < _MOST_FLOAT:
        value = int(value)
    return value if type(value) is int and value >= 0 else None


def _natural(value: Any, what: str) -> int:
    number = whole(value)
    if number is None:
        raise BadRequestError(f"{what} is {_shown(value)}; allowed: an integer of at least 0")
    return number


def _refuse_shared_memory(parameters: Parameters, where: str) -> None:
    if "shared_memory_region" in parameters:
        raise NotBuiltError(f"{where}: shared memory is not built; allowed: data in JSON or binary data")


def _flatten(tensor: Tensor, data: list[Any], numbers: list[float], depth: int) -> None:
    """Append the numbers of ``data``, which lies ``depth`` lists deep; never more than the shape holds."""
    kinds = set(map(type, data))
    if kinds <= _NUMBERS:
        if len(numbers) + len(data) > tensor.elements:
            _check_count(tensor, len(numbers) + len(data))
        numbers.extend(data)
    elif kinds == {list} and depth < len(tensor.shape):
        for part in data:
            _flatten(tensor, part, numbers, depth + 1)
    else:
        raise BadRequestError(
            f"input {tensor.name}: data must be numbers, in one list or nested as its shape {list(tensor.shape)}"
        )


def _check_count(tensor: Tensor, count: int) -> None:
    if count != tensor.elements:
        raise BadRequestError(
            f"input {tensor.name} has {count} elements; its shape {list(tensor.shape)} needs {tensor.elements}"
        )


def _kind(value: Any) -> str:
    return "absent" if value is None else type(value).__name__


def _shown(value: Any) -> str:
    """A JSON value as an error shows it: its type alone where its text has no bound."""
    if isinstance(value, dict | list):
        return f"{_kind(value)} of length {len(value)}"
    return "absent" if value is None else repr(value[:64] if isinstance(value, str) else value)
