"""What machine this is: measurements and optimised graphs hold for one only."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from pathlib import Path


@cache
def _first_processor() -> dict[str, str]:
    """The first entry of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def processor() -> str:
    """The CPU's own name where the system tells it, else its architecture."""
    return _first_processor().get("model name") or platform.machine()


def processor_id() -> str:
    """Name, architecture and a digest of the instruction sets: equal where compiled code may be shared."""
    found = _first_processor()
    flags = found.get("flags") or found.get("Features") or ""
    digest = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:12]
    return f"{processor()}, {platform.machine()}, {digest}"
