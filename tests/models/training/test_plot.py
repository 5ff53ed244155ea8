import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image
from support import random_image

from models.training import plot
from models.training.plot import Report, accuracy_figure, examples_figure, read_report, shares_figure, write_figures

MADDS = [10e6, 20e6, 40e6]
CLASSES = ["cat", "dog", "ship"]


def evaluation(count=90, seed=0, calibrated=True, model="shop"):
    """What ``evaluate --json`` would write of a made-up network with three slices, gate over all."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(count):
        p_right = (1 / (1 + np.exp(-(rng.normal(0, 2) + np.arange(3))))).round(5)
        correct = [bool(right) for right in rng.random(3) < p_right]
        label = i % 3
        width = int((p_right - 0.3 * np.array(MADDS) / MADDS[-1]).argmax())
        images.append({
            "name": f"{CLASSES[label]}/{i:03}.png", "label": label, "correct": correct,
            "answers": [label if right else (label + 1) % 3 for right in correct],
            "p_right": p_right.tolist() if calibrated else None, "gate_width": width, "gate_margin": rng.random(),
        })  # fmt: skip
    return {
        "model": model, "version": 1, "mode": "all", "classes": CLASSES, "madds_served": MADDS,
        "gate_choices": [0, 1, 2], "operating_point": {"index": 0, "lambda": 0.3} if calibrated else None,
        "images": images,
    }  # fmt: skip


def report(**how):
    return Report.of(evaluation(**how), "made up")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Fewer pixels, which are what drawing takes its time for."""
    monkeypatch.setattr(plot, "DPI", 50)
    monkeypatch.setattr(plot, "EXAMPLES_DPI", 50)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(evaluation()["images"]):
        file = root / image["name"]
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(random_image(i, size=24))
    return root


def lines(figure):
    return {str(line.get_label()): line for line in figure.axes[0].get_lines()}


def test_all_figures_are_written_as_png_and_the_drawn_ones_as_svg(tmp_path, data):
    files = write_figures([report()], data, tmp_path / "figures")
    assert [file.name for file in files] == [
        "accuracy.png", "accuracy.svg", "shares_shop_1.png", "shares_shop_1.svg", "examples_shop_1.png"
    ]  # fmt: skip
    for file in files:
        if file.suffix == ".svg":
            assert ET.parse(file).getroot().tag.endswith("svg")
            assert 1000 < file.stat().st_size <= plot.SVG_LIMIT_BYTES
        else:
            with Image.open(file) as picture:
                assert picture.width > 300
                assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 8  # something is drawn


def test_equal_evaluations_give_equal_files_and_others_give_others(tmp_path):
    once = write_figures([report()], None, tmp_path / "a")
    again = write_figures([report()], None, tmp_path / "b")
    other = write_figures([report(seed=1)], None, tmp_path / "c")
    for first, second, third in zip(once, again, other, strict=True):
        assert first.read_bytes() == second.read_bytes() != third.read_bytes()


def test_the_ladder_the_curve_and_the_evaluated_point_are_where_the_numbers_are():
    made = report()
    ladder, curve, point = lines(accuracy_figure([made])).values()
    assert ladder.get_xdata().tolist() == [10, 20, 40]
    assert ladder.get_ydata() == pytest.approx(100 * made.correct_NL.mean(0))
    assert len(curve.get_xdata()) > 5
    assert point.get_xdata() == pytest.approx([made.mean_madds / 1e6])
    assert point.get_ydata() == pytest.approx([100 * made.gate_accuracy])
    assert np.interp(point.get_xdata()[0], *curve.get_data()) == pytest.approx(point.get_ydata()[0], abs=2)


def test_a_gate_without_a_calibration_is_one_point():
    assert len(lines(accuracy_figure([report(calibrated=False)]))) == 2


def test_several_models_share_the_axes_and_have_figures_of_their_own(tmp_path):
    both = [report(), report(seed=1, model="other")]
    drawn = lines(accuracy_figure(both))
    assert len(drawn) == 6
    assert {label.split(":")[0] for label in drawn} == {"shop/1", "other/1"}
    names = {file.name for file in write_figures(both, None, tmp_path)}
    assert {"shares_shop_1.png", "shares_other_1.png"} <= names


def test_one_model_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="two evaluations of one model and version"):
        write_figures([report(), report(seed=1)], None, tmp_path)


def test_bars_are_shares_that_add_up_class_by_class():
    made = report()
    axes = shares_figure(made).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "all images"
    assert sorted(names[1:]) == CLASSES
    widths = np.array([[bar.get_width() for bar in bars] for bars in axes.containers])
    assert widths.sum(0) == pytest.approx([100] * 4)
    row = names.index("dog")
    expected = [100 * (made.widths_N[made.labels_N == 1] == width).mean() for width in range(3)]
    assert widths[:, row] == pytest.approx(expected)
    costs = [made.madds_L[made.widths_N[made.labels_N == CLASSES.index(name)]].mean() for name in names[1:]]
    assert costs == sorted(costs)


def test_of_many_classes_the_ends_are_shown(monkeypatch):
    monkeypatch.setattr(plot, "CLASSES_LIMIT", 2)
    assert len(shares_figure(report()).axes[0].get_yticklabels()) == 3


def test_examples_are_the_surest_of_every_width(data):
    made = report()
    axes = np.array(examples_figure(made, data).axes).reshape(3, plot.EXAMPLES)
    here = np.flatnonzero(made.widths_N == 0)
    surest = here[made.p_right_NL[here, 0].argmax()]
    assert axes[0, 0].get_xlabel().split("\n")[0] == CLASSES[made.labels_N[surest]]
    with Image.open(data / made.names[surest]) as picture:
        assert (axes[0, 0].get_images()[0].get_array() == np.asarray(picture)).all()
    for row, width in zip(axes, range(3), strict=True):
        assert row[0].get_ylabel().startswith(f"width {width}\n")
        for cell in row[: (made.widths_N == width).sum()]:
            assert cell.get_xlabel().split("\n")[0] in CLASSES


def test_without_a_calibration_the_margin_says_how_sure_the_gate_is():
    made = report(calibrated=False)
    assert (made.sureness() == made.margin_N).all()


def test_pictures_that_are_not_those_of_the_evaluation_are_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match=r"\.png"):
        examples_figure(report(), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "is no file of `slicewise-models evaluate --json`: KeyError"),
        ("[]", "is no file of"),
        (json.dumps(evaluation() | {"mode": 2}), "has width 2 only"),
    ],
)
def test_what_is_no_evaluation_is_refused(tmp_path, text, message):
    file = tmp_path / "answers.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_report(file)
