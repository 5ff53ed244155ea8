"""The dashboards are what their code writes, and every panel shows something when the service is loaded."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from deploy.grafana.build import documents
from deploy.grafana.planned import PLANNED
from service.api.problems import TABLE
from service.telemetry import Telemetry

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "grafana" / "dashboards"
RULES = ROOT / "deploy" / "prometheus" / "rules"
BOARDS: dict[str, dict[str, Any]] = {path.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
UNITS = {"short", "s", "reqps", "percentunit"}
# What Grafana would put in. $1 is no variable of Grafana's but a group of label_replace.
VARIABLES = {
    "$__rate_interval": "4s",
    "$__range": "20s",
    "$baseline": "3s",
    "$model": "ds_resnet_tiny_cifar10",
    "$instance": ".+",
    "$1": "$1",
}


class Asked(NamedTuple):
    """One query of one panel."""

    board: str
    panel: str
    expr: str
    legend: str
    instant: bool


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


QUERIES = [
    Asked(name, panel["title"], target["expr"], target.get("legendFormat", ""), target.get("instant", False))
    for name, board in BOARDS.items()
    for panel in panels(board)
    for target in panel["targets"]
]


def declared_series() -> set[str]:
    """Every name that the service exports, as Prometheus stores it."""
    suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return {
        family.name + suffix for family in Telemetry().registry.collect() for suffix in suffixes.get(family.type, [])
    }


def recorded_series() -> set[str]:
    return set(re.findall(r"record: (\S+)", (RULES / "recording.yml").read_text()))


def names_in(promql: str) -> set[str]:
    return {name for name in re.findall(r"[a-zA-Z_:][\w:]*", promql) if "slicewise_" in name}


def test_the_files_are_what_the_code_writes() -> None:
    written = {path.name: path.read_text() for path in FOLDER.glob("*")}
    assert written == documents(), "run: python -m deploy.grafana.build"


def test_every_series_that_is_named_exists() -> None:
    known = declared_series() | recorded_series()
    in_variables = " ".join(str(v.get("query")) for board in BOARDS.values() for v in board["templating"]["list"])
    for promql in (*(query.expr for query in QUERIES), in_variables):
        assert names_in(promql) <= known, promql
    for path in RULES.glob("*.yml"):
        # Groups are named, too; no series is.
        text = re.sub(r"(?m)#.*|name: \w+|runbook: .*", "", path.read_text())
        assert names_in(text) <= known


def test_every_panel_says_what_it_shows_and_in_which_unit() -> None:
    for name, board in BOARDS.items():
        assert len({panel["title"] for panel in panels(board)}) == len(panels(board)), name
        for panel in panels(board):
            place = f"{name}: {panel['title']}"
            y_axis = panel["options"].get("yAxis") or panel["fieldConfig"]["defaults"]
            assert y_axis["unit"] in UNITS, place
            assert len(panel["description"]) > 40, place
            assert panel["datasource"]["uid"] == "${datasource}", place
            box = panel["gridPos"]
            assert box["x"] + box["w"] <= 24, place


def test_every_variable_that_is_used_is_offered() -> None:
    for name, board in BOARDS.items():
        offered = {f"${variable['name']}" for variable in board["templating"]["list"]}
        used = set(re.findall(r"\$(?!_)[a-z]\w*", " ".join(q.expr for q in QUERIES if q.board == name)))
        assert used <= offered
        assert {"$datasource", "$model", "$instance"} <= offered


def test_panels_wait_only_for_what_does_not_exist_yet() -> None:
    there = declared_series() | {error_type for _, error_type in TABLE.values()}
    for planned in PLANNED:
        assert planned.needs not in there, f"{planned.needs} exists: move its panel from PLANNED into a section"


def test_grafana_knows_the_pace_of_the_scrapes() -> None:
    scrapes = re.search(r"scrape_interval: (\w+)", (ROOT / "deploy/prometheus/prometheus.yml").read_text())
    source = (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text()
    assert scrapes
    assert f"timeInterval: {scrapes[1]}\n" in source


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: f"{q.board.removesuffix('.json')}: {q.panel}: {q.legend}")
def test_every_panel_has_data(prometheus: Any, query: Asked) -> None:
    expr = re.sub(r"\$\w+", lambda found: VARIABLES[found[0]], query.expr)
    # The zero that stands for "never happened" would hide a misspelt name.
    found = prometheus.wait_for(expr.replace(" or vector(0)", ""), query.instant)
    assert found, f"no data: {expr}"
    for label in re.findall(r"{{(\w+)}}", query.legend):
        assert any(label in labels for labels in found), f"no label {label}: {expr}"


def test_every_recording_rule_has_data(prometheus: Any) -> None:
    for name in sorted(recorded_series()):
        # What compares with yesterday has nothing to compare with; its unit test gives it a day.
        if not name.endswith(":shift1d"):
            assert prometheus.wait_for(name), f"no data: {name}"


def test_every_rule_is_evaluated_without_error(prometheus: Any) -> None:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > len(recorded_series())
    assert [rule["name"] for rule in rules if rule["health"] == "err"] == []
