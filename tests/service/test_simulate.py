import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling import WIDTHS, look, table

from service.backlog import HEADROOM
from service.latency import LiveTimes
from service.policies import policy_named
from service.request import Reason, Window
from service.scheduler import Scheduler
from service.simulate import Arrival, Machine, Outcome, Run

WHOLE = Window(0, WIDTHS - 1)
LOOKS = [look(2, (2, 0)), look(1), look(0)]


def replay(
    policy, arrivals, workers=1, capacity_images=10_000, *, overhead_s=0.0, ask_s=0.0, has_exit=False,
    headroom=HEADROOM, **table_facts
):  # fmt: skip
    machine = Machine(table(**table_facts), workers, capacity_images, 100.0, overhead_s, ask_s)
    times = LiveTimes(machine.times)
    named = policy_named(policy, (0, 1, 2), times)
    scheduler = Scheduler(named, times, workers, headroom, has_exit=has_exit)
    run = Run(scheduler, machine, LOOKS)
    served = run.replay(arrivals)
    assert len(scheduler) == 0
    return served


def test_one_image_takes_its_trunk_and_its_body():
    (served,) = replay("gate", [Arrival(1.0, 1, WHOLE)])
    assert (served.outcome, served.width, served.reason) == (Outcome.MET, 1, Reason.GATE)
    assert served.finish_s == pytest.approx(1.0 + 1.0 + 2.0)


def test_an_exit_answers_when_its_trunk_ends():
    arrivals = [Arrival(1.0, 2, WHOLE), Arrival(1.0, 1, WHOLE)]
    exited, other = replay("gate", arrivals, workers=2, has_exit=True)
    assert (exited.outcome, exited.width, exited.reason) == (Outcome.MET, 0, Reason.GATE)
    assert (exited.finish_s, other.finish_s) == (pytest.approx(2.0), pytest.approx(4.0))


def test_asking_the_gate_is_charged_where_it_is_asked():
    arrivals = [Arrival(0.0, 0, WHOLE)]
    plain, asked = (replay("gate", arrivals, ask_s=seconds)[0].finish_s for seconds in (0.0, 0.5))
    assert asked - plain == pytest.approx(0.5)
    assert replay("fixed:0", arrivals, ask_s=0.5) == replay("fixed:0", arrivals)
    exits = [Arrival(0.0, 2, WHOLE), Arrival(0.0, 1, WHOLE)]
    plain, asked = (replay("gate", exits, 2, ask_s=seconds, has_exit=True) for seconds in (0.0, 0.5))
    assert [b.finish_s - a.finish_s for a, b in zip(plain, asked, strict=True)] == pytest.approx([0.5, 0.5])


def test_overhead_is_spent_by_the_worker():
    (served,) = replay("fixed:0", [Arrival(0.0, 0, WHOLE)], overhead_s=0.5)
    assert served.finish_s == pytest.approx(2.5)


def test_workers_run_side_by_side():
    arrivals = [Arrival(0.0, 2, WHOLE) for _ in range(2)]
    ends = [served.finish_s for served in replay("fixed:0", arrivals, workers=2, batch=1)]
    assert ends == pytest.approx([2.0, 2.0])


def test_what_cannot_be_in_time_is_refused_and_the_rest_is_kept():
    outcomes = Counter(s.outcome for s in replay("fixed:0", [Arrival(0.0, 0, WHOLE, 6.5)] * 9, batch=1))
    assert outcomes == {Outcome.MET: 3, Outcome.REFUSED: 6}


def test_who_is_refused_is_told_when_it_would_have_been_finished():
    met, *refused = replay("fixed:0", [Arrival(0.0, 0, WHOLE, 2.5)] * 3, batch=1)
    assert (met.finish_s, met.predicted_s) == (2.0, None)
    assert [one.predicted_s for one in refused] == [4.0, 4.0]


def test_a_full_queue_refuses():
    served = replay("fixed:0", [Arrival(0.0, 0, WHOLE)] * 9, capacity_images=4)
    assert Counter(s.outcome for s in served) == {Outcome.MET: 4, Outcome.REFUSED: 5}


def test_urgent_images_displace_others():
    arrivals = [*[Arrival(0.0, 0, WHOLE, 9.0, 6)] * 4, *[Arrival(0.5, 0, WHOLE, 9.0, 0)] * 4]
    served = replay("fixed:0", arrivals, batch=1)
    assert {s.outcome for s in served[4:7]} == {Outcome.MET}
    assert Counter(s.outcome for s in served[:4])[Outcome.REFUSED] == 3


def test_the_same_trace_ends_the_same():
    rng = np.random.default_rng(0)
    arrivals = [
        Arrival(at_s, n % 3, WHOLE, 20.0) for n, at_s in enumerate(np.cumsum(rng.exponential(2.0, 300)).tolist())
    ]
    assert replay("gate_slack", arrivals) == replay("gate_slack", arrivals)


@pytest.mark.parametrize("policy", ["gate", "gate_slack", "slackfit", "maxbatch", "maxacc", "fixed:0", "fixed:widest"])
@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.integers(0, 2), st.sampled_from([4.0, 20.0, math.inf]), st.integers(0, 7)),
        max_size=40,
    ),
    st.integers(1, 3),
)
def test_every_arrival_has_one_end_and_no_answer_is_early(policy, draws, workers):
    arrivals, at_s = [], 0.0
    for gap_s, image, latency_s, urgency in draws:
        at_s += gap_s
        arrivals.append(Arrival(at_s, image, WHOLE, latency_s, urgency))
    served = replay(policy, arrivals, workers)
    assert len(served) == len(arrivals)
    for arrival, end in zip(arrivals, served, strict=True):
        if end.finish_s is None:
            assert end.outcome in {Outcome.REFUSED, Outcome.EXPIRED}
            assert arrival.latency_s < math.inf or end.outcome is Outcome.REFUSED
        else:
            assert end.finish_s >= arrival.at_s + 2.0 - 1e-9  # trunk and narrowest body
            assert (end.outcome is Outcome.MET) == (end.finish_s <= arrival.at_s + arrival.latency_s)


def test_an_exit_answers_who_is_given_up():
    arrivals = [
        Arrival(0.0, 1, WHOLE, urgency=7),
        Arrival(0.5, 0, Window(0, 2, 2), 10.0),
        Arrival(2.0, 2, WHOLE, urgency=0),
    ]
    for has_exit, outcome in ((True, Outcome.MET), (False, Outcome.REFUSED)):
        given_up, *_ = replay("gate", arrivals, capacity_images=2, has_exit=has_exit)
        assert given_up.outcome is outcome
    ended = replay("gate", arrivals, capacity_images=2, has_exit=True)[0]
    assert (ended.width, ended.reason, ended.finish_s, ended.gate_width) == (0, Reason.LOAD, 2.0, 1)


def test_an_exit_answers_no_sooner_than_its_trunk_is_done():
    for image in (1, 2):
        (served,) = replay("gate", [Arrival(0.0, image, WHOLE, 2.5)], overhead_s=2.0, has_exit=True)
        assert (served.outcome, served.width, served.finish_s) == (Outcome.LATE, 0, 3.0)


def recorded():
    """300 images of every kind in bursts."""
    rng, at_s, arrivals = random.Random(7), 0.0, []
    windows = [WHOLE, WHOLE, WHOLE, Window(1, 2), Window(0, 1), Window(0, 2, 1)]
    for _ in range(300):
        at_s += 0.0 if rng.random() < 0.2 else rng.expovariate(0.8)
        latency_s = rng.choice([3.0, 5.5, 9.0, 20.0, math.inf])
        arrivals.append(Arrival(at_s, rng.randrange(3), rng.choice(windows), latency_s, rng.randrange(8)))
    return arrivals


@pytest.mark.parametrize(
    ("policy", "has_exit", "outcomes", "finish_s", "widths"),
    [
        ("gate", False, (194, 0, 11, 95), 29944.346206, 155),
        ("gate_slack", False, (234, 2, 6, 58), 35575.548718, 86),
        ("slackfit", False, (206, 18, 4, 72), 33666.107762, 88),
        ("maxbatch", False, (180, 4, 4, 112), 27409.340538, 160),
        ("maxacc", False, (156, 1, 3, 140), 24108.731011, 209),
        ("fixed:0", False, (220, 20, 3, 57), 36376.684089, 70),
        ("fixed:widest", False, (100, 43, 4, 153), 21976.295264, 233),
        ("gate", True, (223, 0, 7, 70), 33790.935126, 179),
        ("gate_slack", True, (238, 0, 3, 59), 35634.390044, 92),
    ],
)
def test_threads_that_cost_nothing_change_nothing(policy, has_exit, outcomes, finish_s, widths):
    """Figures from before there were any, 15 % planned: met, late, expired, refused; sums of instants and widths."""
    served = replay(policy, recorded(), 2, 12, overhead_s=0.137, has_exit=has_exit, headroom=0.15)
    counts = Counter(end.outcome for end in served)
    assert tuple(counts[outcome] for outcome in Outcome) == outcomes
    assert sum(end.finish_s or 0.0 for end in served) == pytest.approx(finish_s, abs=1e-5)
    assert sum(end.width or 0 for end in served) == widths
