"""Architectures by name, as manifests spell them. A new one is a file and a line here."""

from __future__ import annotations

from typing import Any

from models.ds_mbnet import DsMbnet
from models.ds_resnet import DsResnet
from models.supernet import Supernet

ARCHITECTURES: dict[str, type[Supernet]] = {net.architecture: net for net in (DsMbnet, DsResnet)}


def build(architecture: str, config: dict[str, Any]) -> Supernet:
    """A network with fresh weights; ValueError names an unknown architecture or a bad config."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[architecture].from_config(config)
