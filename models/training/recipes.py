"""Recipes: everything that fixes a training run, as named frozen data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from models.ds_mbnet import cifar
from models.transform import InputSpec

# Per-channel statistics of the 50,000 CIFAR-10 training images on the 0..1 scale.
CIFAR_INPUT = InputSpec(32, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), shorter_side=32)


@dataclass(frozen=True, slots=True)
class SupernetRecipe:
    """Stage I. The method is the released one (see supernet_stage); sizes and rates are ours.

    cycles is the epochs of each learning-rate cycle: the first begins with a linear warm-up to lr, the
    others restart at lr, each falls to 0 along a cosine, stepped per iteration (warm restarts, SGDR,
    Loshchilov and Hutter 2017); weight decay spares parameters with one dimension; ema_decay is the
    teacher's; calibration_batches refresh the batch-norm statistics of every width at the end.
    """

    cycles: tuple[int, ...]
    batch_size: int
    lr: float
    warmup_epochs: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    ema_decay: float = 0.997
    random_widths: int = 2
    crop_padding: int = 4
    calibration_batches: int = 60

    @property
    def epochs(self) -> int:
        """Epochs of all cycles."""
        return sum(self.cycles)


@dataclass(frozen=True, slots=True)
class GateRecipe:
    """Stage II. hard_weights are tried in turn and the hold-out chooses among them."""

    views: int = 3
    epochs: int = 30
    batch_size: int = 512
    lr: float = 0.08
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    madds_weight: float = 0.5
    hard_weights: tuple[float, ...] = (2.0, 3.0, 3.5, 4.0, 5.0, 6.0)
    tolerated_drop: float = 0.015


@dataclass(frozen=True, slots=True)
class Recipe:
    """One named run: the network, its input, both stages, and the size of the hold-out."""

    name: str
    dataset: str
    architecture: str
    config: Callable[[], dict[str, Any]]
    input_spec: InputSpec
    supernet: SupernetRecipe
    gate: GateRecipe = field(default_factory=GateRecipe)
    hold_out: int = 5000
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "seed": self.seed, "hold_out": self.hold_out,
            "supernet": asdict(self.supernet), "gate": asdict(self.gate),
        }  # fmt: skip


def ds_mbnet_cifar10() -> Recipe:
    """CIFAR-10 (45,000 for training, 5,000 hold-out), 30 epochs of the sandwich on 2 CPU cores."""
    return Recipe(
        "ds_mbnet_cifar10",
        "CIFAR-10",
        "ds_mbnet",
        lambda: asdict(cifar()),
        CIFAR_INPUT,
        SupernetRecipe(cycles=(14, 16), batch_size=128, lr=0.05, weight_decay=2e-4),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"ds_mbnet_cifar10": ds_mbnet_cifar10}
