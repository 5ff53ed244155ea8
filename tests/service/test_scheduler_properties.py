"""Whatever comes and whatever a policy says: nothing is lost, and batches are what routing says."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling import WIDTHS, Caller, look, push, scheduler, slack

from service.policies import ASK_UNTIL_TOP, NO_LOOK, TOP, Plan
from service.request import Step, Window
from service.routing import route


class Whim:
    """Anything a policy may say, drawn from a list."""

    name, asks_gate, is_priced, is_fair = "whim", True, True, True
    unasked, look_P = ASK_UNTIL_TOP, NO_LOOK

    def __init__(self, draws):
        self._draws, self._at = draws, 0

    def _next(self):
        self._at += 1
        return self._draws[self._at % len(self._draws)]

    def before(self, slack_s, waiting, price):
        draw = self._next()
        return None if draw == WIDTHS else Plan(draw, 1 + draw)

    def after(self, seen, urgency, price):
        return seen.widths[price]

    def looks(self, utility_NG, wish_N):
        raise NotImplementedError

    def renew(self, live):
        pass


arrivals = st.lists(
    st.tuples(
        st.sampled_from([None, look(0), look(2, (2, 1)), look(1)]),
        st.sampled_from([Window(0, 2), Window(0, 1), Window(2, 2), Window(1, 1, 1)]),
        st.floats(0, 100),  # due
        st.one_of(st.just(math.inf), st.floats(0, 100)),  # deadline
        st.booleans(),  # abandoned before it could run
        st.integers(0, 7),
        st.booleans(),  # ask for a batch after this arrival
    ),
    max_size=60,
)


@given(arrivals, st.lists(st.integers(0, WIDTHS), min_size=1, max_size=9))
def test_nothing_is_lost_nothing_served_twice_and_batches_are_dense(events, whims):
    s, now_s = scheduler(lambda _: Whim(whims), workers=2, batch=3), 0.0
    pushed, served, dropped, running = [], [], [], []

    def take():
        selection = s.next_batch(now_s)
        assert all(entry.abandoned() for entry in selection.cancelled)
        assert all(entry.deadline_s < now_s + 8 for entry in selection.expired)  # trunk and narrowest body, as learnt
        dropped.extend((*selection.cancelled, *selection.expired))
        batch = selection.batch
        if batch is None:
            return False
        running.append(batch)
        assert 1 <= len(batch.entries) <= 3
        assert [e.due_s for e in batch.entries] == sorted(e.due_s for e in batch.entries)
        assert all(not e.abandoned() for e in batch.entries)
        if batch.step is not Step.TRUNK:
            assert {route.width for route in batch.routes} == {batch.width}
            assert all(e.window.lo <= batch.width <= e.window.hi for e in batch.entries)
        served.extend(batch.entries)
        return True

    for seen, window, due_s, deadline_s, gone, urgency, ask in events:
        if window.forced is not None:
            seen = None
        pushed.append(
            push(
                s,
                now_s,
                look=seen,
                window=window,
                due_s=due_s,
                deadline_s=deadline_s,
                caller=Caller(gone),
                urgency=urgency,
            )
        )
        now_s += 1.0
        if ask:
            take()
        if len(running) > 1:
            s.finished(running.pop(0), now_s, 1.0, 1.0)
    while take():
        pass
    assert len(s) == 0
    assert not s.has_less_urgent(-1)
    assert sorted(map(id, [*served, *dropped])) == sorted(map(id, pushed))


bodies = st.tuples(
    st.sampled_from([look(0), look(1), look(2), look(2, (2, 1)), look(2, (2, 0))]),
    st.sampled_from([Window(0, 2), Window(0, 1), Window(1, 2), Window(1, 1), Window(2, 2)]),
    st.one_of(st.just(math.inf), st.floats(0, 12)),  # deadline
    st.integers(0, 7),
)


@given(st.lists(bodies, min_size=1, max_size=20), st.sampled_from([0, 1, 9, TOP]), st.floats(0, 9))
def test_who_joins_a_body_is_who_would_be_routed_to_its_width(images, price, now_s):
    s = scheduler(slack, batch=64)
    s._times.learn(1, 1, 3.0, 0.0)  # a spread
    s._backlog.price = lambda *_: price
    entries = [
        push(s, look=seen, window=window, deadline_s=deadline_s, urgency=urgency)
        for seen, window, deadline_s, urgency in images
    ]
    selection = s.next_batch(now_s)
    batch = selection.batch
    if batch is None:
        return
    entries = [entry for entry in entries if entry not in selection.expired]
    first, joined = batch.entries[0], set(map(id, batch.entries))
    for entry in entries:
        if entry.deadline_s >= first.deadline_s and id(entry) in joined:
            assert route_of(s, entry, now_s, price).width == batch.width
    if first.deadline_s == math.inf:  # nobody can make it late
        assert {id(e) for e in entries if route_of(s, e, now_s, price).width == batch.width} == joined


def route_of(s, entry, now_s, price):
    """As docs/scheduling.md has it, without a short cut."""

    def fits(width):
        return now_s + s._times.seconds(width, 1) + s._times.spread_s(width) <= entry.deadline_s

    return route(entry.window, entry.look.wish, s._policy.after(entry.look, entry.urgency, price), fits)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40))
def test_one_queue_drains_in_order_of_due_time(due_times):
    s = scheduler(batch=4)
    for due_s in due_times:
        push(s, due_s=due_s)
    order = []
    while (batch := s.next_batch(0.0).batch) is not None:
        order += [e.due_s for e in batch.entries]
    assert order == sorted(due_times)


@pytest.mark.parametrize("count", [1, 40, 500])
def test_the_books_are_empty_when_the_queues_are(count):
    s = scheduler(slack, workers=2)
    for number in range(count):
        push(s, deadline_s=float(number), look=look(1) if number % 2 else None)
    now_s = 0.0
    while (batch := s.next_batch(now_s).batch) is not None:
        now_s += 0.5
        if batch.step is Step.TRUNK:
            for entry in batch.entries:
                s.forget(entry.place)
        s.finished(batch, now_s, 1.0, 1.0)
    assert len(s._backlog) == 0


@given(st.lists(st.tuples(bodies, st.booleans()), min_size=1, max_size=20), st.sampled_from([0, 1, TOP]))
def test_an_exit_lets_go_who_would_be_routed_to_it_and_loses_nobody(images, price):
    s, now_s = scheduler(slack, has_exit=True, batch=64), 5.0
    s._backlog.price = lambda *_: price
    for (_, window, deadline_s, urgency), gone in images:
        push(s, window=window, deadline_s=deadline_s, urgency=urgency, caller=Caller(gone))
    trunk, dropped = [], []
    while (selection := s.next_batch(0.0)).batch is not None:
        trunk += [e for e in selection.batch.entries if selection.batch.step is Step.TRUNK]
        dropped += [*selection.cancelled, *selection.expired]
        s.finished(selection.batch, now_s, 1.0, 1.0)
    seen = [replace(e, look=fields[0]) for e, (fields, _) in zip(trunk, images, strict=False)]
    batch = s.push_seen(seen, now_s)
    left = list(batch.entries) if batch else []
    for entry in seen:
        found = route_of(s, entry, now_s, price)
        assert (entry in left) == (found.width == 0 and not entry.abandoned())
    assert batch is None or {route.width for route in batch.routes} == {0}
    assert len(s) == len(seen) - len(left)
    assert len(s._backlog._slots) == len(s)


def test_without_an_exit_nobody_leaves_before_a_body():
    s = scheduler()
    push(s)
    (entry,) = s.next_batch(0.0).batch.entries
    assert s.push_seen([replace(entry, look=look(0))], 1.0) is None
    assert s.next_batch(1.0).batch.entries[0].place == entry.place
