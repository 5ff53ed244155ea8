import dataclasses

import pytest

from loadtest.outcomes import Answer, by_second, figures
from loadtest.results import Machine
from loadtest.run_plots import draw_comparison, draw_run
from loadtest.run_report import Generator, RunRecord, TraceFacts


def record(answers: list[Answer], label: str = "gate", rate: float = 10.0) -> RunRecord:
    trace = TraceFacts("t.csv", "", "poisson", {"rate_per_s": rate}, 0, (), len(answers), 4.0, rate, rate, 1.0, None)
    return RunRecord(
        label, "2026-01-02T03:04:05+00:00", Machine("Some CPU", 2, 2**30, "Linux", "3.11", {}), "slicewise-load run",
        "http://host/", trace, 0.0, 20.0, Generator("uvloop", 0.1, 0.1, 1, 10, 10.0, 1.0), figures(answers, 0, 4), (),
        tuple(by_second(answers, 0, 4)), (),
    )  # fmt: skip


@pytest.fixture
def answered() -> list[Answer]:
    """Answers in some of the seconds only, by slices some of which are named in words."""
    widths = ["0", "10", "2", "other"]
    return [
        Answer(at_s, 0, "cat", 20.0, 0.1, 10.0 + at_s, 200, "", widths[k % 4], "2", "gate", 100, "cat")
        for k, at_s in enumerate([0.0, 0.1, 0.2, 0.3, 2.5, 2.6])
    ]


@pytest.fixture
def broken() -> list[Answer]:
    return [Answer(0.5, 0, "", 20.0, 0.1, None, 0, "ConnectionRefusedError")]


def names(paths) -> list[str]:
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    return [path.name for path in paths]


def test_a_run_is_drawn_second_by_second(tmp_path, answered):
    assert names(draw_run(record(answered), tmp_path)) == ["arrivals.png", "widths.png", "latency.png"]


def test_without_an_answer_there_are_arrivals_only(tmp_path, broken):
    assert names(draw_run(record(broken), tmp_path)) == ["arrivals.png"]


def test_runs_are_drawn_side_by_side(tmp_path, answered):
    runs = [record(answered, label, rate) for label in ("gate", "widest") for rate in (10.0, 20.0, 20.0)]
    assert names(draw_comparison(runs, tmp_path)) == ["attainment.png", "accuracy.png"]


def test_without_labels_there_is_no_accuracy_to_draw(tmp_path, answered, broken):
    unlabelled = [dataclasses.replace(answer, label="") for answer in answered]
    assert names(draw_comparison([record(unlabelled), record(broken)], tmp_path)) == ["attainment.png"]
    assert draw_comparison([], tmp_path) == []
