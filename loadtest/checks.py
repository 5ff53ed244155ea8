"""PURE: bars that a run is held to, and what is said of the run itself, for all reports on resilience."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loadtest.results import Machine
from loadtest.tables import machine_lines, table


@dataclass(frozen=True, slots=True)
class Check:
    """One bar: what is asked for, what was found, and whether that holds."""

    title: str
    bar: str
    found: str
    held: bool


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how it was measured. commit: of the code, ``unknown`` outside a checkout."""

    machine: Machine
    commit: str
    measured_at: str
    command: str

    def lines(self) -> list[str]:
        """For the head of a report."""
        return [
            *machine_lines(self.machine), "",
            f"Commit {self.commit}, {self.measured_at}. Made with `{self.command}`.",
        ]  # fmt: skip


def equal(title: str, found: float, wanted: float) -> Check:
    """Exactly so many."""
    return Check(title, f"{wanted:,g}", f"{found:,g}", found == wanted)


def at_least(title: str, found: float, least: float, unit: str = "") -> Check:
    """So many or more."""
    return Check(title, f"at least {least:,g}{unit}", f"{found:,.6g}{unit}", found >= least)


def at_most(title: str, found: float, most: float, unit: str = "") -> Check:
    """So many or fewer; NaN, which nothing was measured for, does not hold."""
    return Check(title, f"at most {most:,g}{unit}", f"{found:,.6g}{unit}", found <= most)


def within(title: str, found: float, wanted: float, share: float) -> Check:
    """As much as wanted, give or take a share of it."""
    off = found / wanted - 1 if wanted else float("nan")
    return Check(
        title, f"within {share:.0%} of {wanted:,.6g}", f"{found:,.6g}, {off:+.2%}", abs(off) <= share
    )  # fmt: skip


def check_table(checks: Iterable[Check]) -> list[str]:
    """Lines of a Markdown table."""
    rows = [[check.title, check.bar, check.found, verdict([check])] for check in checks]
    return table(["figure", "bar", "found", "verdict"], rows)


def verdict(checks: Sequence[Check]) -> str:
    """``held`` when all do and there is one."""
    return "held" if checks and all(check.held for check in checks) else "**missed**"
