"""What a valid request of Slicewise promises beyond JSON Schema; loaded by schemathesis.

The generated requests that are to be accepted keep all that /openapi.json describes. Repaired is only what it
cannot describe: that texts and parts are images, that shapes count the elements of their data, that indices are
within the served ladder and its classes, and that two fields agree which the schema describes apart.
"""

import base64
import io
import json

import schemathesis
from PIL import Image

SLICES, CLASSES, SIZE, MOST_IMAGES = 4, 10, 16, 3
KINDS = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP", "image/bmp": "BMP", "image/gif": "GIF"}
LENGTH = "Inference-Header-Content-Length"


def picture(kind="image/png", colour=0):
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (colour % 256, 40, 90)).save(buffer, KINDS.get(kind, "PNG"))
    return buffer.getvalue()


def text_of_picture(colour):
    return base64.b64encode(picture(colour=colour)).decode()


@schemathesis.hook
def before_call(context, case, kwargs):
    if case.meta is None or not case.meta.generation.mode.is_positive or case.method != "POST":
        return
    path = case.operation.path
    if path.endswith("/load"):
        load(case)
    elif path.endswith("/infer"):
        case.headers = feasible(case.headers)
        infer(case)
    elif path.startswith("/v1/classify"):
        case.headers = feasible(case.headers)
        classify(case)


def feasible(headers):
    """Headers whose slice is one of the ladder's; of every two requests one keeps the rest of its budgets."""
    headers = dict(headers or {})
    if headers.get("Slice-Width", "").isdigit():
        headers["Slice-Width"] = str(int(headers["Slice-Width"]) % SLICES)
    if sum(map(len, headers.values())) % 2:
        for name in ("Compute-Budget", "Latency-Budget", "Accuracy-Floor"):
            headers.pop(name, None)
    return headers


def is_forced(headers):
    return bool(headers) and headers.get("Slice-Width", "auto") != "auto"


def classify(case):
    """An image where there are bytes, and as many classes as there are."""
    query = dict(case.query or {})
    if isinstance(query.get("top_k"), int):
        query["top_k"] = min(query["top_k"], CLASSES)
    case.query = query
    if case.media_type == "application/json":
        case.body = {"image": text_of_picture(len(case.body["image"]))}
    elif case.media_type == "multipart/form-data":
        parts = case.body["image"]
        many = isinstance(parts, list)
        case.body = {
            **case.body,
            "image": [picture(colour=k) for k in range(len(parts[:MOST_IMAGES]))] if many else picture(),
        }
    else:
        case.body = picture(case.media_type)
    if case.media_type != "application/json":
        keep_as_positive(case)


def keep_as_positive(case):
    """schemathesis takes a body with bytes in it, which it cannot validate, for one that breaks its schema."""
    case._record_starting_state()  # `case.meta` would look at the body first


def infer(case):
    """Data that the shape counts, and parts of the request that agree with each other."""
    headers = {name: value for name, value in (case.headers or {}).items() if name.lower() != LENGTH.lower()}
    if case.media_type == "application/octet-stream":
        head = json.dumps({"inputs": [binary_image(len(case.body))]}).encode()
        element = picture()
        case.body = head + len(element).to_bytes(4, "little") + element
        case.headers = headers | {LENGTH: str(len(head))}
        keep_as_positive(case)
        return
    body = dict(case.body)
    parameters = dict(body.get("parameters") or {})
    if len(parameters) % 2:
        for name in ("compute_budget", "latency_budget_ms", "accuracy_floor", "timeout"):
            parameters.pop(name, None)
    width = parameters.get("slice_width")
    if isinstance(width, int | float) or (isinstance(width, str) and width.isdigit()):
        parameters["slice_width"] = int(width) % SLICES
    if parameters.get("slice_width", "auto") != "auto":
        headers.pop("Slice-Width", None)
    body["parameters"] = parameters
    body["inputs"] = [fitting(body["inputs"][0])]
    if is_forced(headers) or parameters.get("slice_width", "auto") != "auto":
        body["outputs"] = [output for output in body.get("outputs") or [] if output["name"] != "gate_logits"]
    case.body, case.headers = body, headers


def binary_image(seed):
    size = 4 + len(picture())
    return {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}, "id": seed}


def fitting(tensor):
    if tensor["name"] == "image":
        images = [text_of_picture(k) for k in range(min(len(tensor["data"]), MOST_IMAGES))]
        return {**tensor, "shape": [len(images)], "data": images}
    given = next(number for number in flat(tensor["data"]))
    return {**tensor, "shape": [1, 3, SIZE, SIZE], "data": [given] * (3 * SIZE * SIZE)}


def flat(data):
    for part in data:
        if isinstance(part, list):
            yield from flat(part)
        else:
            yield part


def load(case):
    """A text, if there is one, that is a configuration."""
    parameters = case.body.get("parameters") if isinstance(case.body, dict) else None
    if parameters and parameters.get("config") is not None:
        version = len(parameters["config"]) % 2 + 1
        config = {"version_policy": {"specific": {"versions": [version]}}}
        case.body = {**case.body, "parameters": {**parameters, "config": json.dumps(config)}}
