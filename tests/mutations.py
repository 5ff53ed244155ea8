"""Hypothesis strategies that break valid inputs: cuts, flips, splices, and lengths that lie.

Few inputs in the suite; HYPOTHESIS_PROFILE=fuzz makes it many (see ``examples``).
"""

import os
import re
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

IS_FUZZING = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFE, 0xFFFF_FFFF)
KIB, MIB = 2**10, 2**20
PROC = Path("/proc/self")


def examples(many, few=40):
    """Settings of one target: ``many`` inputs under the profile fuzz, ``few`` in the suite."""
    return settings(
        deadline=None, max_examples=many if IS_FUZZING else few, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@st.composite
def broken(draw, data, others=(), most=3):
    """``data`` after up to ``most`` mutations; 0 leaves it valid. others: what parts are spliced in from."""
    for _ in range(draw(st.integers(0, most))):
        data = draw(st.sampled_from(MUTATIONS))(draw, data, others)
    return data


def _place(draw, data):
    return draw(st.integers(0, max(0, len(data) - 1)))


def _cut_off(draw, data, _):
    return data[: _place(draw, data)]


def _flip(draw, data, _):
    at = _place(draw, data)
    return data[:at] + bytes(byte ^ (1 << draw(st.integers(0, 7))) for byte in data[at : at + 1]) + data[at + 1 :]


def _lie(draw, data, _):
    """A field of 1, 2 or 4 bytes becomes one of the numbers at which lengths go wrong."""
    at, size = _place(draw, data), draw(st.sampled_from((1, 2, 4)))
    number = draw(st.sampled_from(EDGES)) % 256**size
    return data[:at] + number.to_bytes(size, draw(st.sampled_from(("little", "big")))) + data[at + size :]


def _take_out(draw, data, _):
    at = _place(draw, data)
    return data[:at] + data[at + draw(st.integers(1, 40)) :]


def _put_in(draw, data, _):
    at = _place(draw, data)
    return data[:at] + draw(st.binary(max_size=24)) + data[at:]


def _repeat(draw, data, _):
    at = _place(draw, data)
    return data[:at] + data[at : at + draw(st.integers(1, 60))] * draw(st.integers(1, 5)) + data[at:]


def _splice(draw, data, others):
    other = draw(st.sampled_from(others)) if others else data
    return data[: _place(draw, data)] + other[_place(draw, other) :]


MUTATIONS = (_cut_off, _flip, _flip, _lie, _lie, _take_out, _put_in, _repeat, _splice)


def raised_or(call, *errors):
    """(what ``call`` returns, "") or (None, the message of one of ``errors``); others pass."""
    try:
        return call(), ""
    except errors as error:
        return None, str(error)


@contextmanager
def allocating_at_most(limit_bytes):
    """What is done within holds no more at any moment, as far as Python's allocators and NumPy know."""
    is_nested = tracemalloc.is_tracing()
    if not is_nested:
        tracemalloc.start(1)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        if not is_nested:
            tracemalloc.stop()
    assert peak <= limit_bytes, f"{peak} bytes; allowed: {limit_bytes}"


@contextmanager
def resident_at_most(limit_bytes):
    """What is done within adds no more than this to the memory of the process, whoever allocates it; on Linux."""
    if not PROC.exists():
        yield
        return
    (PROC / "clear_refs").write_text("5")  # the peak is counted anew
    before = _resident_bytes("VmRSS")
    yield
    growth = _resident_bytes("VmHWM") - before
    assert growth <= limit_bytes, f"{growth} bytes; allowed: {limit_bytes}"


def _resident_bytes(kind):
    return int(re.search(rf"{kind}:\s+(\d+)", (PROC / "status").read_text())[1]) * KIB
