"""Recipes: everything that fixes a training run, as named frozen data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from models import ds_mbnet, ds_resnet
from models.transform import InputSpec

# Per-channel statistics of the 50,000 CIFAR-10 training images on the 0..1 scale.
CIFAR_INPUT = InputSpec(32, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), shorter_side=32)


Targets = Literal["bootstrapping", "ensemble_bootstrapping", "in_place_distillation", "labels"]
"""What the narrower widths learn from, see supernet_stage."""


@dataclass(frozen=True, slots=True)
class SupernetRecipe:
    """Stage I. The method is the released one (see supernet_stage); sizes and rates are ours.

    cycles is the epochs of each learning-rate cycle: the first begins with a linear warm-up to lr, the
    others restart at lr, each falls to 0 along a cosine, stepped per iteration (warm restarts, SGDR,
    Loshchilov and Hutter 2017); weight decay spares parameters with one dimension; ema_decay is the
    teacher's; calibration_batches refresh the batch-norm statistics of every width at the end.
    crop_padding and erase_pixels augment (data.augment, data.erase).
    gate_class_weight scales the loss of the classifier on the gate's input, where the network has one;
    origin_weight is how much every slice learns from the widest slice of the checkpoint that the run began
    with, beside its own target (ours); bf16 runs forward and backward under autocast, weights and updates stay float32;
    learns is how the names of those parameters begin that are trained, all others stay as they are.
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
    erase_pixels: int = 0
    calibration_batches: int = 60
    targets: Targets = "bootstrapping"
    gate_class_weight: float = 0.3
    origin_weight: float = 0.0
    bf16: bool = False
    learns: str = ""

    @property
    def epochs(self) -> int:
        """Epochs of all cycles."""
        return sum(self.cycles)


@dataclass(frozen=True, slots=True)
class GateRecipe:
    """Stage II, one way of training the slimming head.

    objective "released": SGS + task + MAdds losses (networks as released); hard_weight is the weight of
    an image that the narrowest choice gets wrong, target_madds the wished mean cost as a share of the
    widest choice's. "correctness" (ours): predict per choice whether it will be right; it uses none of
    the weights below lr and weight_decay.
    """

    objective: Literal["released", "correctness"] = "correctness"
    epochs: int = 30
    batch_size: int = 512
    lr: float = 0.08
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    sgs_weight: float = 1.0
    hard_weight: float = 1.0
    madds_weight: float = 0.5
    target_madds: float = 0.0


@dataclass(frozen=True, slots=True)
class OperatingRecipe:
    """How operating points are laid and one of them chosen, all on the hold-out.

    cost_shares     mean MAdds of the points, as shares of the widest slice's.
    default_share   the default point costs at most this share.
    tolerated_drop  among those it is the cheapest within this much of the widest slice's top-1.
    compare_at      the share at which trained gates compete.
    """

    cost_shares: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
    default_share: float = 0.45
    tolerated_drop: float = 0.002
    compare_at: float = 0.5


@dataclass(frozen=True, slots=True)
class Recipe:
    """One named run: the network, its input, both stages, and the size of the hold-out.

    gates        are all trained, on ``gate_views`` augmented epochs; the hold-out picks one.
    half_weights rounds the trained weights to half precision before statistics and figures are taken.
    then         further rounds of stage I, each with the weights and the EMA of the one before.
    """

    name: str
    dataset: str
    architecture: str
    config: Callable[[], dict[str, Any]]
    input_spec: InputSpec
    supernet: SupernetRecipe
    gates: tuple[GateRecipe, ...] = (GateRecipe(),)
    gate_views: int = 3
    operating: OperatingRecipe = field(default_factory=OperatingRecipe)
    hold_out: int = 5000
    seed: int = 0
    half_weights: bool = False
    then: tuple[SupernetRecipe, ...] = ()

    @property
    def rounds(self) -> tuple[SupernetRecipe, ...]:
        """All of stage I."""
        return (self.supernet, *self.then)

    @property
    def last_round(self) -> SupernetRecipe:
        """Whose images the gate learns from, too."""
        return self.rounds[-1]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "seed": self.seed, "hold_out": self.hold_out,
            "supernet": asdict(self.supernet), "then": [asdict(stage) for stage in self.then],
            "gates": [asdict(gate) for gate in self.gates],
            "gate_views": self.gate_views, "operating": asdict(self.operating),
            "half_weights": self.half_weights,
        }  # fmt: skip


def ds_mbnet_cifar10() -> Recipe:
    """CIFAR-10 as JPEG files (45,000 for training, 5,000 hold-out), 30 epochs of the sandwich.

    97 minutes on 2 busy CPU cores. Top-1 per slice on 5,000 test images, one seed: 81.30, 81.80, 82.48,
    82.82, 83.50, 83.82, 84.04, 84.48 %.
    """
    return Recipe(
        "ds_mbnet_cifar10",
        "CIFAR-10",
        "ds_mbnet",
        lambda: asdict(ds_mbnet.cifar()),
        CIFAR_INPUT,
        SupernetRecipe(cycles=(14, 16), batch_size=128, lr=0.05, weight_decay=2e-4),
    )


def ds_resnet_cifar10() -> Recipe:
    """CIFAR-10 as JPEG files (45,000 for training, 5,000 hold-out), 65 epochs of the sandwich.

    160 minutes on 2 CPU cores with AMX. Top-1 per slice on 5,000 test images, one seed: 87.52, 88.12, 88.82,
    89.40, 89.64, 90.02 %.
    """
    return Recipe(
        "ds_resnet_cifar10",
        "CIFAR-10",
        "ds_resnet",
        lambda: asdict(ds_resnet.cifar()),
        CIFAR_INPUT,
        SupernetRecipe(
            cycles=(40, 25),
            batch_size=128,
            lr=0.12,
            warmup_epochs=2.0,
            weight_decay=1e-3,
            erase_pixels=10,
            bf16=True,
        ),
        half_weights=True,
    )


def ds_resnet_cifar10_steep() -> Recipe:
    """CIFAR-10 as JPEG files (45,000 for training, 5,000 hold-out), 45 epochs, begun with ``ds_resnet_cifar10``.

    In the second round every slice learns from the widest of that checkpoint, too. 138 minutes on 2 CPU cores.
    Top-1 per slice on 5,000 test images, one seed: 87.26, 88.12, 89.22, 89.58, 89.70, 90.38 %.
    """
    first = SupernetRecipe(cycles=(20,), batch_size=128, lr=0.12, weight_decay=1e-3, erase_pixels=14, bf16=True)
    return Recipe(
        "ds_resnet_cifar10_steep",
        "CIFAR-10",
        "ds_resnet",
        lambda: asdict(ds_resnet.cifar_steep()),
        CIFAR_INPUT,
        first,
        half_weights=True,
        then=(replace(first, cycles=(25,), lr=0.1, erase_pixels=12, origin_weight=0.5),),
    )


def ds_resnet_cifar10_exit() -> Recipe:
    """CIFAR-10 as JPEG files (45,000 for training, 5,000 hold-out), 35 epochs, begun with ``ds_resnet_cifar10_steep``.

    In the first round every slice learns from the widest of that checkpoint, too. In the second the early exit
    learns on from images of which nothing is erased, with the attention that reads it. 85 to 106 minutes on 2 CPU
    cores.
    Top-1 per slice on 5,000 test images, one seed: 86.58, 88.76, 89.14, 89.70, 89.96, 90.54 %.
    """
    first = SupernetRecipe(
        cycles=(25,), batch_size=128, lr=0.1, weight_decay=1e-3, erase_pixels=12, origin_weight=0.5, bf16=True
    )
    second = replace(
        first, cycles=(10,), erase_pixels=0, weight_decay=5e-4, origin_weight=0.0, random_widths=1, learns="gate."
    )
    return Recipe(
        "ds_resnet_cifar10_exit",
        "CIFAR-10",
        "ds_resnet",
        lambda: asdict(ds_resnet.cifar_exit()),
        CIFAR_INPUT,
        first,
        operating=OperatingRecipe(default_share=0.5),
        half_weights=True,
        then=(second,),
    )


def ds_resnet_tiny_cifar10() -> Recipe:
    """CIFAR-10 as JPEG files, 8 epochs of a network that only tests and demonstrations want.

    5 minutes on 1 CPU core. Top-1 per slice on 5,000 test images, one seed: 72.24, 74.76, 75.94 %.
    """
    return Recipe(
        "ds_resnet_tiny_cifar10",
        "CIFAR-10",
        "ds_resnet",
        lambda: asdict(ds_resnet.tiny()),
        CIFAR_INPUT,
        SupernetRecipe(cycles=(8,), batch_size=128, lr=0.1),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        ds_resnet_cifar10,
        ds_resnet_cifar10_steep,
        ds_resnet_cifar10_exit,
        ds_mbnet_cifar10,
        ds_resnet_tiny_cifar10,
    )
}
