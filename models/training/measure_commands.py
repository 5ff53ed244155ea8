"""The subcommands of ``slicewise-models`` that measure, and the file that ``evaluate --json`` writes.

Shapes: N images, L ladder length, W slices that were run, K classes, G gate choices.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from models.checkpoint import Checkpoint, Manifest, load, locate
from models.supernet import Supernet
from models.training.data import Batches, LabelledImages, load_folder
from models.training.evaluate import BATCH_SIZE, evaluate
from models.training.metrics import Contrast, GateComparison, Interval, compare_gate, top_k_accuracy, width_shares
from models.training.operating import calibration_error
from models.transform import F32, InputSpec

TOP = 5
_DIGITS = 5  # of the floats that are kept per image

Mode = str | int
"""What ``evaluate`` runs and reports: "all", "gate" (the gate alone), or one ladder index."""


@dataclass(frozen=True)
class Measurement:
    """What was run on labelled images, and what follows from it.

    widths         ladder indices that were run, [W], in the order of ``logits_NWK``.
    gate_logits_NG of every image, whatever was run.
    point          index of the operating point; None: the model has none, argmax decides.
    """

    manifest: Manifest
    images: LabelledImages
    mode: Mode
    point: int | None
    widths: tuple[int, ...]
    logits_NWK: F32
    gate_logits_NG: F32

    @property
    def madds(self) -> NDArray[np.int64]:
        """Served MAdds [L] of every slice."""
        return np.array([record.madds_served for record in self.manifest.slices])

    @cached_property
    def answers_NW(self) -> NDArray[np.int64]:
        answers_NW: NDArray[np.int64] = self.logits_NWK.argmax(2)
        return answers_NW

    @property
    def correct_NW(self) -> NDArray[np.bool_]:
        correct_NW: NDArray[np.bool_] = self.answers_NW == self.images.labels[:, None]
        return correct_NW

    @cached_property
    def gate_widths_N(self) -> NDArray[np.int64]:
        """Ladder index that the gate wishes for each image at the operating point."""
        return self.manifest.decision(self.point).widths(self.gate_logits_NG)

    @property
    def served_widths_N(self) -> NDArray[np.int64]:
        """The gate's wish, or the one slice that was asked for."""
        if isinstance(self.mode, int):
            return np.full(len(self.images), self.mode, np.int64)
        return self.gate_widths_N

    @property
    def served_logits_NK(self) -> F32:
        """Logits at the served width."""
        columns_N = np.searchsorted(self.widths, self.served_widths_N)
        served_NK: F32 = self.logits_NWK[np.arange(len(self.images)), columns_N]
        return served_NK

    @property
    def p_right_NL(self) -> F32 | None:
        """Calibrated probability of every slice to be right; None without a calibration."""
        calibration = self.manifest.gate.calibration
        return None if calibration is None else calibration.probabilities(self.gate_logits_NG)

    def top(self, logits_NK: F32, k: int) -> float | None:
        """Top-k accuracy; None where there are no more than ``k`` classes."""
        return top_k_accuracy(logits_NK, self.images.labels, k) if len(self.manifest.classes) > k else None

    def calibration_error(self, width: int) -> float | None:
        """Expected calibration error of ``p_right`` at a width that was run; None without a calibration."""
        if (p_right_NL := self.p_right_NL) is None:
            return None
        return calibration_error(p_right_NL[:, width], self.correct_NW[:, self.widths.index(width)])

    @cached_property
    def comparison(self) -> GateComparison | None:
        """The gate against what needs no gate; None where not every slice was run, or for a single image."""
        if isinstance(self.mode, int) or len(self.images) < 2:
            return None
        return compare_gate(self.correct_NW, self.gate_widths_N, self.madds)


def parse_width(given: str, slices: int) -> Mode:
    """The value of ``--width``; ValueError unless it is "all", "gate" or an index of the ladder."""
    if given in ("all", "gate"):
        return given
    if given.isdecimal() and int(given) < slices:
        return int(given)
    raise ValueError(f"--width {given}; allowed: all, gate, or a width of 0..{slices - 1}")


def measure(checkpoint: Checkpoint, images: LabelledImages, mode: Mode, point: int | None = None) -> Measurement:
    """Run every slice, or the one that ``mode`` names, over all images, each trunk once; float32.

    point  index of an operating point, None for the manifest's default.
    Raises ValueError for a point that the model does not have.
    """
    net, manifest = checkpoint.net, checkpoint.manifest
    decision = manifest.decision(point)
    if isinstance(mode, int):
        widths: tuple[int, ...] = (mode,)
        logits_NWK, gate_logits_NG = _run_slice(net, images, manifest.input, mode)
    else:
        widths = tuple(range(len(manifest.slices)))
        evaluation = evaluate(net, images, manifest.input, decision, "evaluate")
        logits_NWK, gate_logits_NG = evaluation.logits_NLK, evaluation.gate_logits_NG
    chosen = manifest.gate.default_point if point is None else point
    return Measurement(manifest, images, mode, chosen, widths, logits_NWK, gate_logits_NG)


@torch.no_grad()
def _run_slice(net: Supernet, images: LabelledImages, spec: InputSpec, width: int) -> tuple[F32, F32]:
    """Logits [N, 1, K] of one slice, and gate logits [N, G]."""
    logits, gate_logits = [], []
    batches = Batches(images, spec, BATCH_SIZE, seed=0, padding=0)
    for x, _ in tqdm(batches.in_order(), desc="evaluate", total=-(-len(images) // BATCH_SIZE)):
        seen = net.trunk(x)
        logits.append(net.answer(seen, width))
        gate_logits.append(net.gate_logits(seen.gate_input))
    return torch.cat(logits)[:, None].numpy(), torch.cat(gate_logits).numpy()


def configure_evaluate(parser: argparse.ArgumentParser) -> None:
    """Flags of ``evaluate``."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="version folder, or model folder (highest)")
    parser.add_argument("--data", type=Path, required=True, help="ImageFolder directory or zip")
    parser.add_argument(
        "--width", default="all", metavar="K|all|gate", help="run one slice only, or report the gate only"
    )
    parser.add_argument(
        "--operating-point", type=int, metavar="I", help="of the gate, as listed by inspect; the default one if absent"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every image's answers at every width")


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Print what was measured; with --json keep every image's answers."""
    checkpoint = load(locate(arguments.checkpoint))
    manifest = checkpoint.manifest
    mode = parse_width(arguments.width, len(manifest.slices))
    manifest.decision(arguments.operating_point)  # a bad index is refused before images are read
    images = load_folder(arguments.data, manifest.input, manifest.classes)
    measurement = measure(checkpoint, images, mode, arguments.operating_point)
    for line in report_lines(measurement):
        print(line)
    print(f"{len(images)} images of {arguments.data}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(as_json(measurement), separators=(",", ":"), allow_nan=False) + "\n")


def report_lines(measurement: Measurement) -> Iterator[str]:
    """What ``evaluate`` prints: a line per slice, the gate, and the gate against what needs no gate."""
    if measurement.mode != "gate":
        for column, width in enumerate(measurement.widths):
            yield _slice_line(measurement, column, width)
    if isinstance(measurement.mode, int):
        return
    yield _gate_line(measurement)
    if (found := measurement.comparison) is None:
        return
    share = f"{_between(found.madds_share, '.4f')} of the widest slice's MAdds"
    yield f"  top-1 {_between(found.accuracy, '.4f')}, {share}"
    yield "  " + _contrast_line("the widest slice", found.to_widest)
    yield "  " + _contrast_line("the static ladder at the same MAdds", found.to_ladder)
    yield "  " + _contrast_line("random routing with the same shares", found.to_random)
    yield "  [95 % intervals, paired bootstrap over images; se: standard error]"


def _slice_line(measurement: Measurement, column: int, width: int) -> str:
    logits_NK = measurement.logits_NWK[:, column]
    line = f"width {width}: {_accuracies(measurement, logits_NK)}, {measurement.madds[width]:,} MAdds served"
    error = measurement.calibration_error(width)
    return line if error is None else f"{line}, calibration error {error:.4f}"


def _accuracies(measurement: Measurement, logits_NK: F32) -> str:
    top5 = measurement.top(logits_NK, TOP)
    top1 = top_k_accuracy(logits_NK, measurement.images.labels, 1)
    return f"top-1 {top1:.4f}" + ("" if top5 is None else f", top-{TOP} {top5:.4f}")


def _gate_line(measurement: Measurement) -> str:
    shares_L = width_shares(measurement.gate_widths_N, len(measurement.madds))
    shares = " ".join(f"{width}:{shares_L[width]:.3f}" for width in measurement.manifest.gate.choices)
    mean = measurement.madds[measurement.gate_widths_N].mean()
    accuracies = _accuracies(measurement, measurement.served_logits_NK)
    return f"gate ({point_name(measurement)}): {accuracies}, mean {mean:,.0f} MAdds served, shares {shares}"


def point_name(measurement: Measurement) -> str:
    """The operating point in words."""
    gate, point = measurement.manifest.gate, measurement.point
    if point is None:
        return "no operating points, greatest logit"
    default = ", default" if point == gate.default_point else ""
    return f"operating point {point}{default}, lambda {gate.operating_points[point].lambda_:.4g}"


def _between(interval: Interval, form: str) -> str:
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _contrast_line(what: str, contrast: Contrast) -> str:
    difference = _between(contrast.difference, "+.4f")
    return f"against {what} ({contrast.reference:.4f}): {difference}, se {contrast.standard_error:.4f}"


def as_json(measurement: Measurement) -> dict[str, Any]:
    """Totals and images, ready for JSON; lists per width are in ladder order, null where a slice was not run.

    Per image: name, label, answers, their softmax ``probabilities``, ``margins`` between the best two logits,
    ``correct``; ``p_right`` (null without a calibration); ``gate_width`` and ``gate_margin``, by which the best
    choice wins in what the gate maximises; ``served_width`` and ``served_answer`` of the mode that was asked for.
    """
    m, manifest = measurement, measurement.manifest
    top1 = _per_width(m, [float(right) for right in m.correct_NW.mean(0)])
    is_slice = isinstance(m.mode, int)
    return {
        "model": manifest.name,
        "version": manifest.version,
        "digest": manifest.digest,
        "count": len(m.images),
        "mode": m.mode,
        "classes": list(manifest.classes),
        "madds_served": m.madds.tolist(),
        "gate_choices": list(manifest.gate.choices),
        "operating_point": _point_json(m),
        "accuracy": top1,
        "top1": top1,
        "top5": _per_width(m, [m.top(m.logits_NWK[:, column], TOP) for column in range(len(m.widths))]),
        "calibration_error": _per_width(m, [m.calibration_error(width) for width in m.widths]),
        "mean_madds": float(m.madds[m.served_widths_N].mean()),
        "gate": {
            "accuracy": None if is_slice else top_k_accuracy(m.served_logits_NK, m.images.labels, 1),
            "top5": None if is_slice else m.top(m.served_logits_NK, TOP),
            "mean_madds": float(m.madds[m.gate_widths_N].mean()),
            "shares": width_shares(m.gate_widths_N, len(m.madds))[list(manifest.gate.choices)].tolist(),
        },
        "comparison": None if m.comparison is None else asdict(m.comparison),
        "images": _images_json(m),
    }


def _per_width(measurement: Measurement, values: Sequence[Any]) -> list[Any]:
    """``values`` of the slices that were run, as a list over the whole ladder."""
    found = dict(zip(measurement.widths, values, strict=True))
    return [found.get(width) for width in range(len(measurement.madds))]


def _point_json(measurement: Measurement) -> dict[str, Any] | None:
    gate, point = measurement.manifest.gate, measurement.point
    if point is None:
        return None
    return {"index": point, "is_default": point == gate.default_point, "lambda": gate.operating_points[point].lambda_}


def _images_json(measurement: Measurement) -> list[dict[str, Any]]:
    m, images = measurement, measurement.images
    utility_NG = m.manifest.decision(m.point).utility(m.gate_logits_NG)
    margins_NW, probabilities_NW = _rounded(_margins(m.logits_NWK)), _rounded(_best_probabilities(m.logits_NWK))
    gate_margins_N, served_answers_N = _rounded(_margins(utility_NG)), m.served_logits_NK.argmax(1)
    p_right = None if m.p_right_NL is None else _rounded(m.p_right_NL)
    return [
        {
            "name": images.names[i],
            "label": int(images.labels[i]),
            "answers": _per_width(m, m.answers_NW[i].tolist()),
            "probabilities": _per_width(m, probabilities_NW[i]),
            "margins": _per_width(m, margins_NW[i]),
            "correct": _per_width(m, m.correct_NW[i].tolist()),
            "p_right": None if p_right is None else p_right[i],
            "gate_width": int(m.gate_widths_N[i]),
            "gate_margin": gate_margins_N[i],
            "served_width": int(m.served_widths_N[i]),
            "served_answer": int(served_answers_N[i]),
        }
        for i in range(len(images))
    ]


def _margins(scores: F32) -> F32:
    """Best minus second best along the last axis; 0 where there is but one."""
    if scores.shape[-1] == 1:
        return np.zeros(scores.shape[:-1], np.float32)
    best = np.partition(scores, -2, axis=-1)
    margins: F32 = best[..., -1] - best[..., -2]
    return margins


def _best_probabilities(logits_NWK: F32) -> F32:
    """Softmax probability [N, W] of the greatest logit."""
    best_NW1 = logits_NWK.max(2, keepdims=True)
    p_NW: F32 = 1.0 / np.exp(logits_NWK - best_NW1).sum(2)
    return p_NW


def _rounded(values: F32) -> Any:
    """Nested lists with so many digits as the file keeps; by way of float64, whose short form JSON prints."""
    return values.astype(np.float64).round(_DIGITS).tolist()


def configure_plot(parser: argparse.ArgumentParser) -> None:
    """Flags of ``plot``."""
    parser.add_argument("evaluations", type=Path, nargs="+", metavar="EVALUATION.json", help="from evaluate --json")
    parser.add_argument("--data", type=Path, help="the evaluated images; with them, examples are drawn")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the figures")


def run_plot(arguments: argparse.Namespace) -> None:
    """Draw the figures of evaluations; ValueError without matplotlib."""
    try:
        from models.training import plot  # late: nothing else needs matplotlib
    except ModuleNotFoundError as error:
        raise ValueError(f"figures need {error.name}: pip install '.[plots]' at the root of the repository") from error
    reports = [plot.read_report(path) for path in arguments.evaluations]
    for file in plot.write_figures(reports, arguments.data, arguments.out):
        print(file)
