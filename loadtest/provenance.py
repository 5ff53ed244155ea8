"""What a report says of itself: machine, versions, commit, time, and the command that makes it again."""

from __future__ import annotations

import argparse
import datetime
import subprocess
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from loadtest.checks import Setting
from loadtest.machine import describe

_LIMIT_S = 10.0
_REPORTS = ("*.md", "*.json", "*.png")
"""What a run itself leaves in the checkout: a change of these is none of the code."""


def setting(command: str, arguments: argparse.Namespace) -> Setting:
    """Of a run that begins now."""
    measured_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Setting(describe(), commit(), measured_at, shown_command(command, arguments))


def commit() -> str:
    """The checkout's commit, with ``+changes`` where code differs from it; ``unknown`` outside a checkout."""
    head = _git("rev-parse", "--short=12", "HEAD")
    left_out = [f":(exclude,glob)**/{pattern}" for pattern in _REPORTS]
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *left_out)
    return "unknown" if not head else f"{head}+changes" if changed else head


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip()


def shown_command(command: str, arguments: argparse.Namespace) -> str:
    """The command for the record: flags in their order, paths by their last part alone, no credentials."""
    words = ["slicewise-load", command]
    for name, value in vars(arguments).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] * value
        elif isinstance(value, list):
            words += [f"{flag}={item}" for item in value]
        elif isinstance(value, Path):
            words.append(f"{flag}={value.name}")
        elif value is not None and not callable(value):
            words.append(f"{flag}={without_user(value) if name == 'url' else value}")
    return " ".join(words)


def without_user(url: str) -> str:
    """The URL without a user's name and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
