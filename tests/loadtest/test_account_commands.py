import argparse
import json

import pytest

from loadtest import account_commands as module
from loadtest.account import Account, Column, Section
from loadtest.account_commands import configure_account, run_account


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    configure_account(parser)
    return parser.parse_args(argv)


@pytest.fixture
def flags(tmp_path):
    version = tmp_path / "models" / "large" / "1"
    version.mkdir(parents=True)
    (version / "manifest.json").write_text('{"slices": [0, 0, 0]}')
    return [
        "--images", str(tmp_path / "photos.zip"), "--repository", str(tmp_path / "models"), "--model", "large",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip


@pytest.fixture
def planned(monkeypatch, samples, tmp_path_factory):
    """Nothing is measured; the plans that were asked for."""
    plans = []

    def measure(plan, report):
        plans.append(plan)
        column = Column("ours", ({"total": 7.5},), ({},))
        return Account(samples.machine, "now", plan.setup(), tuple(Section(w, (column,)) for w in plan.widths))

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path_factory.mktemp("work")))
    return plans


def test_an_account_is_left_as_a_record_and_a_report(planned, flags, tmp_path, capsys):
    run_account(parsed(*flags, "--serve-flag=--workers=2", "--rounds", "3"))
    (plan,) = planned
    assert (plan.widths, plan.rounds, plan.clients, plan.serve_flags) == ((2,), 3, 8, ("--workers=2",))
    report = tmp_path / "out" / "account.md"
    assert capsys.readouterr().out.strip() == str(report)
    assert "7.500" in report.read_text()
    record = json.loads((tmp_path / "out" / "account.json").read_bytes())
    assert record["sections"][0]["columns"][0]["costs"] == [{"total": 7.5}]


def test_widths_are_taken_in_order_and_once(planned, flags):
    run_account(parsed(*flags, "--width", "1", "--width", "0", "--width", "1"))
    assert planned[0].widths == (1, 0)


@pytest.mark.parametrize("bad", [("--rounds", "0"), ("--clients", "0"), ("--seconds", "0"), ("--idle-s", "-1")])
def test_figures_without_a_window_are_refused(planned, flags, bad):
    with pytest.raises(ValueError, match="must be at least 1"):
        run_account(parsed(*flags, *bad))
    assert planned == []
