"""The machine that measures: what it is, and how busy it is."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import psutil

from loadtest.results import Machine

PACKAGES = (
    "slicewise", "torch", "onnxruntime", "numpy", "pillow", "opencv-python-headless", "fastapi", "starlette",
    "uvicorn", "uvloop", "h11", "httptools", "orjson", "litserve",
)  # fmt: skip
"""Whose versions change figures; those that are not installed are left out."""


def describe() -> Machine:
    """This machine and what is installed on it."""
    return Machine(
        cpu=_cpu_model(),
        cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages={name: version for name in PACKAGES if (version := _version(name)) is not None},
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(psutil.Process().cpu_affinity() or [])
    except AttributeError:  # not on macOS
        return psutil.cpu_count() or 1


def busy_s() -> float:
    """CPU seconds that all cores together have spent on anything since the machine started."""
    times = psutil.cpu_times()._asdict()
    # guest time is part of user time, and what the hypervisor took is not ours to explain
    left_out = {"idle", "iowait", "guest", "guest_nice", "steal"}
    return float(sum(value for name, value in times.items() if name not in left_out))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
