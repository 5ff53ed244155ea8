from dataclasses import replace

import pytest

from loadtest.arms import BenchError
from loadtest.checks import Setting
from loadtest.limits_quota import Client, Loaded, Reading, spent, window
from loadtest.limits_record import (
    CacheRecord,
    LimitsRecord,
    QuotaRecord,
    Service,
    Spent,
    Tail,
    first_refusal_s,
    madds_between,
    markdown,
    service_between,
    statuses_between,
)
from loadtest.outcomes import Exchange


def answer(at_s, status=200, madds=10, latency_s=0.5):
    return Exchange(at_s, 0.0, latency_s, status, "", {"compute-MAdds": str(madds)} if status == 200 else {})


ANSWERS = [answer(0.0), answer(1.0, 429), answer(1.4, madds=7), answer(2.0), answer(3.0, 429), Exchange(4.0, 0.0)]


def test_compute_is_counted_when_answers_come():
    assert madds_between(ANSWERS, 0.5, 2.0) == 17
    assert madds_between(ANSWERS, 0.6, 9.0) == 17
    assert statuses_between(ANSWERS, 429, 0.0, 9.0) == 2
    assert statuses_between(ANSWERS, 200, 1.9, 2.5) == 1
    assert first_refusal_s(ANSWERS) == 1.5
    assert first_refusal_s(ANSWERS[:1]) is None


def test_service_is_counted_when_requests_are_due():
    got = service_between(ANSWERS, 0.0, 5.0)
    assert (got.sent_per_s, got.answered_per_s, got.failed, got.p50_ms) == (6 / 5, 3 / 5, 3, 500.0)


def loaded(refused_s=10.0):
    limited = [
        [answer(k / 2, madds=10) for k in range(200)],
        [answer(refused_s, 429), *(answer(k / 2, madds=20) for k in range(200))],
    ]
    limited[1].sort(key=lambda each: each.at_s)
    other = [[answer(k / 2, madds=5) for k in range(200)], []]
    return Loaded([limited, other], [Reading(float(k), 70.0 * k) for k in range(105)])


def test_a_window_begins_behind_the_first_refusal_and_ends_with_a_reading():
    assert window(loaded(), 60.0) == (13.0, 73.0)
    found = spent(loaded(), 60.0)
    assert found.seconds == 60.0
    assert found.ledger_madds == 70 * 60 - 2 * 60 * 5
    assert found.answers_madds == 2 * 60 * 30
    assert found.answered == (120, 120)
    assert found.refused == (0, 0)


def test_a_window_needs_a_refusal_and_time():
    without = loaded()
    without.by_client[0][1] = without.by_client[0][0]
    with pytest.raises(BenchError, match="never refused"):
        window(without, 60.0)
    with pytest.raises(BenchError, match="do not fit"):
        window(loaded(refused_s=60.0), 60.0)


def test_the_key_file_holds_a_digest_and_no_secret():
    text = Client("limited", "secret", "5000").toml()
    assert 'quota = "5000"' in text
    assert '"secret"' not in text
    assert "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b" in text


SPENT = Spent(60.0, 60e9, 60e9, (100, 100), (9, 9))
SERVICE = Service(60.0, 100.0, 100.0, 0, 4.0, 9.0)
QUOTA = QuotaRecord(2, 10**9, 10, 100.0, 100.0, SPENT, SPENT, SERVICE, SERVICE, 0)
TAIL = Tail(0.25, 0.5)
CACHE = CacheRecord("memory", 1000, 0, 0.0, TAIL, TAIL, TAIL, TAIL)


def missed(record):
    return [check.title for check in record.checks() if not check.held]


def test_what_keeps_to_its_limits_holds():
    assert missed(QUOTA) == missed(CACHE) == []


@pytest.mark.parametrize(
    ("quota", "title"),
    [
        (replace(QUOTA, alone=replace(SPENT, ledger_madds=63.1e9)), "MAdds spent alone, 60.0 s, M, by the ledgers"),
        (
            replace(QUOTA, beside=replace(SPENT, answers_madds=56.9e9)),
            "MAdds spent beside the other, 60.0 s, M, by its",
        ),
        (replace(QUOTA, alone=replace(SPENT, refused=(9, 0))), "replicas that answered and refused it alone"),
        (replace(QUOTA, other_alone=replace(SERVICE, failed=1)), "requests of the other that were not answered"),
        (replace(QUOTA, other_beside=replace(SERVICE, failed=1)), "the same with it"),
        (replace(QUOTA, other_beside=replace(SERVICE, answered_per_s=94.0)), "images/s of the other with"),
    ],
)
def test_each_bar_of_quotas_can_be_missed(quota, title):
    (found,) = missed(quota)
    assert found.startswith(title)


@pytest.mark.parametrize(
    ("cache", "title"),
    [
        (replace(CACHE, others=1), "memory: answers that were not from the cache"),
        (replace(CACHE, ledger_madds=1.0), "memory: MAdds added to the ledger"),
        (replace(CACHE, service=Tail(1.1, 1.0)), "memory: a hit in the service, median"),
        (replace(CACHE, service=Tail(0.9, 1.1)), "memory: a hit in the service, p99"),
        (replace(CACHE, excess=Tail(1.1, 2.0)), "memory: a hit beyond /healthz for the client, median"),
    ],
)
def test_each_bar_of_the_cache_can_be_missed(cache, title):
    assert missed(cache) == [title]


def test_the_record_comes_back_and_the_report_says_it(samples, tmp_path):
    setting = Setting(samples.machine, "0123456789ab", "2026-01-02T03:04:05+00:00", "slicewise-load limits")
    record = LimitsRecord(setting, "tiny", 480.0, 64, QUOTA, (CACHE, replace(CACHE, store="Redis", others=3)))
    assert not record.held
    record.save(tmp_path / "limits.json")
    assert LimitsRecord.load(tmp_path / "limits.json") == record
    text = markdown(record)
    assert "| Redis: answers that were not from the cache | 0 | 3 | **missed** |" in text
    assert "were not charged: 4.\n" in markdown(replace(record, quota=replace(QUOTA, store_failures=4)))
    assert "| alone | 60.0 | 60,000 | 60,000 | 60,000 | 100 + 100 | 9 + 9 |" in text
    assert "| with it | 60.0 | 100.0 | 100.0 | 0 | 4.00 | 9.00 |" in text
    assert "| memory | 1,000 | 0 | 0.250, 0.500 |" in text
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json: not a result"):
        LimitsRecord.load(tmp_path / "other.json")
