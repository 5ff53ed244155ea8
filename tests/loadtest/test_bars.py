import dataclasses

import pytest

from loadtest.bars import TOLERANCE, Verdict, doubts, estimate, reaches, verdict
from loadtest.figures import Estimate
from loadtest.results import Bar, Metric, Side

AT_LEAST = Bar(Metric.THROUGHPUT, Side.AT_LEAST, 1.15)
AT_MOST = Bar(Metric.P99, Side.AT_MOST, 1.10, requests=2000)


@pytest.mark.parametrize(
    ("bar", "found", "expected"),
    [
        (AT_LEAST, Estimate(1.15, 1.07, 1.3), True),
        (AT_LEAST, Estimate(1.149, 1.148, 1.15), False),
        (AT_LEAST, Estimate(1.3, 1.15 - TOLERANCE - 0.001, 1.4), False),
        (AT_LEAST, Estimate(1.3, 1.2, 99.0), True),
        (AT_MOST, Estimate(1.10, 0.5, 1.18), True),
        (AT_MOST, Estimate(1.101, 1.1, 1.101), False),
        (AT_MOST, Estimate(1.0, 0.9, 1.10 + TOLERANCE + 0.001), False),
        (AT_MOST, Estimate(0.2, 0.0, 0.3), True),
    ],
)
def test_a_bar_wants_the_median_and_tolerates_the_unfavourable_end_within_limits(bar, found, expected):
    assert reaches(bar, found) is expected


def test_figures_compare_pair_by_pair(samples):
    found = samples.comparison(1.25)
    assert estimate(Metric.THROUGHPUT, found).median == pytest.approx(1.25)
    assert estimate(Metric.P99, found).median == pytest.approx(1.25)
    assert estimate(Metric.CPU, found).median == pytest.approx(1.0)
    assert estimate(Metric.P50_EXCESS, found).median == pytest.approx(2.5)


def test_enough_good_runs_meet_a_bar(samples):
    assert verdict(AT_LEAST, samples.comparison(1.2)) is Verdict.MET
    assert verdict(AT_MOST, samples.comparison(1.05)) is Verdict.MET


def test_a_figure_beyond_the_bar_misses_it(samples):
    assert verdict(AT_LEAST, samples.comparison(1.1)) is Verdict.MISSED
    assert verdict(AT_MOST, samples.comparison(1.2)) is Verdict.MISSED


def test_too_little_evidence_proves_nothing(samples):
    few = samples.comparison(1.2, pairs=3)
    assert doubts(AT_LEAST, few) == ["3 pairs of 20"]
    assert verdict(AT_LEAST, few) is Verdict.UNPROVEN
    short = dataclasses.replace(samples.comparison(1.2), seconds=1.0)
    assert doubts(AT_LEAST, short) == ["windows of 1 s instead of 10 s"]


def test_a_p99_of_few_requests_proves_nothing(samples):
    bar = Bar(Metric.P99, Side.AT_MOST, 1.10, requests=10**6)
    assert [line.partition(":")[0] for line in doubts(bar, samples.comparison(1.0))] == ["ours", "theirs"]


def test_failures_prove_nothing(samples):
    failing = samples.comparison(1.2, failed={"503": 2})
    assert doubts(AT_LEAST, failing) == ["ours: 40 failures"]
    assert verdict(AT_LEAST, failing) is Verdict.UNPROVEN
    assert verdict(AT_LEAST, samples.comparison(1.0, failed={"503": 2})) is Verdict.MISSED
