import csv
import io

import pytest

from loadtest.objectives import Finding
from loadtest.outcomes import Answer, by_second, figures
from loadtest.results import Machine
from loadtest.run_report import (
    ARRIVALS_PLOT,
    ATTAINMENT_PLOT,
    Generator,
    RunRecord,
    TraceFacts,
    comparison_markdown,
    markdown,
    mean_rate,
    repetitions,
    requests_csv,
)

MACHINE = Machine("Some CPU", 2, 8 * 2**30, "Linux 6", "3.11.7", {"aiohttp": "3.14"})


def answers(count: int = 40, met: int = 30, send_late_ms: float = 0.1) -> list[Answer]:
    """Ten requests a second, of which the first ``met`` are met and the others late."""
    return [
        Answer(
            at_s=k / 10, image=k, label="cat", limit_ms=20.0, send_late_ms=send_late_ms,
            latency_ms=10.0 if k < met else 50.0, status=200, width=str(k % 3), gate_width="2", reason="gate",
            madds=100, predicted="cat",
        )
        for k in range(count)
    ]  # fmt: skip


def record(label: str = "gate", rate: float = 10.0, seed: int | None = 0, **changes) -> RunRecord:
    parameters = changes.pop("parameters", {"rate_per_s": rate})
    given = changes.pop("answers", answers())
    trace = TraceFacts(
        "trace.csv", "ab" * 32, "poisson", parameters, seed, ("Priority=u=1:1",), 40, 4.0, rate, 2 * rate, 1.0, 1.1
    )
    values = {
        "label": label, "measured_at": "2026-01-02T03:04:05+00:00", "machine": MACHINE, "command": "slicewise-load run",
        "url": "http://host/v1/classify", "trace": trace, "warm_up_s": 0.0, "slo_ms": 20.0,
        "generator": Generator("uvloop", 0.02, 0.5, 7, 2000, 10.0, 1.0), "figures": figures(given, 0, 4),
        "windows": (figures(given, 1, 2),), "seconds": tuple(by_second(given, 0, 4)), "findings": (),
    }  # fmt: skip
    return RunRecord(**(values | changes))


def test_what_is_saved_is_loaded(tmp_path):
    saved = record(findings=(Finding("attainment>=0.9", 0.75, False), Finding("top1>=0.9", None, False)))
    saved.save(tmp_path / "results.json")
    assert RunRecord.load(tmp_path / "results.json") == saved
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_another_file_is_refused_by_name(tmp_path):
    (tmp_path / "other.json").write_text('{"label": 1}')
    with pytest.raises(ValueError, match=r"other\.json: not a result of slicewise-load run"):
        RunRecord.load(tmp_path / "other.json")


def test_the_report_states_machine_trace_and_figures():
    text = markdown(record(), [])
    assert "Some CPU, 2 usable cores, 8.0 GiB, Linux 6, Python 3.11.7. aiohttp 3.14." in text
    assert "`trace.csv`: poisson rate_per_s=10, seed 0, headers `Priority=u=1:1`. 40 requests in 4 s" in text
    assert "mean 10.0 requests/s, peak 20.0 requests/s over 1 s, CV2 of the gaps 1.10." in text
    assert "its Latency-Budget, or 20 ms without one" in text
    assert "| attainment | 75.00% |" in text
    assert "| due, answered and met, requests/s | 10.0, 10.0, 7.5 |" in text
    assert "0.500 CPU ms/request" in text
    assert "| fate | late | 10 | 25.0% |" in text
    assert "| slice served | 0 | 14 | 35.0% |" in text
    assert "| 1 | 2 | 10 | 100.00% |" in text
    assert "did not keep up" not in text
    assert "## Objectives" not in text


def test_objectives_are_reported_met_missed_or_without_a_measurement():
    findings = (Finding("a>=1", 1.0, True), Finding("b>=1", 0.98996, False), Finding("c>=1", None, False))
    text = markdown(record(findings=findings), [])
    assert "| `a>=1` | 1 | met |" in text
    assert "| `b>=1` | 0.98996 | **missed** |" in text
    assert "| `c>=1` | nothing | **missed** |" in text


def test_a_generator_that_fell_behind_is_said_above_the_figures():
    text = markdown(record(answers=answers(send_late_ms=5.0)), [])
    assert "did not keep up: 100.0% of the requests were sent more than 1 ms late (p99 5 ms).**" in text


def test_a_run_without_an_answer_is_still_a_report():
    broken = [Answer(0.5, 0, "", 20.0, 0.1, None, 0, "ConnectionRefusedError")]
    text = markdown(record(answers=broken, windows=()), [])
    assert "| attainment | 0.00% |" in text
    assert "| error | ConnectionRefusedError | 1 | 100.0% |" in text


def test_only_pictures_that_were_drawn_are_shown():
    assert f"]({ARRIVALS_PLOT})" in markdown(record(), [ARRIVALS_PLOT])
    assert "![" not in markdown(record(), [])


def test_runs_are_grouped_by_label_and_trace_whatever_the_seed():
    runs = [record("b", 20.0), record("a", 20.0, seed=1), record("a", 10.0), record("a", 20.0, seed=2)]
    assert len(repetitions([*runs, record("b", 20.0, slo_ms=30.0)])) == 4
    groups = repetitions(runs)
    assert [(group[0].label, mean_rate(group), len(group)) for group in groups] == [
        ("a", 10.0, 1), ("a", 20.0, 2), ("b", 20.0, 1)
    ]  # fmt: skip


def test_a_comparison_lists_runs_and_takes_repeated_ones_together():
    runs = [record("gate", answers=answers(met=met), seed=met) for met in (20, 30, 40)] + [record("widest")]
    text = comparison_markdown(runs, [ATTAINMENT_PLOT])
    assert text.count("| gate | poisson rate_per_s=10 | 10.0 | 20.0 |") == 3
    assert "| gate | poisson rate_per_s=10 | 3 | 75.00% (50.00% to 100.00%) | 100.00% (100.00% to 100.00%) |" in text
    assert "| widest | poisson rate_per_s=10 | 1 |" not in text
    assert f"]({ATTAINMENT_PLOT})" in text


def test_a_trace_of_unknown_origin_goes_by_its_name():
    assert record(parameters={}).trace.title == "poisson trace.csv"


def test_requests_are_listed_one_to_a_line():
    given = [*answers(1), Answer(0.5, 3, "", 20.0, None, None, 0, "not_sent")]
    first, last = csv.DictReader(io.StringIO(requests_csv(given)))
    assert (first["fate"], first["latency_ms"], first["width"], first["predicted"]) == ("met", "10.0", "0", "cat")
    assert (last["fate"], last["latency_ms"], last["error_type"], last["madds"]) == ("failed", "", "not_sent", "")
