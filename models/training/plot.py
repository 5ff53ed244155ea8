"""Figures of the files that ``evaluate --json`` writes: PNG, and SVG where that is small.

Needs matplotlib, which nothing else does; ``models.training.measure_commands`` imports this file late and
says so where it is missing. No pyplot: a figure here is a value without a window, and Agg draws it.

Colours: Okabe and Ito's for series, viridis for the order of widths; both are told apart by the colour-blind.

Shapes: N images, L ladder length, G gate choices, C classes.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from models.training.loading import ImageFiles
from models.training.metrics import F64, Bools, Ints, gate_curve, width_shares
from models.transform import decode

SVG_LIMIT_BYTES = 150_000
CLASSES_LIMIT = 24
"""Bars of one figure; of more classes the cheapest and the costliest are shown."""
EXAMPLES = 8
_THUMBNAIL = 160  # pixels
DPI = 200
EXAMPLES_DPI = 150  # photographs compress badly

_SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _QUIET, _GRID = "#222222", "#6B6B6B", "#E3E3E3"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#8A8A8A",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelpad": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "slicewise",  # equal figures are equal files
}


@dataclass(frozen=True, slots=True)
class Report:
    """What figures need of one evaluation.

    label      model/version. madds_L: served, per slice. choices: ladder indices of the gate.
    p_right_NL None without a calibration. margin_N: by which the gate's choice won.
    answers_N  at the gate's width. lambda_ of the operating point; None: the greatest logit decides.
    """

    label: str
    classes: tuple[str, ...]
    madds_L: F64
    choices: tuple[int, ...]
    names: tuple[str, ...]
    labels_N: Ints
    correct_NL: Bools
    p_right_NL: F64 | None
    widths_N: Ints
    margin_N: F64
    answers_N: Ints
    lambda_: float | None

    @classmethod
    def of(cls, data: Any, source: str) -> Self:
        """Parse the JSON; ValueError when it is no evaluation of every slice."""
        try:
            if isinstance(data["mode"], int):
                raise ValueError(f"{source} has width {data['mode']} only; figures need --width all or gate")
            images, point = data["images"], data["operating_point"]
            calibrated = images[0]["p_right"] is not None
            return cls(
                f"{data['model']}/{data['version']}",
                tuple(data["classes"]),
                np.array(data["madds_served"], np.float64),
                tuple(data["gate_choices"]),
                tuple(image["name"] for image in images),
                np.array([image["label"] for image in images]),
                np.array([image["correct"] for image in images]),
                np.array([image["p_right"] for image in images]) if calibrated else None,
                np.array([image["gate_width"] for image in images]),
                np.array([image["gate_margin"] for image in images]),
                np.array([image["answers"][image["gate_width"]] for image in images]),
                None if point is None else point["lambda"],
            )
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{source} is no file of `slicewise-models evaluate --json`: {error!r}") from error

    @property
    def mean_madds(self) -> float:
        """Mean served MAdds per image under the gate."""
        return float(self.madds_L[self.widths_N].mean())

    @property
    def gate_accuracy(self) -> float:
        return float(self.correct_NL[np.arange(len(self.widths_N)), self.widths_N].mean())

    def curve(self) -> tuple[F64, F64]:
        """(mean served MAdds, top-1) over operating points; the one point where there is no calibration."""
        if self.p_right_NL is None:
            return np.array([self.mean_madds]), np.array([self.gate_accuracy])
        chosen = list(self.choices)
        return gate_curve(
            self.p_right_NL[:, chosen], self.correct_NL[:, chosen], self.madds_L[chosen], self.madds_L[-1]
        )

    def sureness(self) -> F64:
        """How surely [N] every image belongs at its width, comparable among images of one width.

        At the gate's narrowest choice the probability of being right there; at the others what the gate wins
        by not taking the narrowest. (Neighbouring choices nearly tie, so the margin over the second best says
        little.) Without a calibration the margin is all there is.
        """
        if self.p_right_NL is None or self.lambda_ is None:
            return self.margin_N
        utility_NL = self.p_right_NL - self.lambda_ * self.madds_L / self.madds_L[-1]
        narrowest = self.choices[0]
        gain_N = utility_NL[np.arange(len(self.widths_N)), self.widths_N] - utility_NL[:, narrowest]
        return np.where(self.widths_N == narrowest, self.p_right_NL[:, narrowest], gain_N)


def read_report(path: Path) -> Report:
    """Parse a file of ``evaluate --json``; ValueError when it is not one, or holds a single width."""
    try:
        data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return Report.of(data, str(path))


def accuracy_figure(reports: Sequence[Report]) -> Figure:
    """Top-1 against mean served MAdds: static ladder, gate over operating points, the evaluated point."""
    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    axes = figure.subplots()
    for index, report in enumerate(reports):
        colour = _SERIES[index % len(_SERIES)]
        prefix = f"{report.label}: " if len(reports) > 1 else ""
        ladder_colour = colour if len(reports) > 1 else _QUIET
        axes.plot(
            report.madds_L / 1e6, 100 * report.correct_NL.mean(0), "o--", color=ladder_colour, linewidth=1.4,
            markersize=5.5, markerfacecolor="white", markeredgewidth=1.4, label=f"{prefix}one slice for all images",
        )  # fmt: skip
        madds, accuracy = report.curve()
        if len(madds) > 1:
            axes.plot(
                madds / 1e6,
                100 * accuracy,
                color=colour,
                linewidth=2.4,
                label=f"{prefix}gate over its operating points",
            )
        axes.plot(
            report.mean_madds / 1e6, 100 * report.gate_accuracy, "*", color=colour, markersize=17,
            markeredgecolor="white", markeredgewidth=1.2, zorder=5, linestyle="none",
            label=prefix + _point_label(report),
        )  # fmt: skip
    counts = sorted({len(report.names) for report in reports})
    title = "Accuracy against compute" + (f", {reports[0].label}" if len(reports) == 1 else "")
    axes.set_title(f"{title}, {' and '.join(f'{count:,}' for count in counts)} images")
    axes.set_xlabel("mean served multiply-adds per image (millions)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_xlim(left=0)
    axes.margins(x=0.04, y=0.08)
    axes.grid(visible=True)
    axes.legend(loc="lower right", fontsize=9.5 if len(reports) > 1 else 10.5)
    return figure


def _point_label(report: Report) -> str:
    share = report.mean_madds / report.madds_L[-1]
    return f"gate as served: {report.gate_accuracy:.1%} at {share:.0%} of the widest"


def shares_figure(report: Report) -> Figure:
    """Share of the images of every class at every gate choice, cheapest class on top."""
    classes = _shown_classes(report)
    figure = Figure(figsize=(7.6, 1.5 + 0.32 * (len(classes) + 1)), layout="constrained")
    axes = figure.subplots()
    groups = [np.ones(len(report.labels_N), bool), *(report.labels_N == index for index in classes)]
    shares_CL = np.stack([width_shares(report.widths_N[group], len(report.madds_L)) for group in groups])
    rows = np.concatenate([[0.0], 1.4 + np.arange(len(classes))])  # all images stand apart
    left = np.zeros(len(rows))
    used = [choice for choice in report.choices if shares_CL[0, choice] > 0]
    for colour, width in zip(_width_colours(len(used)), used, strict=True):
        percent = 100 * shares_CL[:, width]
        name = f"{width} ({report.madds_L[width] / 1e6:.1f} M)"
        axes.barh(rows, percent, left=left, height=0.78, color=colour, edgecolor="white", linewidth=0.8, label=name)
        _label_bars(axes, rows, left, percent, colour)
        left += percent
    axes.set_yticks(rows, ["all images", *(report.classes[index] for index in classes)])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the images (%)")
    axes.spines["left"].set_visible(False)
    figure.suptitle(f"Width by class, {report.label}", x=0.01, ha="left", fontsize=12, fontweight="bold")
    handles, columns = axes.get_legend_handles_labels()[0], min(len(used), 6)
    figure.legend(
        handles=[handle for column in range(columns) for handle in handles[column::columns]],  # filled by columns
        loc="outside lower center", ncols=columns, title="width (served multiply-adds per image)",
        handlelength=1.1, columnspacing=1.4, fontsize=10, title_fontsize=10,
    )  # fmt: skip
    return figure


def _shown_classes(report: Report) -> list[int]:
    """Classes that have images, from cheap to costly; of too many the ends."""
    madds_N = report.madds_L[report.widths_N]
    present = [index for index in range(len(report.classes)) if (report.labels_N == index).any()]
    present.sort(key=lambda index: madds_N[report.labels_N == index].mean())
    if len(present) <= CLASSES_LIMIT:
        return present
    return present[: CLASSES_LIMIT // 2] + present[-CLASSES_LIMIT // 2 :]


def _width_colours(count: int) -> list[tuple[float, float, float, float]]:
    """Light to dark from the narrowest choice to the widest."""
    viridis = mpl.colormaps["viridis"]
    return [viridis(float(at)) for at in np.linspace(0.92, 0.12, count)]


def _label_bars(
    axes: Axes, rows: F64, left: F64, percent: F64, colour: tuple[float, float, float, float]
) -> None:  # fmt: skip
    """The number inside of every bar that has room for it."""
    is_light = np.dot(colour[:3], (0.299, 0.587, 0.114)) > 0.5
    for row, start, value in zip(rows, left, percent, strict=True):
        if value >= 6:
            axes.text(
                start + value / 2, row, f"{value:.0f}", ha="center", va="center", fontsize=9,
                color=_INK if is_light else "white",
            )  # fmt: skip


def examples_figure(report: Report, data: Path) -> Figure:
    """For every gate choice the images that most surely belong there, with label, and the answer if wrong.

    Raises ValueError when an image is not in ``data``.
    """
    choices = [choice for choice in report.choices if (report.widths_N == choice).any()]
    figure = Figure(figsize=(1.12 * EXAMPLES + 1.3, 1.42 * len(choices) + 0.6), layout="constrained")
    grid = figure.subplots(len(choices), EXAMPLES, squeeze=False)
    title = f"Surest examples of every width, {report.label} (\N{BALLOT X}: wrong answer)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    sureness_N, files = report.sureness(), ImageFiles(data)
    for row, choice in enumerate(choices):
        here = np.flatnonzero(report.widths_N == choice)
        chosen = here[np.argsort(-sureness_N[here], kind="stable")][:EXAMPLES]
        for column, axes in enumerate(grid[row]):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if column < len(chosen):
                _show_example(axes, report, int(chosen[column]), files)
        share = len(here) / len(report.widths_N)
        grid[row][0].set_ylabel(
            f"width {choice}\n{report.madds_L[choice] / 1e6:.1f} M\n{share:.0%} of all", rotation=0, ha="right",
            va="center", fontsize=10, labelpad=8, linespacing=1.4,
        )  # fmt: skip
    return figure


def _show_example(axes: Axes, report: Report, image: int, files: ImageFiles) -> None:
    axes.imshow(np.asarray(read_thumbnail(files, report.names[image])), interpolation="lanczos")
    label, answer = report.classes[report.labels_N[image]], report.classes[report.answers_N[image]]
    wrong = answer != label
    text = f"{label}\n\N{BALLOT X} {answer}" if wrong else label
    axes.set_xlabel(text, fontsize=9, labelpad=3, color=_SERIES[1] if wrong else _INK)


def read_thumbnail(files: ImageFiles, name: str) -> Image.Image:
    """The middle square of one image, RGB, no larger than is drawn; ValueError when it is not there or no image."""
    try:
        picture = decode(files.read(name))
    except KeyError as error:
        raise ValueError(f"image {name} of the evaluation is not in {files.path}") from error
    side = min(*picture.size, _THUMBNAIL)
    return ImageOps.fit(picture, (side, side))


def write_figures(reports: Sequence[Report], data: Path | None, out_dir: Path) -> list[Path]:
    """Draw every figure into ``out_dir``; the examples only with ``data``. Returns the files.

    Raises ValueError when two reports have one label, or an image of the examples is not in ``data``.
    """
    labels = [report.label for report in reports]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two evaluations of one model and version; given: {', '.join(labels)}")
    out_dir.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever this machine's matplotlibrc says
        mpl.rcParams.update(_STYLE)
        files = _write(accuracy_figure(reports), out_dir / "accuracy", DPI, svg=True)
        for report in reports:
            slug = re.sub(r"[^\w.-]", "_", report.label)
            files += _write(shares_figure(report), out_dir / f"shares_{slug}", DPI, svg=True)
            if data is not None:
                files += _write(examples_figure(report, data), out_dir / f"examples_{slug}", EXAMPLES_DPI, svg=False)
    return files


def _write(figure: Figure, stem: Path, dpi: int, *, svg: bool) -> list[Path]:
    """Save as PNG, and as SVG when that is wished and small."""
    files = [stem.with_name(f"{stem.name}.png")]
    figure.savefig(files[0], dpi=dpi, metadata={"Software": None})
    drawing = io.BytesIO()
    if svg:
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    if 0 < drawing.tell() <= SVG_LIMIT_BYTES:
        files.append(stem.with_name(f"{stem.name}.svg"))
        files[1].write_bytes(drawing.getvalue())
    return files
