"""``slicewise-load engine``: what ``slicewise engine`` measures on an idle machine, as a report."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from pathlib import Path

from loadtest.arms import BenchError
from loadtest.comparisons import script
from loadtest.engine_report import markdown
from loadtest.machine import describe


def configure_engine(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="FLAG", help="of slicewise engine, after --")
    parser.add_argument("--out", type=Path, required=True, metavar="STEM", help="STEM.json and STEM.md are written")


def run_engine(arguments: argparse.Namespace) -> None:
    """Measure, then write the record and the report. Raises BenchError when the command fails."""
    flags = [flag for flag in arguments.flags if flag != "--"]
    done = subprocess.run([script("slicewise"), "engine", *flags], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise BenchError(f"slicewise engine ended with status {done.returncode}; what it wrote to stderr says why")
    record, machine = json.loads(done.stdout.splitlines()[-1]), describe()
    shown = [Path(flag).name if "/" in flag else flag for flag in flags]
    out: Path = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = markdown(record, machine, f"slicewise engine {shlex.join(shown)}".strip())
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(out.with_suffix(".md"))
