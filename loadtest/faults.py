"""``slicewise-load faults``: the service under load while something goes wrong."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from loadtest.arms import Window
from loadtest.comparisons import Network, slicewise_server
from loadtest.fault_record import FaultsRecord
from loadtest.fault_report import markdown
from loadtest.fault_scenarios import SCENARIOS
from loadtest.fault_stage import Plan, Scenario, perform
from loadtest.provenance import setting
from loadtest.rehearsal import (
    BAR_MISSED,
    Corpus,
    check_capacity,
    configure_network,
    learn,
    measured_capacity,
    say,
    work_folder,
)
from loadtest.victim import Victim

STEM = "faults"
WARM_UP_S = 3.0


def configure_faults(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add = parser.add_argument
    names = [scenario.name for scenario in SCENARIOS]
    configure_network(parser)
    add("--only", action="append", choices=names, metavar="SCENARIO", help=f"repeated; of {', '.join(names)}")
    add("--seconds", type=float, default=40.0, help="length of each load (default: %(default)s)")
    add("--share", type=float, default=0.5, help="of the capacity that the load takes (default: %(default)s)")
    add("--capacity", type=float, metavar="RATE", help="images/s, if it is not to be measured")
    add("--capacity-s", type=float, default=10.0, help="how long it is measured (default: %(default)s)")
    add("--image-count", type=int, default=64, help="different images at most (default: %(default)s)")
    add("--request-limit-s", type=float, default=10.0, help="then a request hangs (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help=f"folder for {STEM}.json and {STEM}.md")


def run_faults(arguments: argparse.Namespace) -> None:
    """Measure, perform, report; SystemExit 2 when a bar is missed. Raises ValueError, BenchError, ServerError."""
    a = arguments
    if not (0 < a.share < 1 and a.seconds > 0 and a.request_limit_s > 0):
        raise ValueError("--share must lie between 0 and 1, --seconds and --request-limit-s above 0")
    check_capacity(a.capacity)
    network, about = Network(a.model, a.images, a.repository), setting("faults", a)
    work = work_folder()
    capacity = a.capacity or measured_capacity(network, (), Window(WARM_UP_S, a.capacity_s))
    say(f"capacity {capacity:.0f} images/s")
    plan = Plan(
        network, _corpus(network, work, a.image_count), capacity * a.share, a.seconds, a.request_limit_s, work
    )  # fmt: skip
    chosen = [scenario for scenario in SCENARIOS if scenario.name in (a.only or [s.name for s in SCENARIOS])]
    record = FaultsRecord(
        about, a.model, capacity, a.capacity is None, plan.rate_per_s, a.seconds, a.request_limit_s,
        len(plan.corpus.images), (),
    )  # fmt: skip
    a.out.mkdir(parents=True, exist_ok=True)
    for scenario in chosen:  # after each: what was seen outlives what fails next
        record = _with(record, scenario, plan)
        leave(record, a.out)
    print(a.out / f"{STEM}.md")
    if not record.held:
        sys.exit(BAR_MISSED)


def _corpus(network: Network, work: Path, most: int) -> Corpus:
    with Victim(slicewise_server(network), work / "known-answers.log") as server:
        return learn(server, network, most)


def _with(record: FaultsRecord, scenario: Scenario, plan: Plan) -> FaultsRecord:
    say(f"{scenario.name}: {scenario.title}")
    found = perform(scenario, plan)
    for check in found.checks:
        if not check.held:
            say(f"  missed: {check.title}: {check.bar}, found {check.found}")
    say(f"  {found.verdict}")
    return record.with_scenario(found)


def leave(record: FaultsRecord, folder: Path) -> None:
    """Write record and report."""
    record.save(folder / f"{STEM}.json")
    (folder / f"{STEM}.md").write_text(markdown(record), encoding="utf-8")
