"""Checkpoints: ``<root>/<name>/<version>/`` with ``model.safetensors`` and ``manifest.json``.

The manifest says what the tensors are, what each slice costs and how well it was measured to do.
Name and version are the folder's and stand nowhere else, so a checkpoint can be copied or renamed.
Loading verifies everything that can be verified: nothing is served that merely looks right.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError
from safetensors import SafetensorError

from models.cost import SliceCost
from models.decision import GateCalibration, GateDecision
from models.registry import build
from models.supernet import Supernet
from models.tensors import parse_tensors, serialise_tensors, tensor_faults
from models.transform import InputSpec

TENSORS = "model.safetensors"
MANIFEST = "manifest.json"

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or contradicts itself; the message says what and where."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A measured number with what it was measured on: ``count`` images of ``split`` ("test", "hold-out")."""

    __pydantic_config__ = _STRICT

    value: float
    split: str
    count: int


@dataclass(frozen=True, slots=True)
class SliceRecord:
    """One ladder index: its cost (multiply-adds per image, parameters) and its measured top-1 accuracies."""

    __pydantic_config__ = _STRICT

    width: int
    madds_published: int
    madds_served: int
    trunk_madds: int
    slimming_madds: int
    body_madds: int
    parameters: int
    accuracy: tuple[Measured, ...] = ()

    @classmethod
    def of(cls, width: int, cost: SliceCost, accuracy: Iterable[Measured] = ()) -> Self:
        return cls(
            width, cost.published_madds, cost.served_madds, cost.trunk_madds, cost.slimming_madds, cost.body_madds,
            cost.parameters, tuple(accuracy),
        )  # fmt: skip

    @property
    def test_accuracy(self) -> float | None:
        """Top-1 on the split called "test"; None until measured."""
        return next((m.value for m in self.accuracy if m.split == "test"), None)


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """One trade of the gate, and what it gives on the hold-out.

    lambda  what the cost of the widest slice counts against a probability of being right (decision.py).
    madds   mean served multiply-adds per image. shares: of the images at each gate choice.
    """

    __pydantic_config__ = _STRICT

    lambda_: Annotated[float, Field(alias="lambda", ge=0)]
    madds: float
    accuracy: float
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GateRecord:
    """The gate: ladder indices it chooses among, and how it behaves.

    hold_out_shares  share of the hold-out sent to each choice; None until measured.
    accuracy         top-1 with every image at its gate's width.
    mean_madds       mean served multiply-adds per image under the gate.
    calibration      log-odds of every slice being right, fitted on the hold-out; None: argmax decides.
    calibration_error  per slice, expected calibration error of that probability (15 equal bins).
    operating_points from costly to cheap; needs a calibration. default_point: index of the one used
                     unless another is asked for; the measured figures above are at that point.
    """

    __pydantic_config__ = _STRICT

    choices: tuple[int, ...]
    hold_out_shares: tuple[float, ...] | None = None
    accuracy: tuple[Measured, ...] = ()
    mean_madds: tuple[Measured, ...] = ()
    calibration: GateCalibration | None = None
    calibration_error: tuple[tuple[Measured, ...], ...] = ()
    operating_points: tuple[OperatingPoint, ...] = ()
    default_point: int | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a checkpoint but its tensors. ``digest`` is "sha256:<hex>" of the tensor file."""

    __pydantic_config__ = _STRICT

    name: str
    version: int
    architecture: str
    config: dict[str, Any]
    classes: tuple[str, ...]
    input: Annotated[InputSpec, PlainValidator(InputSpec.from_json)]
    slices: tuple[SliceRecord, ...]
    gate: GateRecord
    dataset: dict[str, Any] | None
    recipe: dict[str, Any] | None
    digest: str

    @property
    def network_id(self) -> str:
        """Digest of all that fixes what is computed from an image: tensors, architecture, config and input."""
        facts = (self.digest, self.architecture, self.config, self.input.to_json())
        return _digest(json.dumps(facts, sort_keys=True).encode())

    @property
    def has_exit(self) -> bool:
        """Slice 0 is an early exit: it has no body."""
        return not self.slices[0].body_madds

    def decision(self, point: int | None = None) -> GateDecision:
        """The gate's rule at an operating point, the default one unless an index is given.

        Raises ValueError for an index that is not there.
        """
        madds = tuple(record.madds_served for record in self.slices)
        index = self.gate.default_point if point is None else point
        if index is None:
            return GateDecision(self.gate.choices, madds)
        points = self.gate.operating_points
        if not 0 <= index < len(points):
            there = f"0..{len(points) - 1}" if points else "none, the model has no operating points"
            raise ValueError(f"operating point {index} of {self.name}/{self.version}; allowed: {there}")
        return GateDecision(self.gate.choices, madds, self.gate.calibration, points[index].lambda_)

    def to_json(self) -> dict[str, Any]:
        """What ``manifest.json`` holds: all fields but name and version, which are the folder's."""
        data = asdict(self) | {"input": self.input.to_json()}
        del data["name"], data["version"]
        for point in data["gate"]["operating_points"]:
            point["lambda"] = point.pop("lambda_")
        return data

    @classmethod
    def from_json(cls, data: Any, name: str, version: int) -> Self:
        """Parse what ``to_json`` gives; CheckpointError names every missing, unknown or ill-typed field."""
        if not isinstance(data, dict):
            raise CheckpointError(f"{name}/{version}/{MANIFEST} must hold an object, given {type(data).__name__}")
        try:
            # By way of text, because only there are lists strictly what tuples look like.
            text = json.dumps(data | {"name": name, "version": version})
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}"
                + ("" if e["type"] == "missing" else f", given {e['input']!r:.80}")
                for e in error.errors()
            ]
            raise CheckpointError(list_faults(f"{name}/{version}/{MANIFEST}", faults)) from error


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified manifest and its network, in eval mode."""

    manifest: Manifest
    net: Supernet


def list_faults(what: str, faults: Sequence[str]) -> str:
    """One message that names every fault of ``what``."""
    return f"{what}: {'; '.join(faults)}"


def _folder_identity(folder: Path) -> tuple[str, int]:
    folder = folder.absolute()
    if not re.fullmatch(r"[1-9][0-9]*", folder.name) or not folder.parent.name:
        raise CheckpointError(f"{folder} is no version folder; expected NAME/VERSION with a version of 1, 2, ...")
    return folder.parent.name, int(folder.name)


def require_new(folder: Path) -> None:
    """CheckpointError where ``save`` would refuse ``folder``: no NAME/VERSION, or already there."""
    _folder_identity(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} is already there; a version is never overwritten")


def save(  # noqa: PLR0913  # keyword-only, one per fact of the manifest
    folder: Path,
    net: Supernet,
    *,
    classes: Sequence[str],
    input_spec: InputSpec,
    accuracy: Sequence[Sequence[Measured]] | None = None,
    gate: GateRecord | None = None,
    dataset: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
) -> Manifest:
    """Write ``net`` to a new version folder, wholly or not at all; returns its manifest.

    accuracy has one entry per slice, in ladder order. gate: None means nothing measured. Costs come
    from ``net.costs()``.
    Raises CheckpointError when the folder exists, or the facts contradict the network.
    """
    require_new(folder)
    name, version = _folder_identity(folder)
    tensors = serialise_tensors(net.state_dict())
    measured = accuracy if accuracy is not None else [()] * len(net.ladder)
    slices = (SliceRecord.of(k, c, a) for k, (c, a) in enumerate(zip(net.costs(), measured, strict=True)))
    manifest = Manifest(
        name, version, net.architecture, net.config_dict(), tuple(classes), input_spec, tuple(slices),
        gate or GateRecord(net.gate_choices), dataset, recipe, _digest(tensors),
    )  # fmt: skip
    _check_agreement(manifest, net)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        (partial / TENSORS).write_bytes(tensors)
        text = json.dumps(manifest.to_json(), indent=1, allow_nan=False) + "\n"
        written = Manifest.from_json(json.loads(text), name, version)  # nothing is published that would not load
        (partial / MANIFEST).write_text(text)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return written


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, parsed but not compared with the tensors; CheckpointError as ``load``."""
    name, version = _folder_identity(folder)
    try:
        data = json.loads(_read(folder / MANIFEST))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is not JSON: {error}") from error
    return Manifest.from_json(data, name, version)


def load(folder: Path) -> Checkpoint:
    """Read and verify a version folder.

    Raises CheckpointError when a file is missing or damaged, the digest is wrong, or tensors,
    costs, classes, gate or input disagree with the network that the manifest describes.
    """
    manifest = read_manifest(folder)
    data = _read(folder / TENSORS)
    if (digest := _digest(data)) != manifest.digest:
        raise CheckpointError(f"{folder / TENSORS} has digest {digest}, the manifest says {manifest.digest}")
    with torch.device("meta"):  # shapes first: a wrong config must not cost memory
        expected = _fresh_network(manifest).state_dict()
    try:
        tensors = parse_tensors(data, expected)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / TENSORS} is not a readable safetensors file: {error}") from error
    if faults := tensor_faults(tensors, expected):
        raise CheckpointError(list_faults(str(folder / TENSORS), faults))
    net = _fresh_network(manifest)
    _check_agreement(manifest, net)
    net.load_state_dict(tensors)
    return Checkpoint(manifest, net.eval())


def _fresh_network(manifest: Manifest) -> Supernet:
    try:
        return build(manifest.architecture, manifest.config)
    except ValueError as error:
        raise CheckpointError(f"{manifest.name}/{manifest.version}/{MANIFEST}: {error}") from error


def _check_agreement(manifest: Manifest, net: Supernet) -> None:
    """Compare what the manifest says of the network with what the network says of itself."""
    shape, gate = net.input_shape, manifest.gate
    pairs: list[tuple[str, object, object]] = [
        ("number of classes", len(manifest.classes), net.classes),
        ("input height x width", (manifest.input.height, manifest.input.width), (shape.height, shape.width)),
        ("gate choices", gate.choices, net.gate_choices),
        ("number of slices", len(manifest.slices), len(net.ladder)),
    ]
    if gate.hold_out_shares is not None:
        pairs.append(("number of hold-out shares", len(gate.hold_out_shares), len(net.gate_choices)))
    if gate.calibration is not None:
        shape_given = (len(gate.calibration.weight), len(gate.calibration.weight[0]))
        pairs.append(("calibration's slices x choices", shape_given, (len(net.ladder), len(net.gate_choices))))
    for width, (record, cost) in enumerate(zip(manifest.slices, net.costs(), strict=False)):
        given, expected = asdict(record), asdict(SliceRecord.of(width, cost))
        pairs += [(f"slices.{width}.{key}", given[key], expected[key]) for key in expected if key != "accuracy"]
    faults = [f"{what} is {given}, the network has {expected}" for what, given, expected in pairs if given != expected]
    faults += _point_faults(gate)
    if faults:
        raise CheckpointError(list_faults(f"{manifest.name}/{manifest.version}", faults))


def _point_faults(gate: GateRecord) -> list[str]:
    """What is wrong with the operating points and what stands beside them."""
    faults, points, choices = [], gate.operating_points, len(gate.choices)
    if gate.default_point is not None and not 0 <= gate.default_point < len(points):
        allowed = f"0..{len(points) - 1}" if points else "null, there are no operating points"
        faults.append(f"default operating point is {gate.default_point}; allowed: {allowed}")
    if points and gate.calibration is None:
        faults.append(f"{len(points)} operating points without a calibration")
    faults += [
        f"operating point {index} has {len(point.shares)} shares, the gate has {choices} choices"
        for index, point in enumerate(points)
        if len(point.shares) != choices
    ]
    if any(cheaper.madds > costlier.madds for costlier, cheaper in pairwise(points)):
        faults.append(f"operating points must go from costly to cheap, given {[point.madds for point in points]} MAdds")
    if gate.calibration and gate.calibration_error and len(gate.calibration_error) != len(gate.calibration.bias):
        faults.append(
            f"calibration error of {len(gate.calibration_error)} slices, calibration of {len(gate.calibration.bias)}"
        )
    return faults


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


def versions(root: Path, name: str) -> tuple[int, ...]:
    """The versions of one model, ascending; empty when there is none."""
    folder = root / name
    if not folder.is_dir():
        return ()
    return tuple(sorted(int(f.name) for f in folder.iterdir() if re.fullmatch(r"[1-9][0-9]*", f.name) and f.is_dir()))


def models_in(root: Path) -> tuple[str, ...]:
    """The models of a repository that have a version, sorted by name; empty when the folder is missing."""
    if not root.is_dir():
        return ()
    return tuple(sorted(f.name for f in root.iterdir() if not f.name.startswith(".") and versions(root, f.name)))


def resolve(root: Path, name: str, version: int | None = None) -> Path:
    """The folder of one version, the highest unless one is named; CheckpointError lists what is there."""
    known = models_in(root)
    if name not in known:
        raise CheckpointError(f"no model {name!r} in {root}; there: {', '.join(known) or 'none'}")
    there = versions(root, name)
    chosen = there[-1] if version is None else version
    if chosen not in there:
        raise CheckpointError(f"model {name!r} has no version {chosen}; there: {', '.join(map(str, there))}")
    return root / name / str(chosen)


def locate(path: Path) -> Path:
    """The version folder that ``path`` is, or the highest version of the model folder that it is."""
    path = path.absolute()
    return path if (path / MANIFEST).is_file() else resolve(path.parent, path.name)
