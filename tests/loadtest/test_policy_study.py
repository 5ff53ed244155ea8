import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from loadtest import policy_study
from loadtest.cli import main
from loadtest.machine import describe
from loadtest.policy_plan import (
    MEAN_SHARE,
    PEAK_SHARE,
    PEAK_WINDOW_S,
    RATE_STEP,
    TAUS,
    Capacity,
    Outcome,
    base_share,
    capacity,
    draw,
    look_ms,
    means,
    overhead_ms,
    parse_trace_name,
    slice_1_alone,
    sustained,
    trace_name,
)
from loadtest.policy_report import markdown
from loadtest.trace_file import read_trace
from loadtest.traces import mean_rate, peak_rate

CAPACITY = Capacity(500.0, 2, 1.5, 0.25)


def test_tau_and_slo_follow_from_the_capacity():
    assert CAPACITY.tau0_ms == pytest.approx(4.0)
    assert {cv2: CAPACITY.slo_ms(cv2) for cv2 in TAUS} == {2: 40.0, 4: 40.0, 8: 80.0}


def test_a_faster_machine_has_less_time():
    assert CAPACITY.slo_ms(8, speed=1.25) == CAPACITY.slo_ms(8) / 1.25 == 64.0


def test_how_fast_the_machine_is_is_asked_before_and_after(monkeypatch):
    paces = iter([100.0, 300.0])
    monkeypatch.setattr(policy_study, "_loop_per_s", lambda _: next(paces))
    assert policy_study._paced(None, lambda: "found") == ("found", 200.0)


@pytest.mark.parametrize("cv2", TAUS)
def test_bursts_have_the_mean_and_about_the_peak(cv2):
    share = base_share(cv2, 500.0, 20.0, range(4))
    arrivals = [draw(cv2, share, 500.0, 20.0, seed) for seed in range(4)]
    assert sum(mean_rate(a, 20.0) for a in arrivals) / 4 == pytest.approx(MEAN_SHARE * 500, rel=0.05)
    assert sum(peak_rate(a, PEAK_WINDOW_S) for a in arrivals) / 4 == pytest.approx(PEAK_SHARE * 500, rel=0.1)


def test_the_overhead_is_what_the_table_does_not_explain():
    timings = [
        {"width": width, "batch": batch, "p50_s": seconds}
        for width, batch, seconds in [(None, 1, 0.002), (None, 2, 0.002), (0, 1, 0.001), (1, 1, 9.0)]
    ]
    assert overhead_ms(400.0, 2, timings) == pytest.approx(5.0 - 1.0 - 1.0)
    assert overhead_ms(4000.0, 2, timings) == 0.0


class NoServer:
    url = "http://127.0.0.1:1"

    def __init__(self, *_): ...

    def __enter__(self):
        return self

    def __exit__(self, *_): ...


TIMINGS = [{"width": width, "batch": 1, "p50_s": seconds} for width, seconds in ((None, 0.001), (0, 0.0005))]


def test_what_the_loop_and_the_generator_take_is_no_workers_time():
    found = capacity(500.0, 2, TIMINGS, 0.25, loop_ms=1.0, client_ms=0.4)
    assert found == Capacity(500.0, 2, pytest.approx(4.0 - 1.5 - 1.4), 0.25, 0.6, pytest.approx(0.4), 0.4)
    assert found.loop_ms == pytest.approx(1.0)
    assert capacity(500.0, 2, TIMINGS, 0.25, 0.0, 0.0).overhead_ms == overhead_ms(500.0, 2, TIMINGS)


def test_the_loop_takes_no_longer_than_the_rate_allows():
    found = capacity(500.0, 2, TIMINGS, 0.0, loop_ms=2.3, client_ms=1.0)
    assert (found.loop_ms, found.overhead_ms) == (pytest.approx(2.0), 0.0)


def test_the_twin_is_told_of_every_cost():
    flags = replace(CAPACITY, front_ms=0.36, back_ms=0.24, client_ms=0.3).twin_flags()
    assert flags == {
        "--workers": "2", "--overhead-ms": "1.500", "--look-ms": "0.250", "--front-ms": "0.360", "--back-ms": "0.240",
        "--client-ms": "0.300", "--cores": "2",
    }  # fmt: skip


def test_costs_around_batches_are_read_at_both_ends_of_a_run(monkeypatch, tmp_path):
    """No server: one image takes the loop 0.7 ms and the generator 0.3."""
    readings = iter([5.0, 5.7])
    record = SimpleNamespace(trace=SimpleNamespace(requests=1000), generator=SimpleNamespace(cpu_ms_per_request=0.3))
    spec = SimpleNamespace(image_count=10, operating_point=0, worker_priority="low", model="m", images=Path("some.zip"),
                           repository=None)  # fmt: skip
    monkeypatch.setattr(policy_study, "Server", NoServer)
    monkeypatch.setattr(policy_study, "_loop_cpu_s", lambda _: next(readings))
    monkeypatch.setattr(policy_study, "_run", lambda *_: record)
    assert policy_study._around_batches(spec, tmp_path, 100.0) == (pytest.approx(0.7), 0.3)
    assert len((tmp_path / "around.csv").read_text().splitlines()) == pytest.approx(800, rel=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel keeps the time of threads")
def test_the_loop_is_the_first_thread_of_its_process():
    """Here: of this one, in which another thread is busy."""
    own = SimpleNamespace(pid=os.getpid())
    before_s = policy_study._loop_cpu_s(own)
    other = threading.Thread(target=_busy)
    other.start()
    other.join()
    other_s = policy_study._loop_cpu_s(own) - before_s
    _busy()
    assert policy_study._loop_cpu_s(own) - before_s - other_s > 0.05 > other_s


def _busy():
    until_s = time.thread_time() + 0.1
    while time.thread_time() < until_s:
        pass


def test_asking_costs_what_fewer_images_are_sustained():
    assert look_ms(500.0, 400.0, 2) == pytest.approx(1.0)
    assert look_ms(500.0, 510.0, 2) == 0.0


def test_trace_names_come_back():
    assert parse_trace_name(trace_name(4, 17)) == (4, 17)


@pytest.mark.parametrize("limit_per_s", [99.0, 75.0, 60.5, 45.0])
def test_the_sustained_rate_is_the_highest_step_that_holds(limit_per_s):
    asked = []

    def holds(rate_per_s):
        asked.append(rate_per_s)
        return rate_per_s <= limit_per_s

    rate = sustained(holds, 100.0)
    assert rate <= limit_per_s < rate * RATE_STEP
    assert len(asked) <= 6


def test_budgets_leave_slice_1_alone():
    slices = [{"accuracy": a, "madds_served": m} for a, m in ((0.7, 10), (0.81, 20), (0.8, 30))]
    assert slice_1_alone(slices) == ("Compute-Budget=20", "Accuracy-Floor=0.8")
    for accuracies in ((0.7,), (0.8, 0.8), (0.7, None)):
        with pytest.raises(ValueError, match="needed: two and more, the narrowest the lowest"):
            slice_1_alone([{"accuracy": a, "madds_served": 1} for a in accuracies])


def test_no_rate_may_be_sustained():
    assert sustained(lambda _: False, 100.0) == 0


def outcomes(ours, widest, top1=0.9):
    rows = [("gate_slack", ours, top1), ("slackfit", ours, 0.8), ("fixed:0", 0.99, None), ("fixed:widest", widest, 0.9)]
    return [Outcome(cv2, seed, name, value, right) for cv2 in TAUS for seed in range(2) for name, value, right in rows]


def test_seeds_are_averaged():
    found = means([Outcome(2, 0, "a", 0.5, 0.8), Outcome(2, 1, "a", 0.7, None), Outcome(4, 0, "a", 1.0, None)])
    assert found == {(2, "a"): (pytest.approx(0.6), 0.8), (4, "a"): (1.0, None)}


@pytest.mark.parametrize(
    ("ours", "widest", "verdicts"),
    [(0.985, 0.8, ["met", "met"]), (0.97, 0.8, ["**missed**", "met"]), (0.985, 0.9, ["met", "**missed**"])],
)
def test_the_report_judges_the_bound_and_the_widest(ours, widest, verdicts):
    against = [{"policy": "gate_slack", "attainment": {"value": 0.01, "low": 0.0, "high": 0.02}, "top1": None}]
    text = markdown(CAPACITY, outcomes(ours, widest), outcomes(ours, widest, 0.89), against, describe(), 20.0)
    (row,) = (line for line in text.splitlines() if line.startswith("| 8 | 0.9"))
    assert [cell.rsplit(", ")[-1].strip() for cell in row.split("|") if ", " in cell] == verdicts
    assert "| gate_slack | +1.00 [+0.00, +2.00] | - |" in text
    assert "| 8 | gate_slack | +0.0000 | +1.00 |" in text
    assert "80 ms (20 tau0) at CV2 8" in text
    assert "1.50 ms of worker time to every image beside the latency table, the difference between tau0 and" in text


def test_the_report_says_what_is_no_workers_time():
    measured = replace(CAPACITY, front_ms=0.36, back_ms=0.24, client_ms=0.3)
    text = markdown(measured, outcomes(0.9, 0.8), outcomes(0.9, 0.8), [], describe(), 20.0)
    assert "0.60 ms to the event loop (0.36 ms until it is admitted, 0.24 ms for its answer" in text
    assert "0.30 ms to the generator" in text


@pytest.fixture
def faked(monkeypatch, tmp_path):
    """No server, no simulator: both leave what the study reads, and every command is noted."""
    said = []

    def call(command, *arguments):
        said.append((command, arguments[0]))
        if arguments[0] == "simulate":  # what an older capacity.json does not have costs nothing
            assert [arguments[arguments.index(flag) + 1] for flag in ("--overhead-ms", "--front-ms")] == [
                "1.000",
                "0.000",
            ]
        out = arguments[arguments.index("--out") + 1] if "--out" in arguments else None
        if arguments[0] == "simulate":
            traces = arguments[arguments.index("--trace") + 1].split(",")
            names = [path.rsplit("/", 1)[-1].removesuffix(".csv") for path in traces]
            runs = [
                {"trace": name, "policy": policy, "attainment": 0.9, "top1": 0.8}
                for name in names
                for policy in ("gate_slack", "fixed:0", "fixed:5")
            ]
            folder = tmp_path / "out" / "twin"
            folder.mkdir(parents=True)
            (folder / "simulation.json").write_text(json.dumps({"runs": runs, "comparisons": []}))
        else:
            (tmp_path / "out" / "live").mkdir(exist_ok=True)
            folder = tmp_path / "out" / "live" / out.rsplit("/", 1)[-1]
            folder.mkdir()
            (folder / "results.json").write_text("{}")

    figures = SimpleNamespace(attainment=0.95, top1=0.85, late_sends=3)
    monkeypatch.setattr(policy_study, "call", call)
    monkeypatch.setattr(policy_study, "Server", NoServer)
    monkeypatch.setattr(policy_study.RunRecord, "load", lambda _: SimpleNamespace(figures=figures))
    monkeypatch.setattr(policy_study.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "capacity.json").write_text(
        json.dumps({"images_per_s": 50.0, "workers": 2, "overhead_ms": 1.0, "look_ms": 0.5})
    )
    return said


def command(tmp_path, *more):
    return [
        "policies", "--images", "some.zip", "--image-count", "20", "--evaluation", "eval.json", "--seeds", "1",
        "--twin-seeds", "2", "--duration-s", "4", "--live", "gate_slack,fixed:widest", "--out", str(tmp_path / "out"),
        *more,
    ]  # fmt: skip


def test_a_study_runs_what_is_missing_and_reports(faked, tmp_path):
    assert main(command(tmp_path)) == 0
    assert faked == [*[("slicewise-load", "run")] * 6, ("slicewise", "simulate")]
    assert len(list((tmp_path / "out" / "traces").glob("*.csv"))) == 6
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| fixed:widest | 0.9000 / 80.00%" in text
    assert "all live runs: 18." in text
    faked.clear()
    assert main(command(tmp_path)) == 0
    assert faked == []


def test_live_traces_are_stretched_to_how_fast_the_machine_is(faked, monkeypatch, tmp_path):
    kept = tmp_path / "out" / "capacity.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"loop_per_s": 100.0}))
    monkeypatch.setattr(policy_study, "_loop_per_s", lambda _: 80.0)
    assert main(command(tmp_path)) == 0
    traces = tmp_path / "out" / "traces"
    plain, stretched = (read_trace(traces / name) for name in ("cv2-2-seed-0.csv", "live/cv2-2-seed-0-gate_slack.csv"))
    assert stretched.image == plain.image
    assert stretched.at_s == pytest.approx([at_s / 0.8 for at_s in plain.at_s])
    assert set(plain.headers["Latency-Budget"]) == {"400.0ms"}
    assert set(stretched.headers["Latency-Budget"]) == {"500.0ms"}
    assert "0.80 to 0.80 of what it was" in (tmp_path / "out" / "report.md").read_text()


def test_results_of_another_command_are_not_taken_for_this_ones(faked, tmp_path, capsys):
    assert main(command(tmp_path)) == 0
    assert main(command(tmp_path, "--operating-point", "3")) == 1
    assert "--operating-point=0" in (error := capsys.readouterr().err)
    assert "needed: another --out" in error


def test_more_live_seeds_than_twin_seeds_are_refused(tmp_path, capsys):
    assert main(command(tmp_path, "--seeds", "3")) == 1
    assert "allowed: 1 <= seeds <= twin seeds" in capsys.readouterr().err
