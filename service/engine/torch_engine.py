"""PyTorch: the engine of CUDA devices. It runs on the CPU as well, there in float32.

On CUDA the slices are channels-last in half precision, features stay on the device between trunk and
body, and images cross over as bytes from pinned memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.checkpoint import Checkpoint
from models.cost import count_parameters
from models.export import FromPixels, fold_batch_norm
from models.transform import U8, normalise
from service.engine.base import F32, Exited, Feature, Image, TrunkResult

M = TypeVar("M", bound=nn.Module)


class TorchEngine:
    """All widths of one checkpoint as static modules on one device. device: "cpu", "cuda", "cuda:1"."""

    name = "torch"
    version = str(torch.__version__)

    def __init__(self, checkpoint: Checkpoint, workers: int, device: str) -> None:
        self.device, self.workers = device, workers
        if device == "cpu":
            torch.set_num_threads(1)  # of each call: there are as many callers as cores already
        else:
            self.version += f", {torch.cuda.get_device_name(device)}"
        self._dtype = torch.float16 if device.startswith("cuda") else torch.float32
        self._input, net = checkpoint.manifest.input, checkpoint.net
        narrowest = net.subnet(0)
        self._trunk = self._placed(narrowest.trunk)
        # Scale and shift stay in float32: half precision has 11 bits, and pixels use 8 of them already.
        self._normalise = FromPixels(nn.Identity(), self._input).to(device)
        self._gate = narrowest.slimming.float().cpu()  # its input comes back to the CPU anyway
        self.has_exit = net.has_exit
        bodies = {width: net.subnet(width).body for width in range(len(net.ladder))}
        self._bodies = {width: self._placed(body) for width, body in bodies.items() if body is not None}
        size = torch.finfo(self._dtype).bits // 8
        parts: dict[str, nn.Module] = {"trunk": self._trunk, "gate": self._gate} | {
            f"body {width}": body for width, body in self._bodies.items()
        }
        self.part_bytes: Mapping[str, int] = {part: size * count_parameters(module) for part, module in parts.items()}

    def _placed(self, module: M) -> M:
        placed = fold_batch_norm(module).to(self.device, self._dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cast(M, placed)

    @torch.inference_mode()
    def trunk(self, images: Sequence[Image]) -> TrunkResult:
        if all(image.dtype == np.uint8 for image in images):
            x_NCHW = self._normalise(self._moved(np.stack(images)))
        else:
            x_NCHW = self._moved(np.stack([self._normalised(image) for image in images]))
        features, gate_inputs = self._trunk(x_NCHW.to(self._dtype, memory_format=torch.channels_last))
        each, gate_inputs_NR = features.unbind(), _numpy(gate_inputs)
        return TrunkResult(list(map(Exited, each, gate_inputs_NR)) if self.has_exit else each, gate_inputs_NR)

    @torch.inference_mode()
    def gate(self, gate_inputs_NR: F32) -> F32:
        return _numpy(self._gate(torch.from_numpy(gate_inputs_NR)))

    @torch.inference_mode()
    def body(self, width: int, features: Sequence[Feature]) -> F32:
        if self.has_exit and width == 0:
            return np.stack([exited.logits_K for exited in features])
        each = [exited.feature for exited in features] if self.has_exit else list(features)
        stacked_NCHW = torch.stack(each).contiguous(memory_format=torch.channels_last)
        return _numpy(self._bodies[width](stacked_NCHW))

    def _moved(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self._dtype == torch.float16 else tensor

    def _normalised(self, image: Image) -> Image:
        return normalise(cast(U8, image), self._input) if image.dtype == np.uint8 else image


def _numpy(tensor: Tensor) -> F32:
    array: F32 = tensor.float().cpu().numpy()
    return array
