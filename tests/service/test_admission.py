from __future__ import annotations

import math

import pytest

from service.admission import admit, check_deadline, predicted_finish_s, retry_after_s
from service.errors import DeadlineExceededError, QueueFullError
from service.latency import LatencyTable

# One image alone: 0.25 s at width 0, 1.125 s at width 1. Exact in binary, so that edges can be tested.
TABLE = LatencyTable({(None, 1): 0.125, (0, 1): 0.125, (1, 1): 1.0})


@pytest.mark.parametrize(("queued", "arriving"), [(0, 1), (0, 8), (7, 1), (8, 0)])
def test_images_enter_while_they_fit(queued: int, arriving: int) -> None:
    admit(queued, 8, arriving, retry_s=1.0)


@pytest.mark.parametrize(("queued", "arriving"), [(8, 1), (7, 2), (0, 9)])
def test_a_full_queue_refuses_and_says_when_to_come_back(queued: int, arriving: int) -> None:
    with pytest.raises(
        QueueFullError, match=f"{queued} images are in work and {arriving} arrive; allowed: 8"
    ) as caught:
        admit(queued, 8, arriving, retry_s=2.5)
    assert caught.value.retry_after_s == 2.5


@pytest.mark.parametrize(
    ("queued", "narrowest_s", "workers", "seconds"),
    [(0, 0.5, 1, 1.0), (10, 0.5, 1, 5.0), (10, 0.5, 2, 2.5), (3, 0.25, 4, 1.0)],
)
def test_retry_after_is_the_backlog_at_the_narrowest_and_at_least_a_second(
    queued: int, narrowest_s: float, workers: int, seconds: float
) -> None:
    assert retry_after_s(queued, narrowest_s, workers) == seconds


def test_the_predicted_finish_is_the_backlog_at_the_narrowest_plus_ones_own_time() -> None:
    assert predicted_finish_s(100.0, 0, TABLE, width=1, workers=1) == 101.125
    assert predicted_finish_s(100.0, 8, TABLE, width=0, workers=1) == 102.25
    assert predicted_finish_s(100.0, 8, TABLE, width=1, workers=2) == 102.125


def test_a_deadline_that_can_just_be_met_is_accepted() -> None:
    check_deadline(now_s=100.0, deadline_s=102.25, queued=8, table=TABLE, width=0, workers=1)
    check_deadline(now_s=100.0, deadline_s=math.inf, queued=10**6, table=TABLE, width=1, workers=1)


def test_a_deadline_that_cannot_be_met_is_refused_at_once_with_both_times() -> None:
    with pytest.raises(DeadlineExceededError) as caught:
        check_deadline(now_s=100.0, deadline_s=102.125, queued=8, table=TABLE, width=0, workers=1)
    assert caught.value.outcome == "refused"
    assert "2125.0 ms are left" in str(caught.value)
    assert "at least 2250.0 ms at slice 0 with 8 images ahead" in str(caught.value)


def test_a_deadline_that_has_passed_leaves_no_time() -> None:
    with pytest.raises(DeadlineExceededError, match=r"^0\.0 ms are left"):
        check_deadline(now_s=100.0, deadline_s=99.0, queued=0, table=TABLE, width=0, workers=1)
