import contextlib
import json
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest

from loadtest import pressure_study
from loadtest.cli import main
from loadtest.machine import describe
from loadtest.policy_plan import Capacity, Evaluated
from loadtest.pressure_plan import (
    BUDGET_TAUS,
    RECOVERED_S,
    STEP_TRACE_S,
    Delays,
    Findings,
    Refusals,
    budgets,
    recovered,
    refusals,
    step_budget,
)
from loadtest.pressure_report import markdown
from loadtest.servers import ServerSpec

CAPACITY = Capacity(500.0, 2, 1.5, 0.25)
NETWORK = Evaluated("net/1", (1_000_000, 2_500_000_000), (0.8, 0.9))
DELAYS = Delays((1.0,) * 99 + (2.0,), (1.0,) * 90 + (3.9,) * 10)


def second(start_s, **counts):
    """Figures of one second in which nothing was due, but for these counts."""
    return SimpleNamespace(**{"met": 0, "late": 0, "requests": 0, "infeasible": 0, "mean_madds": 1e6} | counts,
                           start_s=float(start_s), end_s=start_s + 1.0)  # fmt: skip


def test_budgets_are_multiples_of_the_narrowest_time():
    assert str(step_budget(CAPACITY)) == "Latency-Budget=40.0ms:1"
    mix = budgets(CAPACITY)
    assert [value for value, _ in mix.shares] == [f"{4.0 * taus}ms" for taus in BUDGET_TAUS]


def test_only_the_second_second_after_the_step_is_judged():
    run = [second(at, met=9, requests=10 + at, infeasible=at) for at in range(int(STEP_TRACE_S))]
    assert recovered([*run, *run]) == (18, 20)
    assert recovered(one for one in run if one.start_s != RECOVERED_S[0]) == (0, 0)


def live(at_s, fate, limit_ms=10.0, image=0):
    return {"at_s": str(at_s), "image": str(image), "fate": fate, "limit_ms": str(limit_ms)}


def twin(at_s, finish_s="", predicted_s="", image=0):
    return {"at_s": repr(at_s), "image": str(image), "finish_s": str(finish_s), "predicted_s": str(predicted_s)}


def test_a_refusal_is_judged_by_what_the_twin_says_of_that_arrival():
    rows = [
        live(0, "met"),
        live(1, "late"),
        live(2, "expired"),
        live(3, "refused"),
        live(4, "refused"),
        live(5, "refused"),
    ]
    said = [twin(0.0, 0.001), twin(1.0), twin(2.0), twin(3.0, 3.0077), twin(4.0, 4.0076), twin(5.0, "", 5.02)]
    found = refusals(rows, said)  # the budget of 10 ms is beyond 1.3 times 7.6 ms, not of 7.7 ms
    assert found == Refusals(accepted=3, in_time=1, refused=3, wrongly=1)
    assert (found.in_time_share, found.wrongly_share) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_another_trace_is_an_error():
    with pytest.raises(ValueError, match="1 s is not in"):
        refusals([live(1, "met")], [twin(1.0, 2.0, image=1)])


def test_nothing_let_in_and_nothing_refused_is_no_failure():
    assert Refusals(0, 0, 0, 0).in_time_share == 1
    assert Refusals(0, 0, 0, 0).wrongly_share == 0


@pytest.mark.parametrize(
    ("met", "wrongly", "verdicts"), [(99, 0, ["met"] * 4), (98, 6, ["**missed**", "met", "**missed**", "met"])]
)
def test_the_report_judges_the_three_bars(met, wrongly, verdicts):
    record = SimpleNamespace(
        trace=SimpleNamespace(duration_s=STEP_TRACE_S),
        seconds=[second(at, met=met, requests=100) for at in range(int(STEP_TRACE_S))],
    )
    scheduler = {"waiting": 10_000, "workers": 2, "us_per_image": {"gate_slack": 19.9, "gate": 20.1}}
    found = Findings((met, 100), Refusals(100, 98, 100, wrongly), scheduler, DELAYS)
    text = markdown(CAPACITY, NETWORK, [record], found, describe())
    assert "`net/1`, 2 slices of 1.0 to 2,500.0 M multiply-adds and 80.00% to 90.00% top-1" in text
    judged = [line for line in text.splitlines() if "met." in line or "**missed**" in line or "| met |" in line]
    *before, last = verdicts
    expected = [*before, "19.9 | met", "20.1 | **missed**", last]
    assert [verdict in line for verdict, line in zip(expected, judged, strict=True)] == [True] * 6
    assert f"| 0 | 100 | 0.{met}00 | 1.0 |" in text


def test_the_study_runs_what_is_missing(monkeypatch, tmp_path, capsys):
    """No server, no simulator: both leave what the study reads."""
    said = []

    def served(a, policy, trace, out, *_):
        said.append(out.name)
        assert trace.exists()
        out.mkdir(parents=True, exist_ok=True)
        (out / "widths.png").write_bytes(b"")
        (out / "requests.csv").write_text("at_s,image,fate,limit_ms\n")

    def call(command, what, *flags):
        said.append(what)
        given = {"--overhead-ms": "1.000", "--back-ms": "0.240", "--cores": "2", "--worker-priority": "idle"}
        assert given.items() <= dict(pairwise(flags)).items()
        out = tmp_path / "out" / "twin"
        out.mkdir()
        (out / "simulation.json").write_text("{}")
        (out / "budgets.gate_slack.csv").write_text("at_s,image,finish_s,predicted_s\n")

    record = SimpleNamespace(trace=SimpleNamespace(duration_s=2.0), seconds=[second(7, met=1, requests=1)])
    monkeypatch.setattr(pressure_study, "served", served)
    monkeypatch.setattr(pressure_study, "call", call)
    monkeypatch.setattr(pressure_study.RunRecord, "load", lambda _: record)
    (tmp_path / "eval.json").write_text(json.dumps({"model": "m", "version": 1, "madds_served": [1], "top1": [0.5]}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "delays.json").write_text(json.dumps({"floor_ms": [1.0], "service_ms": [9.0]}))
    said_before = {"waiting": 10, "workers": 1, "us_per_image": {"gate": 1.0}}
    (tmp_path / "out" / "scheduler.json").write_text(json.dumps(said_before))
    (tmp_path / "capacity.json").write_text(
        json.dumps(
            {
                "images_per_s": 500.0,
                "workers": 2,
                "overhead_ms": 1.0,
                "ask_ms": 0.5,
                "back_ms": 0.24,
                "worker_priority": "idle",
            }
        )
    )
    arguments = ["pressure", "--images", "some.zip", "--image-count", "20", "--evaluation",
                 str(tmp_path / "eval.json"), "--repeats", "2", "--capacity", str(tmp_path),
                 "--out", str(tmp_path / "out")]  # fmt: skip
    main(arguments)
    assert said == ["step-seed-0", "step-seed-1", "budgets", "simulate"]
    assert "8.00 ms above the floor; at most 3 ms: **missed**" in (tmp_path / "out" / "report.md").read_text()
    assert "1.0000 (2 of 2)" in (tmp_path / "out" / "report.md").read_text()
    main(arguments)
    assert said.count("simulate") == 1
    assert main([*arguments[:-1], str(tmp_path / "other"), "--worker-priority", "low"]) == 1
    assert "--worker-priority low; measured in --capacity: idle" in capsys.readouterr().err


def test_delays_are_asked_for_in_turns(monkeypatch, tmp_path):
    """A real server with busy threads stands in for both."""
    monkeypatch.setattr(pressure_study, "DELAY_S", 0.1)
    monkeypatch.setattr(pressure_study, "DELAY_ROUNDS", 2)
    command = (sys.executable, "-m", "loadtest.peers.busy", "--port", "{port}", "--threads", "1")
    monkeypatch.setattr(pressure_study, "server_spec", lambda *_: ServerSpec("busy", command, "/healthz"))
    monkeypatch.setattr(pressure_study, "_saturated", lambda *_: contextlib.nullcontext())
    found = pressure_study._delays(SimpleNamespace(out=tmp_path), Capacity(1.0, 1, 0.0, 0.0))
    assert len(found.floor_ms) == len(found.service_ms) == 20
    assert min(found.floor_ms) > 0
    assert pressure_study._delays(SimpleNamespace(out=tmp_path), CAPACITY) == found
