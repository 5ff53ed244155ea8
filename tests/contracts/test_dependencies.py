"""The page of dependencies is about what is pinned, and what is pinned is what the project asks for."""

import re
import tomllib
from pathlib import Path

from deploy import dependencies

ROOT = Path(__file__).parents[2]


def normal(name):
    """PEP 503: one spelling for each package."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_table_is_the_lock_and_what_the_packages_state():
    page = dependencies.PAGE.read_text()
    assert len(re.findall(r"(?m)^\| [\w-]+ \| \d", page)) == len(dependencies.pinned()) > 0
    assert dependencies.updated(page) == page, "run: python -m deploy.dependencies"


def test_every_licence_is_stated():
    assert [name for name, _ in dependencies.pinned() if dependencies.licence(name) in ("not stated", "BSD")] == []


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {normal(re.match(r"[\w-]+", dependency)[0]) for dependency in project["dependencies"]}
    assert asked <= {normal(name) for name, _ in dependencies.pinned()}
