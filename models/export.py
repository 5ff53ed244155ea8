"""Static slices as ONNX graphs for any batch size, batch norms folded into the convolutions before.

The TorchScript exporter is used on purpose, deprecated or not: a service start-up exports a trunk,
one body per width and a gate head, and on one core of a small server it needs 0.05-0.2 s per
full-size graph where the ``dynamo=True`` exporter needs 1.5-3 s (torch 2.13, measured). What it
writes is checked against torch in tests/models/test_export.py, for every width.
"""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.supernet import Supernet
from models.transform import InputSpec

M = TypeVar("M", bound=nn.Module)

# The exporter keeps its settings in globals, and so does the filter that silences its deprecation.
_EXPORTER = threading.Lock()


def fold_batch_norm(module: M) -> M:
    """A copy in which every batch norm is part of the convolution right before it in a Sequential.

    ``module`` must be in eval mode. The copy computes the same up to rounding.
    """
    folded = copy.deepcopy(module)
    for sequence in [m for m in folded.modules() if isinstance(m, nn.Sequential)]:
        for index, (conv, norm) in enumerate(pairwise(list(sequence))):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                sequence[index] = fuse_conv_bn_eval(conv, norm)
                sequence[index + 1] = nn.Identity()
    return folded


def to_onnx(
    module: nn.Module, example_inputs: tuple[Tensor, ...], input_names: Sequence[str], output_names: Sequence[str]
) -> bytes:
    """A serialised ONNX graph whose first axis is free in every input and output. Thread-safe.

    ``example_inputs`` fix all other axes; ``module`` must be in eval mode.
    """
    inputs, outputs = list(input_names), list(output_names)
    graph = io.BytesIO()
    with _EXPORTER, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            module, example_inputs, graph,  # type: ignore[arg-type]  # this exporter writes to file objects
            input_names=inputs, output_names=outputs, dynamo=False,
            dynamic_axes={name: {0: "batch"} for name in [*inputs, *outputs]},
        )  # fmt: skip
    return graph.getvalue()


class FromPixels(nn.Module):
    """uint8 pixels [N, H, W, 3] -> what ``module`` makes of them normalised as ``transform.normalise`` does.

    Bytes in are a quarter of what floats would be, in every queue before the network.
    """

    scale_C11: Tensor
    shift_C11: Tensor

    def __init__(self, module: nn.Module, spec: InputSpec) -> None:
        super().__init__()
        self.module = module
        mean_C, std_C = (torch.tensor(values, dtype=torch.float32) for values in (spec.mean, spec.std))
        self.register_buffer("scale_C11", (1.0 / (255.0 * std_C))[:, None, None])
        self.register_buffer("shift_C11", (mean_C / std_C)[:, None, None])

    def forward(self, pixels_NHWC: Tensor) -> Any:
        return self.module(pixels_NHWC.permute(0, 3, 1, 2).float() * self.scale_C11 - self.shift_C11)


def export_subnet(net: Supernet, width: int) -> bytes:
    """One whole slice as one graph: ``pixels`` [N, 3, H, W], normalised float32 -> ``logits`` [N, K].

    Raises ValueError for a width outside the ladder.
    """
    if not 0 <= width < len(net.ladder):
        raise ValueError(f"width is {width}; allowed: 0..{len(net.ladder) - 1}")
    shape = net.input_shape
    pixels = torch.zeros(2, shape.channels, shape.height, shape.width)
    return to_onnx(fold_batch_norm(net.subnet(width)), (pixels,), ["pixels"], ["logits"])
