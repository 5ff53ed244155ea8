"""Training that begins with the tensors of a checkpoint, on classes that need not be the checkpoint's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from models.checkpoint import Checkpoint
from models.supernet import Supernet
from models.training.recipes import Recipe

LEAST_SHARE = 0.5
"""Of a network's parameters, what a checkpoint must give: with less, training hardly begins with it."""


def with_classes(config: dict[str, Any], classes: int) -> dict[str, Any]:
    """A copy of a network's config, as a recipe has it, for another number of classes.

    Raises ValueError when the config has no ``classes``, or there are fewer than two.
    """
    if "classes" not in config:
        raise ValueError(f"a config with the fields {sorted(config)} has no field classes")
    if classes < 2:
        raise ValueError(f"{classes} classes; needed: at least 2")
    return config | {"classes": classes}


def require_teacher(recipe: Recipe, classes: tuple[str, ...], checkpoint: Checkpoint | None) -> None:
    """ValueError where a round of the recipe learns from the checkpoint, and that is absent or of other images."""
    weights = [stage.origin_weight for stage in recipe.rounds if stage.origin_weight]
    if not weights:
        return
    asked = f"recipe {recipe.name} learns from the checkpoint that it begins with (origin_weight {weights[0]:g})"
    if checkpoint is None:
        raise ValueError(f"{asked} and there is none; needed: --init-from")
    if checkpoint.manifest.classes != classes:
        given = ", ".join(checkpoint.manifest.classes[:12])
        needed = f"those of the images, {', '.join(classes[:12])}, or --origin-weight 0"
        raise ValueError(f"{asked}, whose classes are {given}; needed: {needed}")
    if checkpoint.manifest.input != recipe.input_spec:
        raise ValueError(f"{asked}, whose input is {checkpoint.manifest.input}; needed: {recipe.input_spec}")


def other_hold_out(recipe: Recipe, checkpoint: Checkpoint) -> str | None:
    """What to warn of where the checkpoint may have learnt images that the run holds out; None where it has not.

    Only names and counts are compared: checkpoints do not say which images they were trained on.
    """
    trained = checkpoint.manifest.recipe or {}
    theirs, ours = (trained.get("hold_out"), trained.get("seed")), (recipe.hold_out, recipe.seed)
    if theirs == ours or None in theirs:
        return None
    return (
        f"{checkpoint.manifest.name}/{checkpoint.manifest.version} held out {theirs[0]} images by seed {theirs[1]}, "
        f"this run {ours[0]} by seed {ours[1]}: of the same images, some that are held out now were learnt then, and "
        "hold-out figures flatter"
    )


def _leading(given: Tensor, own: Tensor) -> Tensor:
    """The leading part of ``given`` in the shape of ``own``; as it is where that is no part of it."""
    if given.ndim != own.ndim or any(have < need for have, need in zip(given.shape, own.shape, strict=True)):
        return given
    return given[tuple(slice(size) for size in own.shape)]


def initialise(net: Supernet, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Copy into ``net`` every tensor of the checkpoint whose name and shape agree, batch norm's statistics too.

    Of a parameter that is larger in the checkpoint the leading part is copied, since leading channels are what
    a narrower slice consists of; not where the number of classes differs. Returns the names of the others, which
    stay as they were, in the order of ``net.state_dict()``: the classifiers' where the number of classes differs,
    and statistics of other widths. Where it does not differ, classifiers are copied as well, whatever the classes
    are. Sizes and statistics of the input are not compared.

    Raises ValueError, and leaves ``net`` as it was, when the architecture differs, or when less than
    LEAST_SHARE of the parameters (counted one by one, not by tensor) agree.
    """
    source = f"{checkpoint.manifest.name}/{checkpoint.manifest.version}"
    if checkpoint.net.architecture != net.architecture:
        raise ValueError(f"{source} has architecture {checkpoint.net.architecture}; allowed: {net.architecture}")
    own, given = net.state_dict(), checkpoint.net.state_dict()
    sizes = {name: parameter.numel() for name, parameter in net.named_parameters()}
    if checkpoint.net.config_dict().get("classes") == net.config_dict().get("classes"):
        given |= {name: _leading(given[name], own[name]) for name in sizes if name in given}
    agreeing = {
        name: given[name] for name, tensor in own.items() if name in given and given[name].shape == tensor.shape
    }
    share = sum(size for name, size in sizes.items() if name in agreeing) / sum(sizes.values())
    if share < LEAST_SHARE:
        raise ValueError(
            f"{source} has {share:.0%} of the parameters in the names and shapes of this network; needed: at "
            f"least {LEAST_SHARE:.0%}"
        )
    net.load_state_dict(agreeing, strict=False)
    return tuple(name for name in own if name not in agreeing)
