from __future__ import annotations

import pytest

from service.admission import check_room, refuse_deadline, retry_after_s
from service.errors import DeadlineExceededError, QueueFullError
from service.request import Window


@pytest.mark.parametrize(("queued", "arriving"), [(0, 1), (0, 8), (7, 1), (8, 0)])
def test_images_enter_while_they_fit(queued: int, arriving: int) -> None:
    check_room(queued, 8, arriving, retry_s=1.0)


@pytest.mark.parametrize(("queued", "arriving"), [(8, 1), (7, 2), (0, 9)])
def test_a_full_queue_refuses_and_says_when_to_come_back(queued: int, arriving: int) -> None:
    with pytest.raises(
        QueueFullError, match=f"{queued} images are in work and {arriving} arrive; allowed: 8"
    ) as caught:
        check_room(queued, 8, arriving, retry_s=2.5)
    assert caught.value.retry_after_s == 2.5


@pytest.mark.parametrize(
    ("queued", "narrowest_s", "workers", "seconds"),
    [(0, 0.5, 1, 1.0), (10, 0.5, 1, 5.0), (10, 0.5, 2, 2.5), (3, 0.25, 4, 1.0)],
)
def test_retry_after_is_the_backlog_at_the_narrowest_and_at_least_a_second(
    queued: int, narrowest_s: float, workers: int, seconds: float
) -> None:
    assert retry_after_s(queued, narrowest_s, workers) == seconds


def test_a_refused_deadline_is_told_with_both_times_and_the_slice() -> None:
    with pytest.raises(DeadlineExceededError) as caught:
        refuse_deadline(100.0, 102.125, 102.25, Window(1, 3), waiting=8)
    assert caught.value.outcome == "refused"
    assert str(caught.value) == (
        "2125.0 ms are left of the latency budget; predicted: 2250.0 ms at slice 1 with 8 images waiting"
    )


def test_a_deadline_that_others_would_pay_for_says_so() -> None:
    with pytest.raises(DeadlineExceededError, match="at slice 2 with 8 images waiting, some of them promised"):
        refuse_deadline(100.0, 103.0, 102.0, Window(0, 3, 2), waiting=8)


def test_a_deadline_that_has_passed_leaves_no_time() -> None:
    with pytest.raises(DeadlineExceededError, match=r"^0\.0 ms are left"):
        refuse_deadline(100.0, 99.0, 101.0, Window(0, 1), waiting=0)
