"""``slicewise-load account``: where the CPU time of one request goes, here and in the tuned server."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from loadtest.account import markdown
from loadtest.account_measure import Plan, measure
from loadtest.arms import Window
from loadtest.comparisons import Network, widest_slice

RECORD, REPORT = "account.json", "account.md"


def configure_account(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.add_argument("--images", type=Path, required=True, metavar="PATH", help="folder or zip of images")
    parser.add_argument("--repository", type=Path, required=True, metavar="DIR", help="repository that holds --model")
    parser.add_argument("--model", default="ds_mbnet_imagenet")
    parser.add_argument("--width", type=int, action="append", help="forced slice, repeated for several; the widest")
    parser.add_argument("--clients", type=int, default=8, help="connections of the closed loop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each window")
    parser.add_argument("--warm-up-s", type=float, default=1.0, help="not counted, before each window")
    parser.add_argument("--idle-s", type=float, default=3.0, help="how long each server is watched without a request")
    parser.add_argument("--serve-flag", action="append", default=[], metavar="FLAG", help="more for slicewise serve")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"folder for {RECORD} and {REPORT}")


def run_account(arguments: argparse.Namespace) -> None:
    """Measure, then write the record and the report. Raises ValueError, BenchError and ServerError."""
    if min(arguments.clients, arguments.rounds) < 1 or min(arguments.seconds, arguments.idle_s) <= 0:
        raise ValueError("--clients and --rounds must be at least 1, --seconds and --idle-s above 0")
    network = Network(arguments.model, arguments.images, arguments.repository)
    widths = tuple(dict.fromkeys(arguments.width or [widest_slice(network)]))
    window = Window(arguments.warm_up_s, arguments.seconds)
    work = Path(tempfile.mkdtemp(prefix="slicewise-load-"))
    _say(f"servers log to {work}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leave no stopped server behind
    plan = Plan(
        network, widths, arguments.clients, arguments.rounds, window, arguments.idle_s, work,
        tuple(arguments.serve_flag),
    )  # fmt: skip
    account = measure(plan, _say)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / RECORD).write_text(json.dumps(account.to_json(), indent=1) + "\n", encoding="utf-8")
    (arguments.out / REPORT).write_text(markdown(account), encoding="utf-8")
    print(arguments.out / REPORT)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
