"""What the documentation promises is what the code has: commands, routes, headers, settings, metrics, links."""

import json
import re
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from models.cli import COMMANDS
from service.api.problems import TABLE
from service.app import create_app, load_checkpoints
from service.engine_study import EngineSettings
from service.profiler import ProfileSettings
from service.request import Reason
from service.scheduler_study import SchedulerSettings
from service.settings import ZOO, Settings
from service.simulator import SimulateSettings
from service.telemetry import Telemetry

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "deploy/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
OPERATIONS = ROOT / "docs" / "operations.md"
API = ROOT / "docs" / "api.md"
DATA_FLAGS = ("-F", "-d", "--data", "--data-binary")
# Errors of the table that have no class of their own.
UNCLASSED = {(405, "method_not_allowed"), (431, "headers_too_large"), (500, "internal")}


class Curl(NamedTuple):
    """One curl example: where it goes and what it sends."""

    verb: str
    path: str
    headers: dict[str, str]


def code_lines(page: Path) -> list[str]:
    """The commands of a page's fenced blocks, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


def parse_curl(line: str) -> Curl:
    words = shlex.split(line[line.index("curl ") :])
    headers = dict(b.split(": ", 1) for a, b in pairwise(words) if a == "-H")
    (url,) = (word for word in words if word.startswith("localhost:8000"))
    verb = "post" if any(word in DATA_FLAGS for word in words) else "get"
    return Curl(verb, urlsplit(f"//{url}").path, headers)


CURLS = [parse_curl(line) for page in (ROOT / "README.md", API) for line in code_lines(page) if "curl " in line]


def table(page: Path, heading: str) -> list[list[str]]:
    """The cells of the table whose header row begins with ``heading``."""
    match = re.search(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    assert match is not None, f"{page.name} has no table of {heading}"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in match[1].splitlines()]


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def shown(value: object) -> str:
    """A default as the table of settings spells it."""
    if value == ZOO:
        return "`models/zoo`"
    if value == "":
        return "empty"
    if isinstance(value, list):
        return f"`{json.dumps(value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


@pytest.fixture(scope="module")
def openapi(repository: Path) -> dict[str, Any]:
    settings = Settings(_cli_parse_args=[], repository=repository, model=["tiny"])
    return create_app(settings, load_checkpoints(settings)).openapi()


@pytest.fixture
def operation(openapi: dict[str, Any]) -> Callable[[Curl], dict[str, Any] | None]:
    """The operation that a curl example reaches, or None."""

    def find(curl: Curl) -> dict[str, Any] | None:
        for template, verbs in openapi["paths"].items():
            if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), curl.path):
                found: dict[str, Any] | None = verbs.get(curl.verb)
                return found
        return None

    return find


SETTINGS = {
    "serve": Settings,
    "check": Settings,
    "profile": ProfileSettings,
    "simulate": SimulateSettings,
    "engine": EngineSettings,
    "scheduler": SchedulerSettings,
}


def test_the_two_commands_are_make_targets() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [line.split()[1] for line in code_lines(ROOT / "README.md") if line.startswith("make ")]
    assert named == ["serve", "test"]
    assert set(named) <= set(targets)


def test_console_commands_exist() -> None:
    for page in PAGES:
        for line in code_lines(page):
            words = line.split()
            if words and words[0].endswith("bin/slicewise-models"):
                assert words[1] in COMMANDS, f"{page.name}: {line}"
            if words and words[0].endswith("bin/slicewise"):
                flags = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
                settings = SETTINGS.get(words[1])
                assert settings is not None, f"{page.name}: {line}"
                assert flags <= set(settings.model_fields), f"{page.name}: {line}"


def test_the_examples_show_every_knob() -> None:
    assert {name for curl in CURLS for name in curl.headers} >= {
        "Compute-Budget", "Latency-Budget", "Accuracy-Floor", "Slice-Width", "Priority", "X-Request-ID",
    }  # fmt: skip


@pytest.mark.parametrize("curl", CURLS, ids=lambda curl: f"{curl.verb} {curl.path} {' '.join(curl.headers)}")
def test_curl_examples_fit_the_routes(operation: Callable[[Curl], dict[str, Any] | None], curl: Curl) -> None:
    found = operation(curl)
    assert found is not None, "no such route"
    declared = {parameter["name"] for parameter in found.get("parameters", ()) if parameter["in"] == "header"}
    assert set(curl.headers) - {"Content-Type"} <= declared
    if "Content-Type" in curl.headers:
        assert curl.headers["Content-Type"] in found["requestBody"]["content"]


def test_the_route_table_is_complete(openapi: dict[str, Any]) -> None:
    documented = {span for row in table(API, "route") for span in code_spans(row[0])}
    built = {f"{verb.upper()} {path}" for path, verbs in openapi["paths"].items() for verb in verbs}
    assert documented == built | {"GET /", "GET /docs", "GET /openapi.json"}


def test_every_request_header_of_the_api_is_documented(openapi: dict[str, Any]) -> None:
    documented = {span for row in table(API, "header") for span in code_spans(row[0])}
    parameters = openapi["paths"]["/v1/classify"]["post"]["parameters"]
    assert documented - {"traceparent", "tracestate"} == {p["name"] for p in parameters if p["in"] == "header"}


@pytest.mark.parametrize("page", [API, OPERATIONS], ids=lambda page: page.name)
def test_the_error_tables_are_the_table_of_problems(page: Path) -> None:
    documented = {(int(row[0]), name) for row in table(page, "status") for name in code_spans(row[1])}
    assert documented == set(TABLE.values()) | UNCLASSED


def test_the_reasons_are_documented_in_their_order() -> None:
    documented = [row[0].strip("`") for row in table(ROOT / "docs" / "concepts.md", "reason")]
    assert documented == [reason.value for reason in Reason]


def test_settings_are_documented_with_their_defaults() -> None:
    documented = {row[0].strip("`"): row[1] for row in table(OPERATIONS, "setting")}
    assert documented == {name: shown(field.default) for name, field in Settings.model_fields.items()}


def test_variables_that_are_named_exist() -> None:
    known = {f"SLICEWISE_{name.upper()}" for name in Settings.model_fields} | {"SLICEWISE_DATA_DIR"}
    for page in PAGES:
        assert set(re.findall(r"SLICEWISE_[A-Z_]*[A-Z]", page.read_text())) <= known, page.name


def test_metrics_are_documented_with_their_type_and_labels() -> None:
    documented = {
        row[0].strip("`"): (row[1], set(filter(None, row[2].split(", ")))) for row in table(OPERATIONS, "metric")
    }
    built: dict[str, tuple[str, set[str]]] = {}
    for collector in vars(Telemetry()).values():
        for family in getattr(collector, "describe", list)():
            suffix = "_total" if family.type == "counter" else ""
            built[family.name + suffix] = (family.type, set(collector._labelnames))
    assert documented == built


def test_metrics_named_in_prose_exist() -> None:
    names = {f.name + ("_total" if f.type == "counter" else "") for f in Telemetry().registry.collect()}
    for page in PAGES:
        assert set(re.findall(r"`(slicewise_\w+)`", page.read_text())) <= names, page.name


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), link
