"""The event loop, the client and the cores of the offline twin."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling import WIDTHS, look, table

from service.cores import YIELDING
from service.latency import LiveTimes, Overhead
from service.policies import policy_named
from service.request import Window
from service.scheduler import Scheduler
from service.simulate import Arrival, Machine, Outcome, Run

WHOLE = Window(0, WIDTHS - 1)
LOOKS = [look(2, (2, 0)), look(1), look(0)]


class Noting(Scheduler):
    """Keeps how long images have waited for the loop."""

    def begun(self, now_s, waited_s):
        self.waits = [*getattr(self, "waits", []), (now_s, waited_s)]
        super().begun(now_s, waited_s)


class Replay:
    """One replay, with what was learnt in it. ``facts``: of the table, then of the machine."""

    def __init__(self, arrivals, policy="fixed:0", workers=1, facts=None, *, has_exit=False, **machine):
        self.machine = Machine(table(**(facts or {"batch": 1})), workers, 10_000, 100.0, **machine)
        self.process = Overhead()
        self.times = LiveTimes(self.machine.times, self.process if self.machine.plans_count_loop else None)
        scheduler = Noting(policy_named(policy, (0, 1, 2), self.times), self.times, workers, has_exit=has_exit)
        self.served = Run(scheduler, self.machine, LOOKS, self.process).replay(arrivals)
        self.ends = [end.finish_s for end in self.served]
        self.outcomes = [end.outcome for end in self.served]
        assert len(scheduler) == 0
        self.waits = getattr(scheduler, "waits", [])


def at(*instants, latency_s=math.inf, image=0):
    return [Arrival(at_s, image, WHOLE, latency_s) for at_s in instants]


def test_the_loop_takes_up_one_image_after_the_other():
    assert Replay(at(0.0, 0.0), workers=2, front_s=0.5).ends == pytest.approx([2.5, 3.0])


def test_answers_leave_one_after_the_other():
    ends = Replay(at(0.0, 0.0), workers=2, back_s=0.5).ends
    assert ends == pytest.approx([2.5, 3.0])
    together = Replay(at(0.0, 0.0, 0.0), facts={"batch": 2}, back_s=0.5).ends
    assert together == pytest.approx([2.5, 6.3, 6.8])  # the second batch is of two images and takes 3.8 s


def test_the_loop_is_asked_for_every_batch():
    one, other = Replay(at(0.0, 0.0), handover_s=0.5).ends
    assert (one, other) == (pytest.approx(2.5), pytest.approx(2.5 + 2.0 + 0.5))
    plain, asked = (
        Replay(at(0.0, 0.0, image=2), "gate", 1, {"batch": 2}, has_exit=True, ask_loop_s=s) for s in (0.0, 0.5)
    )
    later_s = [b - a for a, b in zip(plain.ends, asked.ends, strict=True)]
    assert later_s == pytest.approx([0.5, 1.0])  # the worker waits, too
    assert Replay(at(0.0), ask_loop_s=0.5).ends == Replay(at(0.0)).ends


def test_answers_go_before_newcomers_and_interrupt_none():
    first, second, third = Replay(at(0.0, 2.5, 2.6), workers=3, front_s=1.0, back_s=0.5).ends
    assert first == pytest.approx(4.0)  # computed at 3.0; the loop is with the second until 3.5
    assert second == pytest.approx(3.5 + 2.0 + 0.5)
    assert third == pytest.approx(5.0 + 2.0 + 0.5)  # begun behind the first one's answer


def test_a_worker_waits_for_the_loop_unless_a_batch_is_ready():
    arrivals = at(0.0, 0.1, 2.5)  # the loop is busy from 2.5 to 3.5, the first batch is computed at 3.0
    assert Replay(arrivals, front_s=1.0).ends[1] == pytest.approx(3.5 + 2.0)
    assert Replay(arrivals, front_s=1.0, ahead=1).ends[1] == pytest.approx(3.0 + 2.0)


def test_the_client_sends_and_reads_in_one_thread():
    assert Replay(at(0.0), client_s=1.0).ends == pytest.approx([3.0])
    assert Replay(at(0.0, 0.0), workers=2, client_s=1.0).ends == pytest.approx([3.0, 3.5])
    assert Replay(at(0.0, 2.4), workers=2, client_s=1.0).ends[0] == pytest.approx(3.4)  # it sends from 2.4 to 2.9


@pytest.mark.parametrize(("cores", "end_s"), [(None, 2.0), (2, 2.0), (1, 4.0)])
def test_workers_share_the_cores(cores, end_s):
    assert Replay(at(0.0, 0.0), workers=2, cores=cores).ends == pytest.approx([end_s, end_s])


def test_the_loop_and_the_client_share_them_too():
    arrivals = at(0.0, 1.0)
    ends = {cores: Replay(arrivals, workers=2, front_s=1.0, cores=cores).ends for cores in (2, 1)}
    assert ends[2] == pytest.approx([3.0, 4.0])
    # Of one core the loop has most from 1.0 on, for its second image until 2.0 and a third; then two workers have half.
    assert ends[1] == pytest.approx([6.0 - YIELDING["low"], 6.0])
    assert Replay(at(0.0, 1.0), client_s=2.0, cores=1).ends[0] > Replay(at(0.0, 1.0), client_s=2.0).ends[0]


def test_in_time_is_what_the_caller_has_read_in_time():
    for latency_s, outcome in ((2.9, Outcome.LATE), (3.0, Outcome.MET)):
        replay = Replay(at(0.0, latency_s=latency_s), client_s=1.0)
        assert (replay.ends, replay.outcomes) == ([3.0], [outcome])


def test_the_service_counts_from_when_the_image_was_sent():
    assert Replay(at(0.0, latency_s=2.0), client_s=1.0).outcomes == [Outcome.LATE]
    assert Replay(at(0.0, latency_s=2.0), front_s=0.5).outcomes == [Outcome.REFUSED]


def test_who_waits_for_the_loop_is_refused_at_the_door():
    replay = Replay(at(0.0, 0.0, 0.0, latency_s=6.8), front_s=3.0, client_s=0.5)
    assert replay.outcomes == [Outcome.MET, Outcome.REFUSED, Outcome.REFUSED]
    assert replay.ends[0] == pytest.approx(
        6.75
    )  # computed at 5.25; at 6.25 the loop refuses the second, which is read first
    assert replay.served[1].predicted_s == pytest.approx(6.25 + 2.0 + 0.25)


def test_time_is_kept_free_for_answers():
    """The second image comes after a pause, so all that is known of answers is what that one waited."""
    for back_s, outcome in ((0.0, Outcome.MET), (1.0, Outcome.REFUSED)):
        arrivals = [*at(0.0, 100.0), *at(103.0, latency_s=2.5)]
        assert Replay(arrivals, workers=2, back_s=back_s).outcomes[-1] is outcome


def test_plans_learn_what_batches_take_on_shared_cores():
    alone, shared = (Replay(at(*[0.0] * 60), workers=2, cores=cores) for cores in (2, 1))
    assert alone.times.seconds(None, 1) == pytest.approx(1.0)
    assert shared.times.seconds(None, 1) == pytest.approx(2.0, rel=0.1)
    assert shared.times.seconds(0, 1) == pytest.approx(2.0, rel=0.1)


def test_the_loop_counts_as_overhead_where_it_lives_on_the_workers_cores():
    facts = {"trunk_s": 0.002, "bodies_s": (0.002, 0.003, 0.004), "batch": 1}
    arrivals = at(*np.arange(0.0, 6.0, 0.01).tolist())
    found = Replay(arrivals, facts=facts, workers=2, front_s=0.001, back_s=0.0005, client_s=0.001, cores=2)
    assert found.process.per_image_s(5.99) == pytest.approx(0.0015, rel=0.02)
    assert found.times.costs().overhead_s == pytest.approx(0.0015, rel=0.02)
    spare = Replay(arrivals, facts=facts, workers=2, front_s=0.001, back_s=0.0005, cores=3)
    assert spare.times.costs().overhead_s == 0.0


def test_the_scheduler_is_told_how_long_images_waited_for_the_loop():
    instants, waits = zip(*Replay(at(0.0, 0.0), workers=2, front_s=0.5, client_s=0.2).waits, strict=True)
    assert instants == pytest.approx((0.1, 0.6))
    assert waits == pytest.approx((0.0, 0.4))


@pytest.mark.parametrize(
    ("arrivals", "policy", "overhead_s"),
    [
        ([Arrival(n / 100, 0, WHOLE, (math.inf, 1e-4)[n % 2]) for n in range(600)], "fixed:0", 0.00125),
        ([Arrival(n / 100, 2, WHOLE) for n in range(600)], "gate", 0.0015),
    ],
    ids=["half are refused", "an exit answers"],
)
def test_overhead_is_shared_by_all_who_leave(arrivals, policy, overhead_s):
    facts = {"trunk_s": 0.002, "bodies_s": (0.002, 0.003, 0.004), "batch": 1}
    has_exit = policy == "gate"
    found = Replay(arrivals, policy, 2, facts, front_s=0.001, back_s=0.0005, cores=2, has_exit=has_exit)
    assert found.process.per_image_s(5.99) == pytest.approx(overhead_s, rel=0.02)


def test_a_saturated_machine_does_what_its_cores_can():
    """2 cores; 2 ms of them for every image: worker 1.2, loop 0.6, client 0.2."""
    facts = {"trunk_s": 0.0008, "bodies_s": (0.0004, 0.001, 0.002), "batch": 1}
    replay = Replay(
        at(*[0.0] * 2000), facts=facts, workers=2, front_s=0.00036, back_s=0.00024, client_s=0.0002, cores=2, ahead=1
    )
    assert 2000 / max(replay.ends) == pytest.approx(2 / 0.002, rel=0.05)


MACHINES = st.fixed_dictionaries(
    {
        "front_s": st.sampled_from([0.0, 0.3, 1.0]),
        "back_s": st.sampled_from([0.0, 0.2, 1.0]),
        "client_s": st.sampled_from([0.0, 0.4, 2.0]),
        "cores": st.sampled_from([None, 1, 2, 3]),
        "ahead": st.integers(0, 2),
        "overhead_s": st.sampled_from([0.0, 0.5]),
        "ask_s": st.sampled_from([0.0, 0.3]),
        "ask_loop_s": st.sampled_from([0.0, 0.3]),
        "handover_s": st.sampled_from([0.0, 0.4]),
        "has_exit": st.booleans(),
    }
)


@pytest.mark.parametrize("policy", ["gate", "gate_slack", "slackfit", "fixed:0", "fixed:widest"])
@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.integers(0, 2), st.sampled_from([4.0, 20.0, math.inf]), st.integers(0, 7)),
        max_size=30,
    ),
    st.integers(1, 3),
    MACHINES,
)
def test_every_arrival_has_one_end_on_any_machine(policy, draws, workers, facts):
    arrivals, at_s = [], 0.0
    for gap_s, image, latency_s, urgency in draws:
        at_s += gap_s
        arrivals.append(Arrival(at_s, image, WHOLE, latency_s, urgency))
    served = Replay(arrivals, policy, workers, {"batch": 2}, **facts).served
    assert sum(Counter(end.outcome for end in served).values()) == len(arrivals)
    least_s = facts["front_s"] + facts["client_s"] + facts["back_s"] + (1.0 if facts["has_exit"] else 2.0)
    for arrival, end in zip(arrivals, served, strict=True):
        if end.finish_s is None:
            assert end.outcome in {Outcome.REFUSED, Outcome.EXPIRED}
        else:
            assert end.finish_s >= arrival.at_s + least_s - 1e-9
            assert (end.outcome is Outcome.MET) == (end.finish_s <= arrival.at_s + arrival.latency_s)
    assert served == Replay(arrivals, policy, workers, {"batch": 2}, **facts).served
