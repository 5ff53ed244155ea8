"""Checkpoints published by DS-Net, as ours: a map from their names to views of our tensors.

Source: the format of changlin31/DS-Net, commit 15cd303 (838 keys for the ImageNet form): a
``torch.save`` dictionary whose ``state_dict`` may carry a leading ``module.``; one ``aux_bn`` per
width, of which the last alone owns the affine; 1x1 convolutions where we keep matrices.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from models.checkpoint import CheckpointError, Manifest, list_faults, require_new, save
from models.ds_mbnet import Block, DsMbnet, DsMbnetConfig
from models.gate import DoubleHeadedGate
from models.layers import SlicedBatchNorm2d, SlicedSqueezeExcite
from models.tensors import tensor_faults
from models.transform import InputSpec

# The evaluation transform of the published figures: bicubic, centre crop of 0.875.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_SHARE = 0.875


def import_dsnet(
    source: Path, out_dir: Path, config: DsMbnetConfig, classes: tuple[str, ...] | None = None, use_ema: bool = False
) -> Manifest:
    """Write a published ``.pth.tar`` as the version folder ``out_dir`` (``<root>/<name>/<version>``).

    classes  labels in the order of the logits; "0", "1", ... unless given.
    use_ema  take the moving average (``state_dict_ema``) instead of the raw weights.

    Only tensors and plain data are unpickled. Raises CheckpointError, and writes nothing, when the
    file holds anything else, lacks the weights, or its tensors are not those of ``config``: every
    missing, unexpected and misshapen key is named.
    """
    require_new(out_dir)
    key = "state_dict_ema" if use_ema else "state_dict"
    given = _read_state(source, key)
    net = DsMbnet(config)
    views = dict(published_views(net))
    if faults := tensor_faults(given, views):
        raise CheckpointError(list_faults(f"{source} does not fit the config", faults))
    for name, view in views.items():
        view.copy_(given[name])
    size = config.input_size
    return save(
        out_dir,
        net,
        classes=classes or tuple(map(str, range(config.classes))),
        input_spec=InputSpec(size, size, IMAGENET_MEAN, IMAGENET_STD, int(size / CROP_SHARE), "bicubic"),
        recipe={"imported_from": source.name, "weights": key},
    )


def _read_state(source: Path, key: str) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the training arguments
            data: Any = torch.load(source, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler meets foreign bytes and raises almost anything
        raise CheckpointError(f"{source} is not a file of tensors and plain data: {error}") from error
    holds = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
    state = data.get(key) if isinstance(data, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{source} has no {key!r} of tensors; it holds: {holds}")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def published_views(net: DsMbnet) -> Iterator[tuple[str, Tensor]]:
    """(published name, the view of our tensor that it fills), for every key of a published file.

    The counters of the norms, which nothing reads, get a tensor of their own.
    """
    yield "conv_stem.weight", net.stem.conv.weight.detach()
    yield from _norm("bn1", net.stem.norm)
    blocks = iter(net.blocks)
    for stage, config in enumerate(net.config.stages):
        for layer in range(config.layers):
            name = "first_block" if layer == 0 else f"residual_blocks.{layer - 1}"
            yield from _block(f"blocks.{stage}.{name}", cast(Block, next(blocks)))
    yield "classifier.weight", net.classifier.weight.detach()
    yield "classifier.bias", net.classifier.bias.detach()


def _block(name: str, block: Block) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.conv_dw.weight", block.spatial.conv.weight.detach()
    yield from _norm(f"{name}.bn1", block.spatial.norm)
    attention = block.spatial.attention
    if isinstance(attention, DoubleHeadedGate):
        yield f"{name}.gate.gate.0.weight", _as_convolution(attention.slimming.weight)
        attention = attention.attention
    attention = cast(SlicedSqueezeExcite, attention)
    yield f"{name}.gate.conv_reduce.weight", _as_convolution(attention.reduce_weight)
    yield f"{name}.gate.conv_reduce.bias", attention.reduce_bias.detach()
    yield f"{name}.gate.conv_expand.weight", _as_convolution(attention.expand_weight)
    yield f"{name}.gate.conv_expand.bias", attention.expand_bias.detach()
    yield f"{name}.conv_pw.weight", block.pointwise.conv.weight.detach()
    yield from _norm(f"{name}.bn2", block.pointwise.norm)


def _norm(name: str, norm: SlicedBatchNorm2d) -> Iterator[tuple[str, Tensor]]:
    for row, width in enumerate(norm.widths):
        yield f"{name}.aux_bn.{row}.running_mean", norm.running_mean[row, :width]
        yield f"{name}.aux_bn.{row}.running_var", norm.running_var[row, :width]
        yield f"{name}.aux_bn.{row}.num_batches_tracked", torch.zeros((), dtype=torch.int64)
    yield f"{name}.aux_bn.{len(norm.widths) - 1}.weight", norm.weight.detach()
    yield f"{name}.aux_bn.{len(norm.widths) - 1}.bias", norm.bias.detach()


def _as_convolution(matrix: Tensor) -> Tensor:
    return matrix.detach()[:, :, None, None]
