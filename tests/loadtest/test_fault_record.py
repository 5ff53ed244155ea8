from dataclasses import replace

import pytest

from loadtest.checks import Setting
from loadtest.corpus import EncodedImage
from loadtest.fault_record import (
    Allowance,
    Counts,
    Done,
    Evidence,
    FaultsRecord,
    Request,
    ScenarioRecord,
    common_checks,
    count,
)
from loadtest.fault_report import markdown
from loadtest.known_answers import Ending
from loadtest.outcomes import Exchange
from loadtest.server_state import State

IMAGE = EncodedImage("image/png", b"png")
KNOWN = {0: {"cat": 1.0}}
RIGHT = b'{"predictions": [{"label": "cat", "probability": 1.0}], "slice": {"width": 0}}'
STATE = State(resident_bytes=400 * 2**20, descriptors=20, queued=0, in_flight=0)


def request(at_s, **changes):
    return Request(at_s, IMAGE, KNOWN, **changes)


def answered(at_s, status=200, body=RIGHT, latency_s=0.01):
    return Exchange(at_s, 0.0, latency_s, status, "", {}, body)


def cut(at_s, failure="ConnectionResetError"):
    return Exchange(at_s, 0.0, failure=failure)


def test_right_answers_are_counted_by_phase():
    requests = [request(at_s) for at_s in (0.0, 1.0, 2.0)]
    exchanges = [answered(at_s, latency_s=(at_s + 1) / 100) for at_s in (0.0, 1.0, 2.0)]
    counts = count(requests, exchanges, [], (1.0, 2.0))
    assert counts.endings == {"right": 3}
    assert counts.kinds == {"image": {"200": 3}}
    assert counts.p50_ms == pytest.approx((10.0, 20.0, 30.0))
    assert counts.slowest_ms == pytest.approx(30.0)
    assert (counts.unexpected, counts.allowed) == (0, 0)


def test_a_failure_is_allowed_only_in_its_time_and_of_its_sort():
    requests = [request(at_s) for at_s in (0.5, 1.5, 1.6, 2.5)]
    exchanges = [cut(0.5), cut(1.5), answered(1.6, 503, b""), cut(2.5)]
    counts = count(requests, exchanges, [Allowance(frozenset({Ending.CUT}), 1.0, 2.0)], (1.0, 2.0))
    assert (counts.allowed, counts.unexpected) == (1, 3)
    assert counts.unexpected_shown[0] == "image at 0.500 s: cut, ConnectionResetError"
    assert counts.unexpected_shown[1].startswith("image at 1.600 s: 429 or 503, 503")
    assert counts.of(Ending.CUT) == 3


def test_a_wrong_answer_is_never_allowed():
    every = Allowance(frozenset(Ending) - {Ending.WRONG}, 0.0, 9.0)
    counts = count([request(1.0)], [answered(1.0, body=b"{}")], [every], (0.0, 9.0))
    assert (counts.of(Ending.WRONG), counts.allowed, counts.unexpected) == (1, 0, 1)


def test_bad_images_are_judged_by_their_statuses_alone():
    bomb = Request(1.0, IMAGE, None, "bomb", (413,))
    allowance = [Allowance(frozenset(Ending), 0.0, 9.0)]
    assert count([bomb], [answered(1.0, 413)], allowance, (0.0, 9.0)).unexpected == 0
    for exchange in (answered(1.0, 400), answered(1.0, 200), answered(1.0, 500), cut(1.0)):
        counts = count([bomb], [exchange], allowance, (0.0, 9.0))
        assert (counts.unexpected, counts.endings) == (1, {})


def counts_of(**changes):
    counts = Counts(9, {"right": 9}, {"image": {"200": 9}}, 0, 0, (), 5.0, (1.0, 2.0, None), (1.0, 2.0, None))
    return replace(counts, **changes)


def evidence(counts=None, after=STATE, **changes):
    return replace(Evidence(counts or counts_of(), STATE, after, 2**29, 256, 256), **changes)


def missed(given):
    return [check.title for check in common_checks(given, 10.0) if not check.held]


def test_a_clean_scenario_holds():
    assert missed(evidence()) == []
    assert missed(evidence(after=replace(STATE, resident_bytes=419 * 2**20))) == []
    assert missed(evidence(after=None, places=0)) == []  # it was meant to end


@pytest.mark.parametrize(
    ("given", "title"),
    [
        (evidence(counts_of(endings={"right": 8, "wrong": 1})), "wrong answers"),
        (evidence(counts_of(kinds={"bomb": {"hung": 1}})), "requests without an end within 10 s"),
        (evidence(counts_of(unexpected=1)), "requests with an end that nothing explains"),
        (evidence(counts_of(endings={"not sent": 1})), "requests that the generator did not send"),
        (evidence(counts_of(kinds={"image": {"500": 2}}), injected=1), "images answered 500, as many as were made"),
        (evidence(injected=1), "images answered 500, as many as were made to fail"),
        (evidence(after=replace(STATE, queued=1)), "images in the queues after the load"),
        (evidence(after=replace(STATE, in_flight=1)), "requests in flight after the load"),
        (evidence(places=255), "places of the queue that are free after it"),
        (evidence(after=replace(STATE, descriptors=21)), "open descriptors after it"),
        (evidence(after=replace(STATE, resident_bytes=421 * 2**20)), "memory after it, of that before"),
    ],
)
def test_each_bar_can_be_missed(given, title):
    (found,) = missed(given)
    assert found.startswith(title)


@pytest.fixture
def record(samples):
    checks = tuple(common_checks(evidence(), 10.0))
    bad = counts_of(kinds={"image": {"200": 9}, "bomb": {"413": 3}}, unexpected=1, unexpected_shown=("bomb at 1 s",))
    given = evidence(bad, after=None, places=0)
    scenarios = (
        ScenarioRecord("calm", "nothing", evidence(), (Done("a deed", 1.0, 2.5),), {"seen": "much"}, checks),
        ScenarioRecord("storm", "everything", given, (), {}, tuple(common_checks(given, 10.0))),
    )
    setting = Setting(samples.machine, "0123456789ab", "2026-01-02T03:04:05+00:00", "slicewise-load faults")
    return FaultsRecord(setting, "tiny", 480.0, True, 240.0, 40.0, 10.0, 64, scenarios)


def test_a_record_comes_back_from_its_file(record, tmp_path):
    record.save(tmp_path / "faults.json")
    assert FaultsRecord.load(tmp_path / "faults.json") == record
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: not a result"):
        FaultsRecord.load(tmp_path / "other.json")


def test_one_missed_bar_is_a_missed_run(record):
    assert not record.held
    assert replace(record, scenarios=record.scenarios[:1]).held


def test_the_report_says_what_was_done_and_found(record):
    text = markdown(record)
    assert "Some CPU" in text
    assert "Commit 0123456789ab" in text
    assert "240 requests/s for 40 s" in text
    assert "* a deed: from 1.00 s to 2.50 s of the load" in text
    assert "* seen: much" in text
    assert "* bomb: 3 times 413" in text
    assert "* unexpected: bomb at 1 s" in text
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith(("| calm", "| storm"))}
    assert rows["| calm"].endswith("| 256 of 256 |")
    storm, calm = (
        next(line for line in text.splitlines() if line.startswith(f"| {name} | 9")) for name in ("storm", "calm")
    )
    assert storm.endswith("| 1.0, 2.0, - | 5.0 | **missed** |")
    assert " | 3 | 0 | 1 | " in storm
    assert calm.endswith("| held |")
