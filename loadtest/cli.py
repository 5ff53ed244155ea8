"""Console script ``slicewise-load``: measure a server, side by side with others or under a trace."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.account_commands import configure_account, run_account
from loadtest.arms import BenchError, Window
from loadtest.bench import compare
from loadtest.comparisons import LOOP_COMMAND, NAMES, Network, Plan, comparisons
from loadtest.engine_commands import configure_engine, run_engine
from loadtest.faults import configure_faults, run_faults
from loadtest.limits import configure_limits, run_limits
from loadtest.machine import describe
from loadtest.overload import configure_overload, run_overload
from loadtest.plots import draw
from loadtest.policy_study import configure_policies, run_policies
from loadtest.pressure_study import configure_pressure, run_pressure
from loadtest.report import markdown
from loadtest.results import Results
from loadtest.run_commands import (
    configure_compare,
    configure_run,
    configure_trace,
    run_compare,
    run_run,
    run_trace,
)
from loadtest.servers import Fleet, ServerError
from loadtest.soak import configure_soak, run_soak

RESULTS, REPORT = "results.json", "report.md"


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: its line in the help, its flags, and what it does."""

    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _configure_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, metavar="PATH", help="folder or zip of photographs for --model")
    parser.add_argument("--repository", type=Path, metavar="DIR", help="model repository that holds --model")
    parser.add_argument("--model", default="ds_mbnet_imagenet", help="network at photograph size")
    parser.add_argument("--cifar", type=Path, metavar="PATH", help="folder or zip of images for --cifar-model")
    parser.add_argument("--cifar-repository", type=Path, metavar="DIR", help="its repository, if not the shipped one")
    parser.add_argument("--cifar-model", default="ds_resnet_cifar10", help="network with a trained gate")
    parser.add_argument(
        "--loop-command", default=LOOP_COMMAND, metavar="COMMAND",
        help="bare loop whose last line is JSON; the words in braces are filled in (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--width-mix", default="0:10,3:3,7:2,13:1", metavar="WIDTH:SHARE,...")
    parser.add_argument("--serve-flag", action="append", default=[], metavar="FLAG", help="more for slicewise serve")
    parser.add_argument("--clients", type=int, default=8, help="connections that saturate the machine")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each window")
    parser.add_argument("--warm-up-s", type=float, default=2.0, help="not counted, before each window")
    parser.add_argument("--only", action="append", choices=NAMES, help="a comparison; repeated for several")
    parser.add_argument("--update", action="store_true", help="keep what --out holds of other comparisons")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results and report")


def _bench(arguments: argparse.Namespace) -> None:
    work = Path(tempfile.mkdtemp(prefix="slicewise-load-"))
    _say(f"servers log to {work}")
    results = _start(arguments)
    names = tuple(arguments.only or NAMES)
    planned = comparisons(_plan(arguments), names, work)
    for name in names:
        if name not in {comparison.name for comparison in planned}:
            _say(f"{name}: left out, what it needs was not given")
    window = Window(arguments.warm_up_s, arguments.seconds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leave no stopped server behind
    arguments.out.mkdir(parents=True, exist_ok=True)
    with Fleet(work) as fleet:
        for comparison in planned:
            results = results.with_comparison(compare(comparison, fleet, arguments.pairs, window, _say))
            results.save(arguments.out / RESULTS)  # after each: what was measured outlives what fails next
    _write_report(results, arguments.out)


def _start(arguments: argparse.Namespace) -> Results:
    """No results, or those to be updated. Raises ValueError when these are another machine's."""
    path, machine = arguments.out / RESULTS, describe()
    if not arguments.update or not path.exists():
        return Results(machine)
    results = Results.load(path)
    if results.machine != machine:
        raise ValueError(f"{path}: measured on another machine or with other packages; it cannot be updated here")
    return results


def _plan(arguments: argparse.Namespace) -> Plan:
    photos = cifar = None
    if arguments.images is not None and arguments.repository is not None:
        photos = Network(arguments.model, arguments.images, arguments.repository)
    if arguments.cifar is not None:
        cifar = Network(arguments.cifar_model, arguments.cifar, arguments.cifar_repository)
    return Plan(
        photos, cifar, arguments.width_mix, arguments.clients, arguments.loop_command, tuple(arguments.serve_flag)
    )


def _configure_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="what slicewise-load bench wrote")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report; that of the results if absent")


def _report(arguments: argparse.Namespace) -> None:
    _write_report(Results.load(arguments.results), arguments.out or arguments.results.parent)


def _write_report(results: Results, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(markdown(results), encoding="utf-8")
    draw(results, folder)
    print(folder / REPORT)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


COMMANDS = {
    "bench": Command("side-by-side measurements of slicewise and its peers", _configure_bench, _bench),
    "report": Command("the report and its plots, from results", _configure_report, _report),
    "account": Command(
        "where the CPU time of one request goes, here and in a tuned server", configure_account, run_account
    ),
    "engine": Command("the engine by itself: whole networks, the split, mixed batches", configure_engine, run_engine),
    "trace": Command("a trace of arrivals, images and request headers, as a file", configure_trace, run_trace),
    "run": Command("replay a trace against a server, each request at its instant", configure_run, run_run),
    "policies": Command("policies under the same bursts, live and in the twin", configure_policies, run_policies),
    "pressure": Command("a step in the traffic, and deadlines of every length", configure_pressure, run_pressure),
    "overload": Command("ten times what a worker bears: memory stays bounded", configure_overload, run_overload),
    "faults": Command("the service under load while something goes wrong", configure_faults, run_faults),
    "soak": Command("a long load: memory, descriptors and latency stay where they were", configure_soak, run_soak),
    "limits": Command("whether quotas bound compute, and what a hit of the cache takes", configure_limits, run_limits),
    "compare": Command("a table and plots of several runs", configure_compare, run_compare),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; 1 with one line on stderr when a file, a value or a server is bad."""
    parser = argparse.ArgumentParser(prog="slicewise-load", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        command.configure(subparser)
        subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, BenchError, ServerError) as error:
        print(f"slicewise-load: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
