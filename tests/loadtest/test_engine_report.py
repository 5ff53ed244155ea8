import json
import sys

import pytest

from loadtest import engine_commands
from loadtest.cli import main
from loadtest.engine_report import markdown
from loadtest.machine import describe

RECORD = {
    "model": "net", "digest": "sha256:0", "engine": "onnxruntime 1", "processor": "some", "widest": 3,
    "mixed": [0, 1, 2, 3], "madds": [1_000_000, 2_000_000, 3_000_000, 4_000_000], "gate_batch": 32, "block_s": 0.5,
    "seconds": {
        "plain 0": [1.1] * 3, "plain 3": [3.3] * 3, "whole 0": [1.0] * 3, "whole 1": [1.5] * 3, "whole 2": [2.0] * 3,
        "whole 3": [3.2] * 3, "split 0": [1.0003] * 3, "split 1": [1.5003] * 3, "split 2": [2.0003] * 3,
        "split 3": [3.2003] * 3, "mixed": [8.0] * 3, "mixed, trunk of 1": [7.8] * 3, "wholes": [7.7] * 3,
    },
}  # fmt: skip


def rows(report):
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in report.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}


def test_bars_are_held_against_the_medians():
    found = rows(markdown(RECORD, describe(), "slicewise engine"))
    assert found["widest over narrowest, whole networks"][1:] == ["3.200", "3.200 to 3.200", "met"]
    assert found["widest, whole, over the plainly exported graph"][1::2] == ["0.970", "met"]
    assert found["trunk + gate + body beyond whole networks, mean of the widths below"][1::2] == ["0.300 ms", "met"]
    assert found["mixed batch of 4 over four whole networks at batch 1"][1::2] == ["1.039", "met"]
    assert found["whole 3"] == ["3200.000", "3200.000 to 3200.000", "4.0"]
    assert found["mixed"][-1] == ""


@pytest.mark.parametrize(
    ("arm", "values", "figure"),
    [
        ("whole 0", [1.2] * 3, "widest over narrowest, whole networks"),
        ("plain 3", [3.0] * 3, "widest, whole, over the plainly exported graph"),
        ("split 0", [1.01] * 3, "trunk + gate + body beyond whole networks, mean of the widths below"),
        ("wholes", [7.0] * 3, "mixed batch of 4 over four whole networks at batch 1"),
    ],
)
def test_a_figure_beyond_its_bar_is_missed(arm, values, figure):
    report = markdown(RECORD | {"seconds": RECORD["seconds"] | {arm: values}}, describe(), "slicewise engine")
    assert rows(report)[figure][-1] == "**missed**"


@pytest.mark.parametrize(("gate", "verdict"), [(2.0, "met"), (2.5, "**missed**")])
def test_the_gate_is_held_against_the_widest(gate, verdict):
    seconds = RECORD["seconds"] | {"gate batch": [gate] * 3, "widest batch": [3.2] * 3}
    report = markdown(RECORD | {"seconds": seconds}, describe(), "slicewise engine")
    assert rows(report)["gate against widest, images/s, batches of 32"][-1] == verdict


def test_the_command_leaves_record_and_report(monkeypatch, tmp_path, capsys):
    fake = tmp_path / "fake.py"
    fake.write_text(f"import sys\nprint('noise')\nprint({json.dumps(RECORD)!r})\nsys.exit('--fail' in sys.argv)\n")
    run = engine_commands.subprocess.run
    monkeypatch.setattr(
        engine_commands.subprocess, "run", lambda command, **how: run([sys.executable, fake, *command[1:]], **how)
    )
    out = tmp_path / "docs" / "engine"
    assert main(["engine", "--out", str(out), "--", "--model", "net", "--repository", "/some/where"]) == 0
    assert json.loads(out.with_suffix(".json").read_text()) == RECORD
    assert "`slicewise engine --model net --repository where`" in out.with_suffix(".md").read_text()
    assert main(["engine", "--out", str(out), "--", "--fail"]) == 1
    assert "slicewise engine ended with status 1" in capsys.readouterr().err
