import argparse
import re
from pathlib import Path

from loadtest import provenance
from loadtest.provenance import commit, setting, shown_command


def test_a_command_shows_flags_and_no_folders():
    arguments = argparse.Namespace(
        images=Path("/home/somebody/test.zip"), only=["a", "b"], capacity=None, seconds=40.0, quick=True, slow=False,
        run=print,
    )  # fmt: skip
    shown = "slicewise-load faults --images=test.zip --only=a --only=b --seconds=40.0 --quick"
    assert shown_command("faults", arguments) == shown


def test_the_commit_is_that_of_the_checkout():
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?|unknown", commit())


def test_no_git_is_no_commit(monkeypatch):
    def fail(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(provenance.subprocess, "run", fail)
    assert commit() == "unknown"


def test_changed_code_is_said(monkeypatch):
    monkeypatch.setattr(provenance, "_git", lambda *words: "abc" if words[0] == "rev-parse" else " M service/cli.py")
    assert commit() == "abc+changes"
    assert setting("soak", argparse.Namespace()).lines()[-1].startswith("Commit abc+changes, ")
