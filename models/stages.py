"""What the configurations of staged networks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

NOTHING_ELSE = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class StageConfig:
    """widths: allowed output channels, ascending. layers: blocks. stride: of the first block."""

    __pydantic_config__ = NOTHING_ELSE

    widths: tuple[int, ...]
    layers: int
    stride: int

    def __post_init__(self) -> None:
        if self.layers < 1 or self.stride < 1:
            raise ValueError(f"layers {self.layers} and stride {self.stride} must be at least 1")


def check_gate_choices(choices: Sequence[int], slices: int) -> None:
    """ValueError unless ``choices`` ascend within the ladder."""
    ascending = all(a < b for a, b in pairwise(choices))
    if not choices or not ascending or not all(0 <= c < slices for c in choices):
        raise ValueError(f"gate_choices {tuple(choices)} must ascend within 0..{slices - 1}")


def faults_of(error: ValidationError) -> str:
    """Every field that is missing, unknown or ill-typed, and why."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def parse_config(cls: type[T], data: dict[str, Any], architecture: str) -> T:
    """Parse JSON-ready data into a configuration; ValueError names a missing, unknown or ill-typed field."""
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        raise ValueError(f"not a {architecture} config: {faults_of(error)}") from error
