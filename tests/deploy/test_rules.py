"""Recording and alert rules: their syntax, what they do, and where they send whoever is called."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
ALERTS = (FOLDER / "rules" / "alerts.yml").read_text()
NAMES = re.findall(r"alert: (\w+)", ALERTS)


def promtool(*arguments: str | Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("needs promtool: apt-get install prometheus")
    done = subprocess.run([program, *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_and_its_rules_are_valid() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", *sorted(FOLDER.glob("rules/*.yml")))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("tests/*.yml")), ids=lambda path: path.stem)
def test_the_rules_do_what_their_unit_tests_say(path: Path) -> None:
    promtool("test", "rules", path)


def test_every_alert_has_a_unit_test_and_a_runbook() -> None:
    tested = " ".join(path.read_text() for path in FOLDER.glob("tests/*.yml"))
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "dashboards.md").read_text(), re.MULTILINE)
    assert headings == NAMES
    for name in NAMES:
        assert re.search(rf"alertname: {name}\n +eval_time: \w+\n +exp_alerts:\n +- exp_labels", tested), name
        assert f"runbook: docs/dashboards.md#{name.lower()}\n" in ALERTS


def test_recorded_names_have_a_level_a_metric_and_operations() -> None:
    names = re.findall(r"record: (\S+)", (FOLDER / "rules" / "recording.yml").read_text())
    assert len(set(names)) == len(names) > 15
    for name in names:
        assert re.fullmatch(r"job(_[a-z]+)*:slicewise_[a-z_]+:[a-z0-9_]+", name), name
