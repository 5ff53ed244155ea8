import math

import pytest
from scheduling import Caller, look, push, scheduler, slack

from service.policies import PRICES, Fixed, MaxAcc, MaxBatch, SlackFit
from service.request import Reason, Step, Window


def names(batch):
    return [entry.payload for entry in batch.entries]


def test_an_empty_scheduler_has_no_batch():
    assert scheduler().next_batch(0.0).batch is None


def test_the_image_due_first_goes_first_and_batches_are_as_large_as_pays():
    s = scheduler(batch=2)
    for due_s in (30.0, 10.0, 20.0):
        push(s, due_s=due_s)
    assert [e.due_s for e in s.next_batch(0.0).batch.entries] == [10.0, 20.0]
    assert [e.due_s for e in s.next_batch(0.0).batch.entries] == [30.0]


def test_equal_due_times_keep_the_order_of_arrival():
    s = scheduler(batch=8)
    for name in range(8):
        push(s, name=name)
    assert names(s.next_batch(0.0).batch) == list(range(8))


def test_the_queue_with_the_earliest_head_is_served_first():
    s = scheduler()
    push(s, due_s=20.0)
    push(s, due_s=30.0, window=Window(1, 1, 1))
    push(s, due_s=10.0, look=look(2))
    steps = [(batch.step, batch.width) for batch in (s.next_batch(0.0).batch for _ in range(3))]
    assert steps == [(Step.BODY, 2), (Step.TRUNK, None), (Step.WHOLE, 1)]


def test_a_body_batch_takes_those_behind_the_first_that_are_served_at_its_width():
    s = scheduler(batch=3)
    for name, (wish, hi) in enumerate([(1, 2), (2, 2), (1, 2), (2, 1)]):
        push(s, name=name, look=look(wish), window=Window(0, hi))
    batch = s.next_batch(0.0).batch
    assert (batch.width, names(batch)) == (1, [0, 2, 3])
    assert [route.reason for route in batch.routes] == [Reason.GATE, Reason.GATE, Reason.COMPUTE_BUDGET]
    assert names(s.next_batch(0.0).batch) == [1]


def test_a_body_that_would_be_late_is_narrowed_by_its_deadline():
    s = scheduler(bodies_s=(1.0, 2.0, 4.0))
    push(s, deadline_s=2.5, look=look(2))
    batch = s.next_batch(0.0).batch
    assert (batch.width, batch.routes[0].reason) == (1, Reason.LATENCY_BUDGET)


def test_others_do_not_join_where_they_would_make_the_first_late():
    s = scheduler(batch=2)
    push(s, deadline_s=4.5, look=look(2))
    push(s, deadline_s=9.0, look=look(2))
    assert len(s.next_batch(0.0).batch.entries) == 1  # two would take 7.6 s


@pytest.mark.parametrize(("workers", "waiting", "images"), [(1, 3, 3), (2, 3, 2), (3, 3, 1), (2, 7, 4), (2, 20, 8)])
@pytest.mark.parametrize(
    "fields", [{}, {"look": look(1)}, {"window": Window(1, 1, 1)}], ids=["trunk", "body", "whole network"]
)
def test_a_batch_leaves_the_other_workers_their_share(workers, waiting, images, fields):
    s = scheduler(workers=workers, batch=8)
    for _ in range(waiting):
        push(s, **fields)
    assert len(s.next_batch(0.0).batch.entries) == images


def test_the_last_free_worker_takes_all_that_pays():
    s = scheduler(workers=2, batch=8)
    push(s)
    s.next_batch(0.0)
    for _ in range(7):
        push(s)
    assert len(s.next_batch(0.0).batch.entries) == 7


FLAT = (1.0, 1.0, 4.0)  # the second width takes no longer than the first


@pytest.mark.parametrize(
    ("bodies_s", "first", "second", "width"),
    [
        (FLAT, {"look": look(0, best=1)}, {"look": look(0, best=2)}, 1),
        (FLAT, {"look": look(0, best=1)}, {"look": look(0)}, 0),  # the second would not gain
        (FLAT, {"look": look(0, best=1)}, {"look": look(0, best=1), "window": Window(0, 0)}, 0),  # nor may the second
        ((1.0, 1.1, 4.0), {"look": look(0, best=1)}, {"look": look(0, best=1)}, 0),  # it is not free
        (FLAT, {"look": look(0, best=2)}, {"look": look(0, best=2)}, 0),  # nor is this
    ],
)
def test_a_batch_is_widened_where_that_is_free(bodies_s, first, second, width):
    s = scheduler(slack, bodies_s=bodies_s)
    push(s, **first)
    push(s, **second)
    batch = s.next_batch(0.0).batch
    assert (batch.width, len(batch.entries)) == (width, 2)
    assert {r.reason for r in batch.routes} == {Reason.WIDENED if width else Reason.GATE}
    assert {(r.width, r.gate_width) for r in batch.routes} == {(width, 0)}


def test_nothing_is_widened_under_pressure():
    s = scheduler(slack, bodies_s=FLAT)
    for _ in range(6):
        push(s, due_s=4.0, look=look(0, best=1))
    assert s.next_batch(0.0).batch.width == 0


def test_what_waits_for_another_step_counts_for_the_share():
    s = scheduler(workers=2, batch=8)
    for fields in ({"due_s": 1.0, "look": look(1)}, {"due_s": 2.0, "look": look(1)}, {}, {}):
        push(s, **fields)
    assert len(s.next_batch(0.0).batch.entries) == 2


@pytest.mark.parametrize(
    ("policy", "images"), [(lambda live: Fixed(0, live), 2), (MaxAcc, 4), (MaxBatch, 4), (SlackFit, 4)]
)
def test_batch_sizes_that_were_published_stay_as_they_are(policy, images):
    s = scheduler(policy, workers=2, batch=8)
    for _ in range(4):
        push(s, due_s=1e9)
    assert len(s.next_batch(0.0).batch.entries) == images


def test_a_policy_that_never_asks_runs_whole_networks_within_the_window_of_each_image():
    s = scheduler(lambda live: Fixed(2, live), batch=4)
    for name, hi in enumerate([2, 1, 2]):
        push(s, name=name, window=Window(0, hi))
    batch = s.next_batch(0.0).batch
    assert (batch.step, batch.width, names(batch)) == (Step.WHOLE, 2, [0, 2])
    assert {route.reason for route in batch.routes} == {Reason.POLICY}
    batch = s.next_batch(0.0).batch
    assert (batch.width, batch.routes[0].reason) == (1, Reason.COMPUTE_BUDGET)


def test_without_pressure_gate_slack_serves_what_the_gate_wishes():
    s = scheduler(slack)
    push(s, look=look(2, (2, 0)))
    batch = s.next_batch(0.0).batch
    assert (batch.width, batch.routes[0].reason) == (2, Reason.GATE)


def test_under_pressure_gate_slack_narrows_to_what_all_that_wait_can_bear():
    s = scheduler(slack, batch=1)
    for _ in range(4):  # 4 s each at the wish, 1 s under pressure
        push(s, deadline_s=10.0, look=look(2, (2, 0)))
    batch = s.next_batch(0.0).batch
    assert (batch.width, batch.routes[0].reason) == (0, Reason.LOAD)


def test_under_pressure_the_more_urgent_of_two_equal_images_keeps_its_width():
    widths = (2, *(2 if price < 8 else 0 for price in range(1, 19)), 0)
    for urgency, width in ((0, 2), (7, 0)):
        s = scheduler(slack, batch=1)
        seen = look(2)
        object.__setattr__(seen, "widths", widths)
        push(s, deadline_s=10.0, look=seen, urgency=urgency)
        for _ in range(2):
            push(s, deadline_s=11.0, look=look(2, (2, 1)))
        assert s.next_batch(0.0).batch.width == width


def test_where_not_even_the_narrowest_is_in_time_nobody_is_asked():
    s = scheduler(slack, batch=1)
    for _ in range(9):
        push(s, due_s=5.0)
    batch = s.next_batch(0.0).batch
    assert (batch.step, batch.width, batch.routes[0].reason) == (Step.WHOLE, 0, Reason.LOAD)


def unasking(monkeypatch, *unasked, price=1, **facts):
    """A scheduler at this price of ``gate_slack``; images are not asked, but take these widths at prices from 0 on."""
    s = scheduler(slack, **facts)
    monkeypatch.setattr(s._backlog, "price", lambda *_: price)
    monkeypatch.setattr(s._policy, "unasked", (*unasked, *(0,) * (len(PRICES) - len(unasked))))
    return s


@pytest.mark.parametrize(
    ("left_s", "width", "images", "reason"),
    [(math.inf, 2, 3, "load"), (9.0, 2, 1, "load"), (4.9, 1, 1, "latency_budget"), (2.5, 0, 1, "latency_budget")],
)
def test_images_that_are_not_asked_keep_the_deadline_of_the_first(monkeypatch, left_s, width, images, reason):
    s = unasking(monkeypatch, None, 2, batch=4)
    push(s, deadline_s=left_s)
    for _ in range(2):
        push(s)
    batch = s.next_batch(0.0).batch
    assert (batch.step, batch.width, len(batch.entries)) == (Step.WHOLE, width, images)
    assert {route.reason for route in batch.routes} == {Reason(reason)}


def test_nobody_is_narrowed_for_the_deadline_of_another(monkeypatch):
    s = unasking(monkeypatch, None, 2, batch=4)
    push(s, deadline_s=2.5)
    others = {push(s), push(s)}
    assert s.next_batch(0.0).batch.width == 0
    batch = s.next_batch(0.0).batch
    assert (batch.width, set(batch.entries)) == (2, others)


def test_batches_of_images_that_are_not_asked_are_as_large_as_suits_the_width_that_budgets_leave(monkeypatch):
    """At the price's own width four would be in time."""
    s = unasking(monkeypatch, None, 0, batch=4)
    for _ in range(4):
        push(s, window=Window(2, 2), deadline_s=9.0)
    batch = s.next_batch(0.0).batch
    assert (batch.width, len(batch.entries), batch.routes[0].reason) == (2, 1, Reason.ACCURACY_FLOOR)


@pytest.mark.parametrize(("urgency", "width"), [(0, 2), (3, 1), (7, 0)])
def test_urgency_moves_the_width_of_images_that_are_not_asked(monkeypatch, urgency, width):
    s = unasking(monkeypatch, *(2,) * 5, *(1,) * 5, price=8)
    push(s, urgency=urgency, due_s=1.0)
    push(s, urgency=3, due_s=2.0)
    assert s.next_batch(0.0).batch.width == width


def test_urgent_images_are_asked_by_themselves_where_others_are_not(monkeypatch):
    s = unasking(monkeypatch, *(None,) * 5, price=8, batch=4)
    first = push(s, urgency=0, due_s=1.0)
    push(s, urgency=3, due_s=2.0)
    batch = s.next_batch(0.0).batch
    assert (batch.step, batch.entries) == (Step.TRUNK, (first,))


def test_what_was_learnt_is_forgotten_where_nothing_is_let_in():
    s = scheduler(slack)
    s._times.learn(None, 1, 8.0, 0.0)
    s._times.learn(0, 1, 8.0, 0.0)
    s.make_room(0.0, math.inf, Window(0, 2), 3)
    stretched_s = s.finish_s(0.0, math.inf, Window(0, 2))
    s.make_room(900.0, math.inf, Window(0, 2), 3)
    assert s.finish_s(900.0, math.inf, Window(0, 2)) - 900.0 < stretched_s


def test_cancelled_entries_are_dropped_not_computed():
    s, gone = scheduler(), Caller()
    push(s, due_s=1.0, caller=gone, name="gone")
    push(s, due_s=2.0, name="here")
    gone.gone = True
    selection = s.next_batch(0.0)
    assert names(selection.batch) == ["here"]
    assert [e.payload for e in selection.cancelled] == ["gone"]


def test_what_cannot_be_in_time_any_more_is_dropped_even_when_its_caller_was_answered():
    s = scheduler(trunk_s=1.0, bodies_s=(1.0, 2.0, 4.0))
    push(s, deadline_s=5.0, caller=Caller(gone=True))
    selection = s.next_batch(3.5)
    assert selection.batch is None
    assert len(selection.expired) == 1
    assert selection.cancelled == []


def test_prune_finds_dead_entries_behind_living_ones():
    s = scheduler()
    push(s, due_s=1.0)
    push(s, due_s=2.0, caller=Caller(gone=True))
    assert len(s.prune(0.0).cancelled) == 1
    assert len(s) == 1


def test_waiting_images_are_counted_per_width():
    s = scheduler()
    assert s.waiting() == {None: 0, 0: 0, 1: 0, 2: 0}
    push(s)
    push(s, look=look(1))
    push(s, window=Window(1, 1, 1))
    push(s)
    assert s.waiting() == {None: 2, 0: 0, 1: 2, 2: 0}


def test_the_least_urgent_image_that_is_due_last_is_given_up():
    s = scheduler()
    for name, (urgency, due_s) in enumerate([(3, 9.0), (7, 1.0), (7, 2.0), (5, 9.0)]):
        push(s, name=name, urgency=urgency, due_s=due_s)
    assert s.has_less_urgent(6)
    assert s.shed(3, 4) is None
    assert [entry.payload for _ in range(2) for entry in s.shed(3, 1)] == [2, 1]
    assert s.shed(3, 2) is None
    assert [entry.payload for entry in s.shed(3, 1)] == [3]
    assert not s.has_less_urgent(3)
    assert s.shed(3, 1) is None
    assert len(s) == 1


def test_who_has_left_gives_no_place_up():
    s, gone = scheduler(), Caller()
    push(s, name=0, due_s=9.0, urgency=7, caller=gone)
    push(s, name=1, due_s=1.0, urgency=5)
    gone.gone = True
    assert s.shed(3, 2) is None
    assert [entry.payload for entry in s.shed(3, 1)] == [1]


def test_only_what_waits_can_be_given_up():
    s, gone = scheduler(batch=1), Caller()
    push(s, due_s=1.0, urgency=7)
    push(s, due_s=2.0, urgency=6, caller=gone)
    assert s.next_batch(0.0).batch is not None
    assert s.has_less_urgent(5)
    gone.gone = True
    s.prune(0.0)
    assert not s.has_less_urgent(0)


def can_finish(s, now_s, deadline_s, window):
    """Whether there is room at no one's cost: nobody is less urgent than 7."""
    return s.make_room(now_s, deadline_s, window, 7) is not None


def test_no_image_is_promised_what_cannot_be_kept():
    s, whole = scheduler(workers=2), Window(0, 2)
    for _ in range(4):  # 1.9 s each at the narrowest, on 2 workers
        assert can_finish(s, 0.0, 4.5, whole)
        push(s, deadline_s=4.5)
    assert not can_finish(s, 0.0, 4.5, whole)
    assert can_finish(s, 0.0, 6.0, whole)
    assert not can_finish(s, 0.0, 6.0, Window(2, 2))  # 4.8 s, begun after 3.8 s
    assert can_finish(s, 0.0, math.inf, Window(2, 2))


def test_no_image_is_let_in_that_would_make_others_late():
    s = scheduler()
    push(s, deadline_s=4.5)
    push(s, deadline_s=4.5)
    assert not can_finish(s, 0.0, 3.0, Window(0, 2))
    s.next_batch(0.0)
    assert not can_finish(s, 0.0, 3.9, Window(0, 2))  # the worker is busy


def test_less_urgent_images_make_room_as_few_as_it_takes():
    s = scheduler(batch=1)
    for name, (urgency, deadline_s) in enumerate([(5, 4.0), (6, 6.0), (3, 7.5), (7, 50.0)]):
        push(s, name=name, urgency=urgency, deadline_s=deadline_s)
    assert s.make_room(0.0, 12.0, Window(0, 2), 3) == []
    # It would be in time, and the third image late. The last one is not in the way of either.
    assert [e.payload for e in s.make_room(0.0, 5.0, Window(0, 2), 3)] == [1]
    assert len(s) == 3


def test_whom_an_exit_has_answered_frees_nothing_and_stays():
    s = scheduler(batch=1, has_exit=True, bodies_s=(1e-6, 2.0, 4.0))
    answered = push(s, name="answered", urgency=7, deadline_s=8.9, look=look(2))
    push(s, name="wider", urgency=7, deadline_s=8.9, look=look(2), window=Window(1, 2))
    for _ in range(7):
        push(s, name="unseen", urgency=5, deadline_s=8.9)
    assert [e.payload for e in s.make_room(0.0, 9.0, Window(0, 2), 3)] == ["wider"]
    assert s.is_answered(answered)
    assert [e.payload for e in s.shed(3, 1)] == ["answered"]  # it frees a place


def test_nobody_is_given_up_in_vain():
    s = scheduler(batch=1)
    for deadline_s in (4.0, 4.5):
        push(s, urgency=7, deadline_s=deadline_s)
    assert s.make_room(0.0, 1.5, Window(0, 2), 0) is None  # 2 s, even alone
    assert s.make_room(0.0, 4.2, Window(0, 2), 7) is None
    assert len(s) == 2


def test_clear_hands_everything_back():
    s = scheduler()
    entries = {push(s), push(s, look=look(0)), push(s, window=Window(2, 2, 2))}
    assert set(s.clear()) == entries
    assert len(s) == 0
