"""The tensor file of a checkpoint: safetensors, in half precision wherever that loses nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as serialise_safetensors
from torch import Tensor, nn


@torch.no_grad()
def round_weights(net: nn.Module) -> None:
    """Round every weight with more than one dimension to the nearest half-precision number, in place.

    The parameters stay float32; their file is half as large. For networks whose statistics and figures
    are taken afterwards. Raises OverflowError for a weight beyond half precision's 65,504.
    """
    for name, weight in net.named_parameters():
        if weight.ndim > 1:
            rounded = weight.half()
            if not torch.equal(rounded.isinf(), weight.isinf()):
                raise OverflowError(f"{name} reaches {weight.abs().max():.3g}; half precision ends at 65,504")
            weight.copy_(rounded)


def _smallest(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float32 and torch.equal(tensor.half().float(), tensor):
        return tensor.half()
    return tensor


def serialise_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file; a float32 tensor whose values are all half-precision numbers is stored as such."""
    return serialise_safetensors({name: _smallest(tensor.cpu().contiguous()) for name, tensor in tensors.items()})


def parse_tensors(data: bytes, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, those in half precision widened, exactly, where float32 is expected.

    Raises SafetensorError, ValueError or KeyError for a file that cannot be read.
    """

    def widened(name: str, tensor: Tensor) -> Tensor:
        is_narrow = tensor.dtype == torch.float16 and name in expected and expected[name].dtype == torch.float32
        return tensor.float() if is_narrow else tensor

    return {name: widened(name, tensor) for name, tensor in parse_safetensors(data).items()}


def tensor_faults(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``given`` from being loaded where ``expected`` stands: names, shapes and dtypes."""
    faults = [f"missing {name}" for name in expected if name not in given]
    faults += [f"unexpected {name}" for name in given if name not in expected]
    for name in expected.keys() & given.keys():
        ours, theirs = expected[name], given[name]
        if ours.shape != theirs.shape:
            faults.append(f"{name} has shape {list(theirs.shape)}, expected {list(ours.shape)}")
        elif ours.dtype != theirs.dtype:
            faults.append(f"{name} has dtype {theirs.dtype}, expected {ours.dtype}")
    return sorted(faults)
