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
    Evaluated,
    Loads,
    Outcome,
    Spent,
    base_share,
    capacity,
    draw,
    means,
    median_of,
    overhead_ms,
    parse_trace_name,
    quietest,
    sustained,
    trace_name,
)
from loadtest.policy_report import Findings, markdown
from loadtest.server_state import Metrics
from loadtest.traces import mean_rate, peak_rate

CAPACITY = Capacity(500.0, 2, 1.5, 0.25)


def test_tau_and_slo_follow_from_the_capacity():
    assert CAPACITY.tau0_ms == pytest.approx(4.0)
    assert {cv2: CAPACITY.slo_ms(cv2) for cv2 in TAUS} == {2: 40.0, 4: 40.0, 8: 80.0}


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


TIMINGS = [{"width": width, "batch": 1, "p50_s": seconds} for width, seconds in ((None, 0.001), (0, 0.0005))]
BUSY, CALM = Spent(1.0, 3.0, 0.4, 0.5), Spent(1.2, 3.4, 0.5, 0.9)
ASKED = Spent(1.33, 3.83, 0.5, 1.0)


def test_a_batch_takes_the_loop_what_images_take_more_where_fewer_share_one():
    assert Loads(BUSY, CALM, ASKED).handover_ms == pytest.approx(0.2 / 0.4)
    assert Loads(BUSY, replace(CALM, loop_ms=0.9), ASKED).handover_ms == 0.0
    assert Loads(BUSY, replace(CALM, batches=0.5), ASKED).handover_ms == 0.0


def test_asking_costs_the_loop_and_others_beside_its_batches():
    loads = Loads(BUSY, CALM, ASKED)
    assert loads.ask_loop_ms == pytest.approx(0.13 - 0.5 * 0.1)
    assert loads.ask_ms == pytest.approx((3.83 - 1.33) - (3.4 - 1.2))
    assert (Loads(BUSY, CALM, BUSY).ask_loop_ms, Loads(BUSY, CALM, BUSY).ask_ms) == (0.0, 0.0)


def test_what_the_loop_and_the_generator_take_is_no_workers_time():
    found = capacity(500.0, 2, TIMINGS, Loads(BUSY, CALM, ASKED))
    assert found.overhead_ms == pytest.approx(4.0 - 1.5 - 1.4)
    assert (found.handover_ms, found.front_ms, found.back_ms) == pytest.approx((0.5, 0.6 * 0.75, 0.4 * 0.75))
    assert found.loop_ms(0.5, 1.0) == pytest.approx(1.0)
    assert found.loop_ms(1.0, 0.5) == pytest.approx(1.0 + 0.25 - 0.15)
    assert (found.ask_ms, found.ask_loop_ms, found.client_ms) == pytest.approx((0.3, 0.08, 0.4))


def test_the_loop_takes_no_longer_than_the_rate_allows():
    slow = Loads(replace(BUSY, loop_ms=2.3, client_ms=1.0), replace(CALM, loop_ms=9.0), ASKED)
    found = capacity(500.0, 2, TIMINGS, slow)
    assert (found.loop_ms(0.5, 1.0), found.front_ms, found.overhead_ms) == (pytest.approx(2.0), 0.0, 0.0)


def test_of_several_runs_at_a_load_the_one_counts_that_took_least():
    spent = [Spent(1.0, 6.0, 0.1, 0.5), Spent(3.0, 4.0, 0.2, 0.6), Spent(2.0, 5.0, 0.3, 0.4)]
    assert quietest(spent) == Spent(3.0, 4.0, 0.2, 0.6)


def test_the_twin_is_told_of_every_cost():
    found = replace(CAPACITY, ask_loop_ms=0.05, front_ms=0.36, back_ms=0.24, handover_ms=0.2, client_ms=0.3)
    flags = {
        "--workers": "2", "--overhead-ms": "1.500", "--ask-ms": "0.250", "--ask-loop-ms": "0.050", "--front-ms":
        "0.360", "--back-ms": "0.240", "--handover-ms": "0.200", "--client-ms": "0.300", "--cores": "2",
    }  # fmt: skip
    assert found.twin_flags() == flags
    slower = found.twin_flags(1.5)
    assert {name for name in flags if slower[name] != flags[name]} == flags.keys() - {"--workers", "--cores"}
    assert (slower["--front-ms"], slower["--overhead-ms"]) == ("0.540", "2.250")


class NoServer:
    """One image takes the loop 0.7 ms, the process 1.1 and the generator 0.3; two share a batch."""

    url = "http://127.0.0.1:1"

    def __init__(self, *_): ...

    def __enter__(self):
        self.readings = iter([5.0, 6.1])
        return self

    def __exit__(self, *_): ...

    def cpu_s(self):
        return next(self.readings)

    def metrics(self):
        return Metrics.parse(
            'slicewise_batch_size_count{width="trunk"} 500.0\nslicewise_batch_size_count{width="0"} 400.0\n'
        )


STUDY = SimpleNamespace(
    image_count=10, operating_point=0, worker_priority="low", model="m", images=Path("some.zip"), repository=None
)


def test_what_a_run_takes_is_read_at_both_its_ends(monkeypatch, tmp_path):
    readings = iter([5.0, 5.7])
    figures = SimpleNamespace(attainment=0.5)
    record = SimpleNamespace(
        trace=SimpleNamespace(requests=1000), generator=SimpleNamespace(cpu_ms_per_request=0.3), figures=figures
    )
    monkeypatch.setattr(policy_study, "Victim", NoServer)
    monkeypatch.setattr(policy_study, "_loop_cpu_s", lambda _: next(readings))
    monkeypatch.setattr(policy_study, "_run", lambda *_: record)
    monkeypatch.setattr(policy_study.RunRecord, "load", lambda _: record)
    monkeypatch.setattr(policy_study.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "calm").mkdir()
    spent = policy_study._spent(STUDY, tmp_path, "calm", 100.0, "fixed:0")
    assert spent == Spent(pytest.approx(0.7), pytest.approx(1.1), 0.3, 0.5)
    assert len((tmp_path / "calm.csv").read_text().splitlines()) == pytest.approx(800, rel=0.1)
    assert policy_study._watched(STUDY, "fixed:0", tmp_path / "calm.csv", tmp_path / "calm") == (figures, spent)  # kept


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


def test_no_rate_may_be_sustained():
    assert sustained(lambda _: False, 100.0) == 0


def outcomes(ours, widest, top1=0.9):
    rows = [("gate_slack", ours, top1), ("slackfit", ours, 0.8), ("fixed:0", 0.99, None), ("fixed:widest", widest, 0.9)]
    return [Outcome(cv2, seed, name, value, right) for cv2 in TAUS for seed in range(2) for name, value, right in rows]


def test_seeds_are_averaged():
    found = means([Outcome(2, 0, "a", 0.5, 0.8), Outcome(2, 1, "a", 0.7, None), Outcome(4, 0, "a", 1.0, None)])
    assert found == {(2, "a"): (pytest.approx(0.6), 0.8), (4, "a"): (1.0, None)}


def test_of_repeated_runs_the_median_counts():
    runs = [Outcome(2, 0, "a", x, y, late, slower) for x, y, late, slower in ((0.5, 0.8, 1, 1.0), (0.9, None, 2, 1.1))]
    assert median_of(runs) == Outcome(2, 0, "a", pytest.approx(0.7), 0.8, 3, pytest.approx(1.05))


def study(live, twin, against=()):
    network = Evaluated("net/1", (1_000_000, 2_500_000_000), (0.8, 0.9))
    return Findings(network, live, twin, twin, against, 20.0, 3)


@pytest.mark.parametrize(
    ("ours", "widest", "verdicts"),
    [(0.985, 0.8, ["met", "met"]), (0.97, 0.8, ["**missed**", "met"]), (0.985, 0.9, ["met", "**missed**"])],
)
def test_the_report_judges_the_bound_and_the_widest(ours, widest, verdicts):
    against = [{"policy": "gate_slack", "attainment": {"value": 0.01, "low": 0.0, "high": 0.02}, "top1": None}]
    found = study(outcomes(ours, widest), outcomes(ours, widest, 0.89), against)
    text = markdown(CAPACITY, found, describe())
    (row,) = (line for line in text.splitlines() if line.startswith("| 8 | 0.9"))
    assert [cell.rsplit(", ")[-1].strip() for cell in row.split("|") if ", " in cell] == verdicts
    assert "| gate_slack | +1.00 [+0.00, +2.00] | - |" in text
    assert "| 8 | gate_slack | +0.0000 | +1.00 |" in text
    assert "80 ms (20 tau0) at CV2 8" in text
    assert "`net/1`, 2 slices of 1.0 to 2,500.0 M multiply-adds and 80.00% to 90.00% top-1" in text
    assert "1.50 ms of worker time to every image beside the latency table, the difference between tau0 and" in text


def test_the_report_says_what_is_no_workers_time():
    measured = replace(CAPACITY, front_ms=0.36, back_ms=0.24, client_ms=0.3)
    text = markdown(measured, study(outcomes(0.9, 0.8), outcomes(0.9, 0.8)), describe())
    assert "0.36 ms to the event loop until it is admitted and 0.24 ms for its answer" in text
    assert "0.30 ms to the generator" in text


def test_the_report_says_how_slow_the_machine_was():
    live = [replace(one, slower=1.0 + one.seed / 10) for one in outcomes(0.9, 0.8)]
    assert "in that round: 1.00 to 1.10 times" in markdown(CAPACITY, study(live, outcomes(0.9, 0.8)), describe())


@pytest.fixture
def faked(monkeypatch, tmp_path):
    """No server, no simulator: both leave what the study reads, and every command is noted."""
    said = []

    def call(command, *arguments):
        given = {
            flag: arguments[arguments.index(flag) + 1] for flag in ("--trace", "--out", "--policies", "--front-ms")
        }
        out = Path(given["--out"])
        names = [path.rsplit("/", 1)[-1].removesuffix(".csv") for path in given["--trace"].split(",")]
        said.append((command, out.name, given["--front-ms"]))
        known = {"fixed:widest": "fixed:5"}
        policies = [known.get(name, name) for name in given["--policies"].split(",")]
        runs = [{"trace": name, "policy": p, "attainment": 0.9, "top1": 0.8} for name in names for p in policies]
        out.mkdir(parents=True)
        (out / "simulation.json").write_text(json.dumps({"runs": runs, "comparisons": []}))

    def watched(_, policy, trace, out):
        said.append((policy, trace.stem, out.name))
        return SimpleNamespace(attainment=0.95, top1=0.85, late_sends=3, refused=50, requests=100), LIVE

    monkeypatch.setattr(policy_study, "call", call)
    monkeypatch.setattr(policy_study, "_watched", watched)
    (tmp_path / "out").mkdir()
    kept = {"images_per_s": 50.0, "workers": 2, "overhead_ms": 1.0, "front_ms": 0.4, "back_ms": 0.2, "handover_ms": 0.5}
    (tmp_path / "eval.json").write_text(json.dumps({"model": "m", "version": 1, "madds_served": [1], "top1": [0.5]}))
    (tmp_path / "out" / "capacity.json").write_text(json.dumps(kept))
    return said


LIVE = Spent(1.125, 2.0, 0.1, 0.5)
"""On a machine that takes half as long again as 0.4 ms, half of 0.2, and half of 0.5."""


def command(tmp_path, *more):
    return [
        "policies", "--images", "some.zip", "--image-count", "20", "--evaluation", str(tmp_path / "eval.json"),
        "--seeds", "1",
        "--twin-seeds", "2", "--repeats", "2", "--duration-s", "4", "--live", "gate_slack,fixed:0,fixed:widest",
        "--twin", "gate_slack,fixed:0", "--out", str(tmp_path / "out"), *more,
    ]  # fmt: skip


def test_a_study_runs_every_policy_in_rounds_and_each_round_in_the_twin(faked, tmp_path):
    assert main(command(tmp_path)) == 0
    live = [entry for entry in faked if entry[0] != "slicewise"]
    assert [policy for policy, _, _ in live[:6]] == ["gate_slack", "fixed:0", "fixed:widest", "fixed:widest", "fixed:0",
                                                     "gate_slack"]  # fmt: skip
    assert live[:1] + live[5:6] == [
        ("gate_slack", "cv2-2-seed-0", "cv2-2-seed-0-0-gate_slack"),
        ("gate_slack", "cv2-2-seed-0", "cv2-2-seed-0-1-gate_slack"),
    ]
    assert len(live) == 3 * 2 * 3
    assert faked[len(live) :] == [
        *[("slicewise", f"cv2-{cv2}-seed-0-{number}", "0.600") for cv2 in TAUS for number in (0, 1)],
        ("slicewise", "twin", "0.400"),
    ]
    assert len(list((tmp_path / "out" / "traces").glob("*.csv"))) == 6
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| fixed:widest | 0.9500 / 85.00%" in text
    assert "in that round: 1.50 to 1.50 times" in text
    assert "| 8 | fixed:widest | +0.0500 | +5.00 |" in text
    assert "all live runs: 54." in text


def test_what_the_twin_has_said_is_not_asked_again(faked, tmp_path):
    assert main(command(tmp_path)) == 0
    faked.clear()
    assert main(command(tmp_path)) == 0
    assert [entry for entry in faked if entry[0] == "slicewise"] == []


def test_without_the_narrowest_width_the_machine_is_taken_to_be_as_it_was(faked, tmp_path):
    assert main(command(tmp_path, "--live", "gate_slack")) == 0
    assert {front for name, _, front in faked if name == "slicewise"} == {"0.400"}


def test_no_repeats_are_refused(tmp_path, capsys):
    assert main(command(tmp_path, "--repeats", "0")) == 1
    assert "--repeats 0; allowed: 1 or more" in capsys.readouterr().err


def test_results_of_another_command_are_not_taken_for_this_ones(faked, tmp_path, capsys):
    assert main(command(tmp_path)) == 0
    assert main(command(tmp_path, "--operating-point", "3")) == 1
    assert "--operating-point=0" in (error := capsys.readouterr().err)
    assert "needed: another --out" in error


def test_more_live_seeds_than_twin_seeds_are_refused(tmp_path, capsys):
    assert main(command(tmp_path, "--seeds", "3")) == 1
    assert "allowed: 1 <= seeds <= twin seeds" in capsys.readouterr().err
