from dataclasses import replace

import pytest

from loadtest.checks import Setting
from loadtest.fault_record import Counts
from loadtest.server_state import Sample, State
from loadtest.soak_plot import draw_soak
from loadtest.soak_record import PLOT, Part, SoakRecord, markdown

STATE = State(400 * 2**20, 20, 0, 0)


def part(place, p99_ms=20.0, **endings):
    counts = Counts(
        100, {"right": 100} | endings, {}, 0, 0, (), 50.0, (None, 4.0, None), (None, p99_ms, None)
    )  # fmt: skip
    return Part(place * 60.5, place * 60.5 + 60, counts, 4.0, p99_ms, 3)


@pytest.fixture
def record(samples):
    """Fifteen minutes of 400 MiB and 20 ms, with a first minute that is unlike the rest."""
    setting = Setting(samples.machine, "0123456789ab", "2026-01-02T03:04:05+00:00", "slicewise-load soak")
    parts = (part(0, 90.0), *(part(place) for place in range(1, 15)))
    moments = tuple(Sample(float(s), (300 if s < 60 else 400) * 2**20, 20 + s % 3) for s in range(15 * 61))
    return SoakRecord(
        setting, "tiny", ("--workers", "2"), 480.0, False, 336.0, 60.0, 64, parts, moments, STATE, STATE
    )  # fmt: skip


def missed(record):
    return [check.title for check in record.checks() if not check.held]


def last_parts(record, **changes):
    return replace(record, parts=(*record.parts[:-5], *(replace(each, **changes) for each in record.parts[-5:])))


def grown(record, share):
    samples = [
        replace(s, resident_bytes=int(s.resident_bytes * share)) if s.at_s > 600 else s for s in record.samples
    ]  # fmt: skip
    return replace(record, samples=tuple(samples))


def test_a_level_load_holds(record):
    assert missed(record) == []
    assert missed(grown(record, 1.019)) == []
    assert missed(last_parts(record, p99_ms=24.9)) == []


def test_each_bar_can_be_missed(record):
    assert missed(grown(record, 1.021)) == ["memory at the end, MiB, of that at the beginning"]
    assert missed(last_parts(record, p99_ms=25.1)) == ["p99 at the end, ms, of that at the beginning"]
    for field, title in (
        ("descriptors", "open descriptors, idle, after the load"),
        ("queued", "images in the queues after the load"),
        ("in_flight", "requests in flight after the load"),
    ):
        assert missed(replace(record, after=replace(STATE, **{field: 21}))) == [title]
    wrong = replace(record, parts=(*record.parts[:-1], part(14, right=99, wrong=1)))
    assert missed(wrong) == ["right answers", "wrong answers"]


def test_one_bad_minute_is_no_leak(record):
    one = replace(record, parts=(*record.parts[:-1], replace(record.parts[-1], p99_ms=500.0)))
    assert missed(one) == []


def test_the_record_comes_back_and_the_report_says_it(record, tmp_path):
    record.save(tmp_path / "soak.json")
    assert SoakRecord.load(tmp_path / "soak.json") == record
    assert draw_soak(record, tmp_path) == tmp_path / PLOT
    assert (tmp_path / PLOT).read_bytes().startswith(b"\x89PNG")
    text = markdown(record, is_drawn=True)
    assert f"]({PLOT})" in text
    assert "in 15 parts of 60 s" in text
    assert "which takes 0.5 s at most" in text
    assert "tiny with `--workers 2`" in text
    assert "little about leaks" not in text
    assert "| 2 | 100 | 100 | 4.00 | 20.00 | 50.0 | 3 | 400.0 | 20 to 22 |" in text
    assert "little about leaks" in markdown(replace(record, parts=record.parts[:11]), is_drawn=False)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json: not a result"):
        SoakRecord.load(tmp_path / "other.json")
