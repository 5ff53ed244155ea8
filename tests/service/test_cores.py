import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.cores import Cores, Job, Station


def run(cores, jobs, priority="low"):
    """Jobs of (began_s, seconds, yields), each on a thread of its own; those that are over, in that order."""
    found, over = Cores(cores, priority), []
    coming = [Job(began_s, began_s + seconds, over.append, yields=any(more)) for began_s, seconds, *more in jobs]
    while coming or found.next_s < math.inf:
        if coming and coming[0].began_s < found.next_s:
            found.begin(coming.pop(0))
        else:
            job = found.end_next()
            job.over(job)
    return found, over


def test_threads_that_have_a_core_each_take_what_they_take():
    for cores in (None, 2):
        _, over = run(cores, [(0.1, 0.7), (0.3, 0.2)])
        assert [(job.end_s, job.stretch) for job in over] == [(0.3 + 0.2, 1.0), (0.1 + 0.7, 1.0)]


def test_three_threads_on_two_cores_run_at_two_thirds():
    _, (one, two, three) = run(2, [(0.0, 1.0), (0.0, 1.0), (0.5, 1.0)])
    assert [one.end_s, two.end_s] == pytest.approx([1.25, 1.25])  # 0.5 s at full speed, 0.5 s of work at 2/3
    assert three.end_s == pytest.approx(1.75)  # half of its work in the same 0.75 s, then a core to itself
    assert [one.stretch, three.stretch] == pytest.approx([1.25, 1.25])


@pytest.mark.parametrize(("priority", "share"), [("low", 335 / 1024), ("idle", 3 / 1024)])
def test_who_yields_gets_a_smaller_part_of_the_cores(priority, share):
    _, (one, yielding) = run(1, [(0.0, 1.0), (0.0, 1.0, True)], priority)
    assert (one.end_s, yielding.end_s) == pytest.approx((1.0 + share, 2.0))
    _, (one, *both) = run(2, [(0.0, 1.0), (0.0, 1.0, True), (0.0, 1.0, True)])
    assert one.end_s == 1.0  # it cannot use more than a core
    assert [job.end_s for job in both] == pytest.approx([1.5, 1.5])
    _, both = run(1, [(0.0, 1.0, True), (0.0, 1.0, True)])
    assert [job.end_s for job in both] == pytest.approx([2.0, 2.0])


def test_time_on_the_cores_counts_as_it_is_spent_but_for_another_process():
    cores = Cores(1)
    cores.begin(Job(0.0, 1.0, lambda _: None))
    cores.begin(Job(0.0, 0.5, lambda _: None, is_foreign=True))
    assert cores.own_cpu_s(0.4) == pytest.approx(0.2)
    assert cores.end_next().end_s == pytest.approx(1.0)
    assert cores.own_cpu_s(1.2) == pytest.approx(0.7)
    assert cores.end_next().end_s == pytest.approx(1.5)
    assert cores.own_cpu_s(9.0) == pytest.approx(1.0)


@given(
    st.lists(st.tuples(st.floats(0, 4), st.floats(0.01, 3), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_no_more_work_is_done_than_cores_can_and_none_is_lost(jobs, cores):
    jobs.sort()
    found, over = run(cores, jobs)
    assert len(over) == len(jobs)
    assert found.own_cpu_s(0.0) == pytest.approx(sum(seconds for _, seconds, _ in jobs))
    ends = [job.end_s for job in over]
    assert ends == sorted(ends)
    for job in over:
        assert job.stretch >= 1 - 1e-9
    last_s = max(ends)
    assert sum(seconds for _, seconds, _ in jobs) <= cores * (last_s - jobs[0][0]) + 1e-6
    alone_s = [began_s + seconds for began_s, seconds, _ in jobs]
    if len(jobs) <= cores:
        assert sorted(ends) == sorted(alone_s)


def drain(cores):
    while cores.next_s < math.inf:
        job = cores.end_next()
        job.over(job)


def test_a_station_does_one_thing_after_the_other():
    cores, said = Cores(None), []
    station = Station(cores)
    for name in "ab":
        station.put(1.0, 0.5, lambda *times, name=name: said.append((name, *times)))
    drain(cores)
    assert said == [("a", 1.0, 1.5), ("b", 1.5, 2.0)]


def test_what_goes_first_does_so_before_others_and_interrupts_nothing():
    cores, said = Cores(None), []
    station = Station(cores)
    for name, first in (("under way", False), ("waits", False), ("first", True), ("second", True)):
        station.put(0.0, 1.0, lambda _, now_s, name=name: said.append((name, now_s)), goes_first=first)
    drain(cores)
    assert said == [("under way", 1.0), ("first", 2.0), ("second", 3.0), ("waits", 4.0)]


def test_what_takes_no_time_is_done_at_once_and_in_order():
    said, station = [], Station(Cores(None))

    def puts_more(*times):
        station.put(times[1], 0.0, lambda *_: said.append("inner"))
        said.append(("outer", *times))

    station.put(2.0, 0.0, puts_more)
    assert said == [("outer", 2.0, 2.0), "inner"]
