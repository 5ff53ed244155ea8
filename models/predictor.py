"""A checkpoint in a notebook: ``load(path).predict(image, compute_budget="40%")``, no server.

The served rule: trunk and gate, the gate's wish at an operating point, narrowed to what the budget
allows. Deadlines, accuracy floors, load and batching belong to the service.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import torch
from PIL import Image

from models import checkpoint
from models.checkpoint import Checkpoint
from models.supernet import StaticSubnet
from models.transform import U8, InputSpec, load_pixels, normalise, resize, upright_rgb

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True, slots=True)
class PredictorResult:
    """The answer for one image.

    predictions  (label, probability), best first.
    width        ladder index that answered.
    gate_width   ladder index that the gate wished; None when the width was forced.
    madds        multiply-adds spent, the slimming head included where it ran.
    """

    predictions: tuple[tuple[str, float], ...]
    width: int
    gate_width: int | None
    madds: int


class Predictor:
    """Answers one image at a time on the CPU; slices are built when first used and kept.

    operating_point  index into the manifest's; its default one when None.

    Raises ValueError, naming what is allowed, for a point that the manifest does not have.
    """

    def __init__(self, loaded: Checkpoint, operating_point: int | None = None) -> None:
        self.manifest, self.net = loaded.manifest, loaded.net
        self._decision = self.manifest.decision(operating_point)
        self._subnets: dict[int, StaticSubnet] = {}

    @torch.no_grad()
    def predict(
        self,
        image: bytes | str | os.PathLike[str] | Image.Image,
        *,
        compute_budget: int | str | None = None,
        width: int | None = None,
        top_k: int = 5,
    ) -> PredictorResult:
        """Classify one image: encoded bytes, a file, or a picture.

        compute_budget  most MAdds to spend: a count, or "180M", "0.18G", "40%" of the widest slice.
        width           forces a ladder index and skips the gate.

        Raises ImageError for what is no image; ValueError for a width outside the ladder, a budget
        that cannot be read, or one that no allowed slice fits, naming the narrowest cost.
        """
        slices = self.manifest.slices
        if width is not None and not 0 <= width < len(slices):
            raise ValueError(f"width is {width}; allowed: 0..{len(slices) - 1}")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        costs = [record.madds_served if width is None else record.madds_published for record in slices]
        allowed = range(len(slices)) if width is None else [width]
        if compute_budget is not None:
            budget = parse_budget(compute_budget, slices[-1].madds_served)
            if costs[allowed[0]] > budget:
                raise ValueError(f"budget of {budget} MAdds; slice {allowed[0]} alone needs {costs[allowed[0]]}")
            allowed = [k for k in allowed if costs[k] <= budget]

        spec = self.manifest.input
        x = torch.from_numpy(normalise(_pixels(image, spec), spec)[None])
        seen = self._subnet(0).trunk(x)
        gate_width = None
        if width is None:
            gate_logits = self._subnet(0).slimming(seen.gate_input)
            gate_width = int(self._decision.widths(gate_logits.numpy())[0])
        served = allowed[-1] if gate_width is None else min(gate_width, allowed[-1])
        probabilities = self._subnet(served).answer(seen)[0].softmax(0)
        best = probabilities.topk(min(top_k, len(self.manifest.classes)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        predictions = tuple((self.manifest.classes[index], probability) for index, probability in pairs)
        return PredictorResult(predictions, served, gate_width, costs[served])

    def _subnet(self, width: int) -> StaticSubnet:
        if width not in self._subnets:
            self._subnets[width] = self.net.subnet(width)
        return self._subnets[width]


def load(path: str | os.PathLike[str], operating_point: int | None = None) -> Predictor:
    """From a version folder, or from a model folder its highest version; CheckpointError if damaged.

    Raises ValueError for an operating point that the manifest does not have.
    """
    return Predictor(checkpoint.load(checkpoint.locate(Path(path))), operating_point)


def parse_budget(text: int | str, widest_madds: int) -> int:
    """MAdds, floored: a count, a decimal with k, M or G (any case), or a share like "40%"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg%]?)", str(text).strip().lower(), re.ASCII)
    if match is None or not (number := Decimal(match[1])):
        raise ValueError(f"compute budget {text!r}; allowed: above 0, such as 180000000, '180M', '0.18G' or '40%'")
    if match[2] != "%":
        return int(number * _UNITS[match[2]])
    if number > 100:
        raise ValueError(f"compute budget {text!r}; allowed: at most 100% of the widest slice")
    return int(number * widest_madds / 100)


def _pixels(image: bytes | str | os.PathLike[str] | Image.Image, spec: InputSpec) -> U8:
    if isinstance(image, Image.Image):
        return resize(upright_rgb(image.copy()), spec)
    return load_pixels(image if isinstance(image, bytes) else Path(image).read_bytes(), spec)
