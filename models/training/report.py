"""The training report: measured tables as Markdown, and the same numbers as JSON.

Every number is computed here from per-image results; the text around them states what was run.
Shapes: N images, L ladder length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from models.checkpoint import Manifest
from models.training.ablation import StudyResult, ablation_rows, arm_rows, points
from models.training.evaluate import Evaluation
from models.training.metrics import GateComparison, compare_gate, standard_error
from models.training.operating import calibration_error
from models.training.study import GateArm, StepCost


@dataclass(frozen=True, slots=True)
class Findings:
    """All that the report shows. ``evaluation`` is the checkpoint's on the test split."""

    manifest: Manifest
    evaluation: Evaluation
    study: StudyResult
    gate_arms: Sequence[GateArm]
    step_cost: StepCost
    hardware: str
    commands: Sequence[str]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def ladder_rows(evaluation: Evaluation) -> list[list[str]]:
    """Per slice: cost, accuracy, and the paired step from the slice before with its standard error."""
    correct_NL, madds = evaluation.correct_NL, evaluation.decision.madds
    rows = []
    for width, cost in enumerate(madds):
        step = ""
        if width:
            here, before = correct_NL[:, width], correct_NL[:, width - 1]
            step = f"{100 * (here.mean() - before.mean()):+.2f} ± {100 * standard_error(here, before):.2f}"
        share = f"{100 * cost / madds[-1]:.1f}"
        rows.append([str(width), f"{cost / 1e6:.2f}", share, f"{100 * correct_NL[:, width].mean():.2f}", step])
    return rows


def gate_row(name: str, comparison: GateComparison) -> list[str]:
    """One gate: cost, accuracy, and its differences with intervals."""
    against = (comparison.to_widest, comparison.to_ladder, comparison.to_random)
    figures = [f"{100 * comparison.madds_share.value:.1f}", f"{100 * comparison.accuracy.value:.2f}"]
    return [name, *figures, *(points(contrast.difference) for contrast in against)]


def operating_comparisons(findings: Findings) -> list[GateComparison]:
    """Every operating point of the manifest on the test split, costly first."""
    evaluation = findings.evaluation
    decisions = (findings.manifest.decision(index) for index in range(len(findings.manifest.gate.operating_points)))
    return [
        compare_gate(evaluation.correct_NL, decision.widths(evaluation.gate_logits_NG), decision.madds)
        for decision in decisions
    ]


def gate_arm_rows(evaluation: Evaluation, arms: Sequence[GateArm]) -> list[list[str]]:
    """Per trained gate and rule, the mean over seeds of cost, accuracy and differences."""
    rows = []
    for name, rule in dict.fromkeys((arm.name, arm.rule) for arm in arms):
        found = [
            compare_gate(evaluation.correct_NL, arm.widths_N, evaluation.decision.madds)
            for arm in arms
            if (arm.name, arm.rule) == (name, rule)
        ]
        cost, accuracy = (np.mean([getattr(c, field).value for c in found]) for field in ("madds_share", "accuracy"))
        gains = (
            np.mean([getattr(c, f).difference.value for c in found]) for f in ("to_widest", "to_ladder", "to_random")
        )
        figures = [f"{100 * cost:.1f}", f"{100 * accuracy:.2f}", *(f"{100 * gain:+.2f}" for gain in gains)]
        rows.append([name, rule, str(len(found)), *figures])
    return rows


def as_json(findings: Findings) -> dict[str, Any]:
    """The numbers of the report, for machines."""
    evaluation = findings.evaluation
    return {
        "model": findings.manifest.name,
        "version": findings.manifest.version,
        "digest": findings.manifest.digest,
        "images": len(evaluation),
        "hardware": findings.hardware,
        "accuracy": [evaluation.width_accuracy(width) for width in range(len(evaluation.decision.madds))],
        "madds": list(evaluation.decision.madds),
        "operating_points": [asdict(comparison) for comparison in operating_comparisons(findings)],
        "default_point": findings.manifest.gate.default_point,
        "gate_arms": gate_arm_rows(evaluation, findings.gate_arms),
        "step_cost": asdict(findings.step_cost),
    }  # fmt: skip


def as_markdown(findings: Findings) -> str:
    """The report."""
    return "\n".join(
        [*_model_section(findings), *_gate_section(findings), *_ablation_section(findings), *_cost_section(findings)]
    )


def _model_section(findings: Findings) -> list[str]:
    manifest, evaluation = findings.manifest, findings.evaluation
    recipe = manifest.recipe or {}
    origin = recipe.get("init_from")
    began = f", from the checkpoint with digest {origin}" if origin else ""
    return [
        f"# Training: {manifest.name}/{manifest.version}",
        "",
        f"All accuracies are top-1 in per cent on the {len(evaluation):,} test images. The run chose nothing by them: "
        "gate, calibration and operating points are the hold-out's. "
        "Differences are paired, image by image; brackets hold 95 % bootstrap intervals over images "
        "(10,000 resamples), ± one standard error. MAdds are as served, the slimming head included.",
        "",
        f"Hardware: {findings.hardware}. Trained with recipe `{recipe.get('name')}`, seed {recipe.get('seed')}{began}.",
        "",
        "```",
        *findings.commands,
        "```",
        "",
        "## The ladder",
        "",
        *table(["slice", "M MAdds", "% of widest", "top-1", "step from the slice before"], ladder_rows(evaluation)),
    ]


def _gate_section(findings: Findings) -> list[str]:
    manifest, evaluation = findings.manifest, findings.evaluation
    default = manifest.gate.default_point
    rows = [
        gate_row(f"{index}{' (default)' if index == default else ''}", comparison)
        for index, comparison in enumerate(operating_comparisons(findings))
    ]
    p_NL = manifest.gate.calibration.probabilities(evaluation.gate_logits_NG) if manifest.gate.calibration else None
    errors = [
        f"{calibration_error(p_NL[:, k], evaluation.correct_NL[:, k]):.3f}"
        for k in range(len(evaluation.decision.madds))
        if p_NL is not None
    ]
    against = ["to the widest", "to the static ladder", "to random routing"]
    return [
        "## The gate",
        "",
        "Operating points were laid on the hold-out and are measured here on the test split. The static ladder is "
        "interpolated at the gate's own mean MAdds; random routing draws each image's width with the gate's shares.",
        "",
        *table(["operating point", "% of widest's MAdds", "top-1", *against], rows),
        f"Expected calibration error of the probability of being right, per slice: {', '.join(errors)}.",
        "",
        "### How the slimming head is trained",
        "",
        "Same frozen supernet, same head. *argmax*: the released rule. *calibrated*: the operating point that has at "
        "most half of the widest's MAdds on the hold-out. Means over seeds.",
        "",
        *table(
            ["objective", "rule", "seeds", "% of widest's MAdds", "top-1", *against],
            gate_arm_rows(evaluation, findings.gate_arms),
        ),
    ]


def _ablation_section(findings: Findings) -> list[str]:
    study, evaluation = findings.study, findings.evaluation
    slices = [f"w{k}" for k in range(len(study.arms[0].accuracy_L))]
    epochs = " or ".join(map(str, sorted({arm.epochs for arm in study.arms})))
    hours = sum(arm.train_s for arm in study.arms) / 3600
    return [
        "## Ablations",
        "",
        f"Targets and statistics: arms of the network of `{study.recipe}`, which have images, order, augmentation and "
        f"initial weights in common, of {epochs} epochs in one cosine cycle, fewer than any model that ships "
        f"({hours:.1f} hours of training in all; {study.hardware}). `in place distillation` is universally slimmable "
        "training (Yu and Huang 2019): the widest of the same step teaches, no EMA. `labels` has no teacher. Gates: "
        "on the model above. ± one standard deviation of seeds; the last column is the row minus the first of its "
        "kind, over the seeds that both have.",
        "",
        *table(
            ["what varies", "how", "top-1 of", "seeds", "%", "difference to the first"],
            ablation_rows(study, evaluation.correct_NL, findings.gate_arms),
        ),
        "The arms slice by slice, means over seeds:",
        "",
        *table(["targets", "seeds", *slices], arm_rows(study)),
    ]


def _cost_section(findings: Findings) -> list[str]:
    cost = findings.step_cost
    return [
        "## What a sandwich step costs",
        "",
        f"{cost.sandwich_s * 1e3:.0f} ms against {cost.plain_s * 1e3:.0f} ms for a plain step of the widest slice: "
        f"{cost.sandwich_s / cost.plain_s:.2f} times (medians of {cost.pairs} alternating pairs, batch "
        f"{cost.batch_size}, {cost.threads} threads).",
        "",
    ]
