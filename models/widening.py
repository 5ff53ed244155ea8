"""A DS-ResNet made wider without changing what it answers (Chen et al. 2016, "Net2Net", arXiv 1511.05641, section 2.3).

Every channel is there ``factor`` times, one copy beside the other, and whoever reads channels reads each copy with a
``factor``-th of the weight. Copies stand together, so the leading channels of the wider network are the copies of the
leading channels of the narrow one, and every slice answers as before, but for rounding. It costs about ``factor``
squared times as much. Net2Net begins training with that; it also tells what a network of that size would cost to
serve, with answers that are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint import Checkpoint, GateRecord, Manifest, Measured, save
from models.ds_resnet import DsResnet, DsResnetConfig
from models.stages import StageConfig

TOLERANCE = 1e-3
"""Of logits, where the sums of a wider network round otherwise."""


def widen(folder: Path, checkpoint: Checkpoint, factor: int) -> Manifest:
    """Write the widened network to the new version folder ``folder``; returns its manifest.

    Its accuracies and its gate are the checkpoint's, since it answers alike; that is tried on 16 images of noise at
    every width. The costs of the gate are counted anew from its shares of the hold-out. Raises ValueError for another
    architecture or a factor below 2, FloatingPointError where the answers differ, CheckpointError as ``save`` does.
    """
    source = checkpoint.manifest
    if not isinstance(checkpoint.net, DsResnet):
        raise ValueError(f"{source.name}/{source.version} is a {source.architecture}; what can be widened: ds_resnet")
    net = widened(checkpoint.net, factor)
    _require_alike(checkpoint.net, net)
    costs = [cost.served_madds for cost in net.costs()]
    recipe = {"widened_by": factor, "from": f"{source.name}/{source.version}", "from_digest": source.digest}
    return save(
        folder, net,
        classes=source.classes, input_spec=source.input, accuracy=[record.accuracy for record in source.slices],
        gate=_with_costs(source.gate, costs), dataset=source.dataset, recipe=(source.recipe or {}) | recipe,
    )  # fmt: skip


def widened(net: DsResnet, factor: int) -> DsResnet:
    """A copy with ``factor`` times the channels, in eval mode; ValueError for a factor below 2."""
    if factor < 2:
        raise ValueError(f"factor is {factor}; it must be at least 2")
    wide = DsResnet(_wide_config(net.config, factor))
    shapes, given = wide.state_dict(), net.state_dict()
    wide.load_state_dict({name: _copied(name, given[name], shapes[name].shape) for name in shapes})
    return wide.eval()


def _wide_config(config: DsResnetConfig, factor: int) -> DsResnetConfig:
    def wide(stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        return tuple(replace(stage, widths=tuple(w * factor for w in stage.widths)) for stage in stages)

    return replace(
        config, stem_width=config.stem_width * factor, gate_features=config.gate_features * factor,
        trunk=wide(config.trunk), body=wide(config.body), exit_stages=wide(config.exit_stages),
    )  # fmt: skip


def _copied(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """``tensor`` in the ``shape`` of the wider network; weights that read channels share among their copies."""
    reads = name.endswith(".weight") and tensor.ndim > 1
    for dim, (size, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
        if size != wanted:
            tensor = tensor.repeat_interleave(wanted // size, dim)
            if dim == 1 and reads:
                tensor = tensor * (size / wanted)
    return tensor


@torch.no_grad()
def _require_alike(net: DsResnet, wide: DsResnet) -> None:
    size = net.config.input_size
    x_BCHW = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(0))
    for width in range(len(net.ladder)):
        difference = float((net(x_BCHW, width) - wide(x_BCHW, width)).abs().max())
        if not difference <= TOLERANCE:
            raise FloatingPointError(f"logits of slice {width} differ by {difference:.2g}; allowed: {TOLERANCE:g}")


def _with_costs(gate: GateRecord, costs: Sequence[int]) -> GateRecord:
    """``gate`` at other costs per slice. What it costs on splits whose shares are not in the record falls away."""

    def mean(shares: Sequence[float]) -> float:
        return sum(share * costs[choice] for share, choice in zip(shares, gate.choices, strict=True))

    points = tuple(replace(point, madds=mean(point.shares)) for point in gate.operating_points)
    shares = gate.hold_out_shares
    mean_madds: list[Measured] = []
    if shares is not None:
        mean_madds = [replace(m, value=mean(shares)) for m in gate.mean_madds if m.split == "hold-out"]
    return replace(gate, operating_points=points, mean_madds=tuple(mean_madds))
