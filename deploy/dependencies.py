"""The licence table of docs/dependencies.md, from the metadata of the packages that are installed.

``python -m deploy.dependencies`` at the root rewrites it, with the development environment, which holds what
requirements.lock pins.
"""

from __future__ import annotations

import re
from importlib.metadata import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "dependencies.md"
HEAD = "| package | version | licence |\n|---|---|---|\n"
# What packages wrote before their metadata asked for SPDX's names. Anything else is shown as it is.
SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "MIT License": "MIT",
}
READ = {"Jinja2": "BSD-3-Clause", "mpmath": "BSD-3-Clause", "sympy": "BSD-3-Clause"}
"""Their metadata says no more than BSD; their licence files have three clauses."""


def pinned() -> list[tuple[str, str]]:
    """Name and version of every package in requirements.lock, in its order."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [(name, version) for name, _, version in (line.partition("==") for line in lines) if version]


def licence(package: str) -> str:
    """The licence that the installed package states: its SPDX expression, else its name, else its classifiers."""
    if package in READ:
        return READ[package]
    stated = metadata(package)
    if "License-Expression" in stated:
        return stated["License-Expression"]
    name = stated["License"].strip() if "License" in stated else ""
    if name and "\n" not in name:
        return SPDX.get(name, name)
    classifiers = [c.rpartition(" :: ")[2] for c in stated.get_all("Classifier", []) if c.startswith("License :: ")]
    return " OR ".join(SPDX.get(name, name) for name in classifiers) or "not stated"


def table() -> str:
    """The table in Markdown, one row for each pinned package."""
    return HEAD + "".join(f"| {name} | {version} | {licence(name)} |\n" for name, version in pinned())


def updated(page: str) -> str:
    """The page with its table made anew."""
    return re.sub(re.escape(HEAD) + r"(\|.*\n)*", lambda _: table(), page)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
