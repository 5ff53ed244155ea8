"""What the arms of a study showed, without their images: a JSON file, and rows of tables.

Shapes: N images, L ladder length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from models.stages import NOTHING_ELSE, faults_of
from models.training.metrics import Interval, paired_bootstrap
from models.training.study import GateArm, SupernetArm

REFERENCE = "bootstrapping"
"""The targets that every other arm is held against."""


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm on the test split: top-1 of every slice, [L], and the same with the widest's batch-norm statistics."""

    __pydantic_config__ = NOTHING_ELSE

    targets: str
    seed: int
    epochs: int
    train_s: float
    accuracy_L: tuple[float, ...]
    shared_L: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StudyResult:
    """Arms sorted by kind and seed, and what each kind is better than ``bootstrapping`` by.

    gains  mean difference over the ladder and the seeds that both kinds have, its interval over images.
    """

    __pydantic_config__ = NOTHING_ELSE

    recipe: str
    hardware: str
    arms: tuple[ArmResult, ...]
    gains: dict[str, Interval]

    def members(self, targets: str) -> list[ArmResult]:
        return [arm for arm in self.arms if arm.targets == targets]

    @property
    def kinds(self) -> list[str]:
        """Targets in the order of the arms."""
        return list(dict.fromkeys(arm.targets for arm in self.arms))

    @property
    def commands(self) -> list[str]:
        """What a reader types to train these arms, with the reader's own paths; one line per kind and length."""
        groups: dict[tuple[str, int], list[int]] = {}
        for arm in self.arms:
            groups.setdefault((arm.targets, arm.epochs), []).append(arm.seed)
        return [
            f"slicewise-models study --recipe {self.recipe} --data TRAIN --test TEST --run-dir STUDY "
            f"--epochs {epochs} --targets {targets} --seeds {' '.join(map(str, seeds))}"
            for (targets, epochs), seeds in groups.items()
        ]


def average_gain(ours: Sequence[SupernetArm], theirs: Sequence[SupernetArm]) -> Interval:
    """Mean difference over the ladder and the seeds that both have, bootstrapped over images.

    Images are resampled and seeds are not: the interval says how sure the difference of these trained
    networks is, not of all that could be trained. ValueError where the two have no seed in common.
    """
    pairs = [(a, b) for a in ours for b in theirs if a.seed == b.seed]
    if not pairs:
        raise ValueError("the two arms have no seed in common")
    a_N, b_N = (np.mean([pair[i].correct_NL.mean(1) for pair in pairs], axis=0) for i in (0, 1))
    return paired_bootstrap(a_N, b_N)


def summarise(recipe: str, hardware: str, arms: Sequence[SupernetArm]) -> StudyResult:
    """The results of ``arms``; a kind that has no seed in common with the reference gets no gain."""
    ordered = sorted(arms, key=lambda arm: (arm.targets != REFERENCE, arm.targets, arm.seed))
    kinds = {targets: [arm for arm in ordered if arm.targets == targets] for targets in {a.targets for a in ordered}}
    reference = kinds.get(REFERENCE, [])
    gains = {
        targets: average_gain(members, reference)
        for targets, members in sorted(kinds.items())
        if targets != REFERENCE and {a.seed for a in members} & {a.seed for a in reference}
    }
    results = (
        ArmResult(a.targets, a.seed, a.epochs, a.train_s, tuple(a.correct_NL.mean(0)), tuple(a.shared_NL.mean(0)))
        for a in ordered
    )
    return StudyResult(recipe, hardware, tuple(results), gains)


def write_study(file: Path, study: StudyResult) -> None:
    """As JSON, so that a report can be written where the arms are not."""
    file.write_bytes(TypeAdapter(StudyResult).dump_json(study, indent=1) + b"\n")


def read_study(file: Path) -> StudyResult:
    """ValueError names the file and every field that is missing, unknown or ill-typed."""
    try:
        return TypeAdapter(StudyResult).validate_json(file.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{file} is no result of `slicewise-models study`: {faults_of(error)}") from error


def _mean_L(arms: Sequence[ArmResult], shared: bool = False) -> NDArray[np.float64]:
    mean_L: NDArray[np.float64] = np.mean([arm.shared_L if shared else arm.accuracy_L for arm in arms], axis=0)
    return mean_L


def _percent(values: Sequence[float] | NDArray[np.float64]) -> list[str]:
    return [f"{100 * value:.2f}" for value in values]


def _spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds, in per cent; the mean alone for one seed."""
    mean = f"{100 * float(np.mean(values)):.2f}"
    return mean + (f" ± {100 * float(np.std(values, ddof=1)):.2f}" if len(values) > 1 else "")


def points(interval: Interval) -> str:
    """A difference of accuracies in points, with its interval."""
    return f"{100 * interval.value:+.2f} [{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]"


def arm_rows(study: StudyResult) -> list[list[str]]:
    """Per kind of targets: seeds and accuracy per slice; last, the reference without statistics of its own."""

    def row(name: str, arms: Sequence[ArmResult], shared: bool = False) -> list[str]:
        return [name, " ".join(str(arm.seed) for arm in arms), *_percent(_mean_L(arms, shared))]

    rows = [row(kind.replace("_", " "), study.members(kind)) for kind in study.kinds]
    return [*rows, row(f"{REFERENCE}, the widest's statistics for all", study.members(REFERENCE), shared=True)]


def _supernet_ablations(study: StudyResult) -> list[list[str]]:
    measured, reference = "mean over the slices", study.members(REFERENCE)
    rows = []
    for kind in study.kinds:
        members = study.members(kind)
        gain = points(study.gains[kind]) if kind in study.gains else ""
        figures = [str(len(members)), _spread([float(np.mean(arm.accuracy_L)) for arm in members]), gain]
        rows.append(["targets of the narrower slices", kind.replace("_", " "), measured, *figures])
    for name, shared in (("calibrated per slice", False), ("the widest's for all", True)):
        means = [float(np.mean(arm.shared_L if shared else arm.accuracy_L)) for arm in reference]
        lost = float(_mean_L(reference, shared=True).mean() - _mean_L(reference).mean())
        figures = [str(len(reference)), _spread(means), f"{100 * lost:+.2f}" if shared else ""]
        rows.append(["batch-norm statistics", name, measured, *figures])
    return rows


def _gate_ablations(correct_NL: NDArray[np.bool_], arms: Sequence[GateArm]) -> list[list[str]]:
    """Gates under the rule that all of them have, against the first; paired over images and seeds."""
    images = np.arange(len(correct_NL))
    held = [arm for arm in arms if arm.rule == "calibrated"]
    right_SN = {
        name: np.array([correct_NL[images, arm.widths_N] for arm in held if arm.name == name])
        for name in dict.fromkeys(arm.name for arm in held)
    }
    rows, reference = [], next(iter(right_SN))
    for name, gate_SN in right_SN.items():
        gain = paired_bootstrap(gate_SN.mean(0), right_SN[reference].mean(0))
        figures = [str(len(gate_SN)), _spread(gate_SN.mean(1).tolist()), "" if name == reference else points(gain)]
        rows.append(["how the gate learns", name, "gate at half of the widest's MAdds", *figures])
    return rows


def ablation_rows(study: StudyResult, correct_NL: NDArray[np.bool_], gates: Sequence[GateArm]) -> list[list[str]]:
    """All ablations: what varies, how, what is measured, seeds, top-1, difference to the first row of its kind."""
    return [*_supernet_ablations(study), *_gate_ablations(correct_NL, gates)]
