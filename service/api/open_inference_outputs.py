"""Predictions -> output tensors, parameters and class strings of the Open Inference Protocol. PURE.

Shapes: N images, K classes, G gate choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.api.open_inference_request import OUTPUTS
from service.api.open_inference_wire import F32, Output, Wanted
from service.errors import BadRequestError
from service.request import Prediction


def output_tensors(wanted: Sequence[Wanted], predictions: Sequence[Prediction], classes: Sequence[str]) -> list[Output]:
    """One tensor per wanted output, or the strings of its best classes.

    Raises BadRequestError when gate logits are wanted of an image whose width was known without the gate.
    """
    tensors = []
    for output in wanted:
        values = _values(output.name, predictions)
        if output.classes:
            texts = class_texts(values, classes, output.classes)
            shape = (len(predictions), len(texts) // len(predictions))
            tensors.append(Output(output.name, "BYTES", shape, texts, output.binary))
        else:
            tensors.append(Output(output.name, OUTPUTS[output.name], values.shape, values, output.binary))
    return tensors


def class_texts(scores_NK: F32, classes: Sequence[str], count: int) -> list[bytes]:
    """The ``count`` best classes of each image, best first, as ``score:index:label``, row by row; at most all."""
    texts = []
    for scores_K in scores_NK:
        best = np.argsort(-scores_K, kind="stable")[:count]
        texts += [f"{scores_K[index]:f}:{index}:{classes[index]}".encode() for index in best]
    return texts


def answer_parameters(headers: Mapping[str, str]) -> dict[str, str | int]:
    """Response headers as parameters: ``compute_madds`` for Compute-MAdds; whole numbers are numbers."""
    return {
        name.lower().replace("-", "_"): int(value) if value.isdigit() and name != "x-request-id" else value
        for name, value in headers.items()
    }


def _values(name: str, predictions: Sequence[Prediction]) -> NDArray[Any]:
    match name:
        case "logits":
            return np.stack([prediction.logits_K for prediction in predictions])
        case "probabilities":
            return np.stack([prediction.probabilities_K for prediction in predictions]).astype(np.float32)
        case "slice_width":
            return np.array([prediction.route.width for prediction in predictions], np.int32)
        case "madds":
            return np.array([prediction.madds for prediction in predictions], np.int64)
        case _:
            return np.stack([_gate_logits(prediction) for prediction in predictions])


def _gate_logits(prediction: Prediction) -> F32:
    logits_G: F32 | None = prediction.gate_logits_G
    if logits_G is None:
        raise BadRequestError("output gate_logits: the gate did not run, the policy in use knows widths without it")
    return logits_G
