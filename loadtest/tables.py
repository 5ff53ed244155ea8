"""PURE: what all reports have in common: Markdown tables, and the machine that was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loadtest.results import Machine


def machine_lines(machine: Machine) -> list[str]:
    """What it was measured on."""
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    memory_gib = machine.memory_bytes / 2**30
    return [
        f"{machine.cpu}, {machine.cores} usable cores, {memory_gib:.1f} GiB, {machine.system}, "
        f"Python {machine.python}. {packages}."
    ]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [_row(heads), _row(["---"] * len(heads)), *(_row(row) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
