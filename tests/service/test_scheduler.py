import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.request import BEFORE_TRUNK, Bucket, Entry, Step, Window
from service.scheduler import Scheduler

BODIES = [Bucket(Step.BODY, 0), Bucket(Step.BODY, 1)]
LIMITS = {BEFORE_TRUNK: 2, BODIES[0]: 3, BODIES[1]: 1, Bucket(Step.WHOLE, 1): 2}


@dataclass
class Caller:
    """A promise that a test can abandon."""

    gone: bool = False

    def done(self) -> bool:
        return self.gone


def entry(bucket=BEFORE_TRUNK, due_s=1.0, deadline_s=math.inf, caller=None, name=None):
    return Entry(caller or Caller(), name, Window(0, 1), 0.0, due_s, 0.0, deadline_s=deadline_s, bucket=bucket)


def test_an_empty_scheduler_has_no_batch():
    assert Scheduler(LIMITS).next_batch(0.0).batch is None


def test_the_earliest_due_entry_goes_first_and_batches_keep_their_limit():
    scheduler = Scheduler(LIMITS)
    for due_s in (3.0, 1.0, 2.0):
        scheduler.push(entry(due_s=due_s))
    assert [e.due_s for e in scheduler.next_batch(0.0).batch.entries] == [1.0, 2.0]
    assert [e.due_s for e in scheduler.next_batch(0.0).batch.entries] == [3.0]


def test_equal_due_times_keep_the_order_of_arrival():
    scheduler = Scheduler({BEFORE_TRUNK: 8})
    for name in range(8):
        scheduler.push(entry(name=name))
    assert [e.payload for e in scheduler.next_batch(0.0).batch.entries] == list(range(8))


def test_the_queue_with_the_earliest_head_is_served_first():
    scheduler = Scheduler(LIMITS)
    scheduler.push(entry(due_s=2.0))
    scheduler.push(entry(BODIES[1], due_s=1.0))
    assert scheduler.next_batch(0.0).batch.bucket == BODIES[1]
    assert scheduler.next_batch(0.0).batch.bucket == BEFORE_TRUNK


def test_cancelled_entries_are_dropped_not_computed():
    scheduler, gone = Scheduler(LIMITS), Caller()
    scheduler.push(entry(due_s=1.0, caller=gone, name="gone"))
    scheduler.push(entry(due_s=2.0, name="here"))
    gone.gone = True
    selection = scheduler.next_batch(0.0)
    assert [e.payload for e in selection.batch.entries] == ["here"]
    assert [e.payload for e in selection.cancelled] == ["gone"]


def test_late_entries_are_dropped_not_computed_even_when_their_caller_was_answered():
    scheduler = Scheduler(LIMITS)
    scheduler.push(entry(deadline_s=5.0, caller=Caller(gone=True)))
    selection = scheduler.next_batch(5.0)
    assert selection.batch is None
    assert len(selection.expired) == 1
    assert selection.cancelled == ()


def test_prune_finds_dead_entries_behind_living_ones():
    scheduler, gone = Scheduler(LIMITS), Caller(gone=True)
    scheduler.push(entry(due_s=1.0))
    scheduler.push(entry(due_s=2.0, caller=gone))
    assert len(scheduler.prune(0.0).cancelled) == 1
    assert len(scheduler) == 1


def test_waiting_images_are_counted_per_width():
    scheduler = Scheduler(LIMITS)
    assert scheduler.waiting() == {None: 0, 0: 0, 1: 0}
    for bucket in (BEFORE_TRUNK, BODIES[1], Bucket(Step.WHOLE, 1), BEFORE_TRUNK):
        scheduler.push(entry(bucket))
    assert scheduler.waiting() == {None: 2, 0: 0, 1: 2}


def test_clear_hands_everything_back():
    scheduler = Scheduler(LIMITS)
    entries = {entry(bucket) for bucket in LIMITS}
    for e in entries:
        scheduler.push(e)
    assert set(scheduler.clear()) == entries
    assert len(scheduler) == 0


@pytest.mark.parametrize("limits", [{BODIES[0]: 1}, {BEFORE_TRUNK: 0}, {BEFORE_TRUNK: 1, BODIES[0]: -1}])
def test_limits_without_a_trunk_or_below_one_are_refused(limits):
    with pytest.raises(ValueError, match="batch limits"):
        Scheduler(limits)


arrivals = st.lists(
    st.tuples(
        st.sampled_from(list(LIMITS)),
        st.floats(0, 100),  # due
        st.one_of(st.just(math.inf), st.floats(0, 100)),  # deadline
        st.booleans(),  # abandoned before it could run
        st.booleans(),  # ask for a batch after this arrival
    ),
    max_size=60,
)


@given(arrivals)
def test_nothing_is_lost_nothing_served_twice_and_batches_are_dense(events):
    scheduler, now_s = Scheduler(LIMITS), 0.0
    pushed, served, cancelled, expired = [], [], [], []

    def take():
        selection = scheduler.next_batch(now_s)
        cancelled.extend(selection.cancelled)
        expired.extend(selection.expired)
        if selection.batch is None:
            return False
        entries = selection.batch.entries
        assert 1 <= len(entries) <= LIMITS[selection.batch.bucket]
        assert {e.bucket for e in entries} == {selection.batch.bucket}
        assert [e.due_s for e in entries] == sorted(e.due_s for e in entries)
        assert all(not e.abandoned() and e.deadline_s > now_s for e in entries)
        served.extend(entries)
        return True

    for bucket, due_s, deadline_s, gone, ask in events:
        e = entry(bucket, due_s, deadline_s, Caller(gone))
        pushed.append(e)
        scheduler.push(e)
        now_s += 1.0
        if ask:
            take()
    while take():
        pass
    everything = [*served, *cancelled, *expired]
    assert len(scheduler) == 0
    assert sorted(map(id, everything)) == sorted(map(id, pushed))
    assert all(e.abandoned() for e in cancelled)
    assert all(e.deadline_s <= now_s for e in expired)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40))
def test_one_queue_drains_in_order_of_due_time(due_times):
    scheduler = Scheduler({BEFORE_TRUNK: 4})
    for due_s in due_times:
        scheduler.push(entry(due_s=due_s))
    order = []
    while (batch := scheduler.next_batch(0.0).batch) is not None:
        order += [e.due_s for e in batch.entries]
    assert order == sorted(due_times)
