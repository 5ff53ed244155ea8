import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.request import Reason, SliceFacts, Window
from service.simulate import Arrival, Outcome, Served
from service.simulation_figures import (
    Comparison,
    Figures,
    Interval,
    Known,
    Replay,
    compare,
    dominated,
    figures,
    means,
)
from service.simulation_report import Sheet, markdown, sheets

SLICES = [SliceFacts(width, 100 * (width + 1), 100 * (width + 1) + 7, None) for width in range(3)]
CORRECT = np.array([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]], bool)
P_RIGHT = np.array([[0.9, 0.95, 1.0], [0.25, 0.5, 0.75], [0.25, 0.5, 0.75], [0.0, 0.25, 0.5]], np.float32)
KNOWN = Known(SLICES, CORRECT, P_RIGHT)
WHOLE = Window(0, 2)


def replay(ends, policy="a", trace="t", wall_s=0.0):
    """ends: (image, Served) each; images arrive 1 s apart."""
    arrivals = [Arrival(float(n), image, WHOLE) for n, (image, _) in enumerate(ends)]
    return Replay(trace, policy, arrivals, [served for _, served in ends], infeasible=2, wall_s=wall_s)


def met(width, finish_s=10.0, gate_width=None):
    return Served(Outcome.MET, width, Reason.GATE, finish_s, gate_width)


LATE, REFUSED, EXPIRED = Served(Outcome.LATE, 2, Reason.GATE, 99.0), Served(Outcome.REFUSED), Served(Outcome.EXPIRED)


def test_figures_are_those_of_answers_in_time():
    found = figures(
        replay([(0, met(0, 0.5, 1)), (1, met(0, 1.25)), (2, met(2, 2.75, 2)), (3, LATE), (0, REFUSED)], wall_s=5e-3),
        KNOWN,
    )
    assert (found.images, found.met, found.late, found.expired, found.refused) == (5, 3, 1, 0, 1)
    assert (found.infeasible, found.attainment) == (2, 0.6)
    assert found.top1 == pytest.approx(2 / 3)
    assert found.p_right == pytest.approx((0.9 + 0.25 + 0.75) / 3)
    assert found.mean_madds == pytest.approx((107 + 100 + 307) / 3), "the gate costs only where it ran"
    assert found.width_shares == pytest.approx((2 / 3, 0, 1 / 3))
    assert found.p50_ms == pytest.approx(500)
    assert found.p99_ms == pytest.approx(745)
    assert found.wall_us == pytest.approx(1000)


def test_without_an_evaluation_answers_are_not_judged():
    found = figures(replay([(7_000_000_000, met(1))]), Known(SLICES))
    assert (found.top1, found.p_right, found.attainment) == (None, None, 1.0)


def test_nothing_in_time_leaves_nothing_to_average():
    found = figures(replay([(0, EXPIRED), (1, REFUSED)]), KNOWN)
    assert (found.attainment, found.top1, found.mean_madds, found.width_shares, found.p99_ms) == (0, *[None] * 4)


def judged(policy, attainment, top1, trace="t"):
    return Figures(trace, policy, 10, 0, 9, 0, 0, 1, attainment, top1, None, 5e6, (1.0, 0.0), 1.0, 2.0, 3.0)


def test_means_are_over_traces_and_what_is_missing_is_left_out():
    (a, b) = means([judged("a", 0.5, None), judged("b", 1.0, 0.2), judged("a", 1.0, 0.9, "u")])
    assert (a.policy, a.traces, a.attainment, a.top1, a.p_right) == ("a", 2, 0.75, 0.9, None)
    assert (b.traces, b.attainment, b.wall_us) == (1, 1.0, 3.0)


def test_dominated_is_what_another_beats_on_the_same_trace():
    every = [
        judged("a", 0.9, 0.9), judged("b", 0.9, 0.8), judged("c", 1.0, 0.7), judged("d", 0.9, 0.9),
        judged("e", 0.0, None), judged("b", 0.1, 0.1, "u"),
    ]  # fmt: skip
    found = {(one.trace, one.policy): one.by for one in dominated(every)}
    assert found == {("t", "b"): ("a", "d"), ("t", "e"): ("a", "b", "c", "d")}
    assert dominated([judged("a", 0.9, None), judged("b", 0.8, None)]) == []


def test_a_comparison_is_the_mean_difference_over_traces():
    replays = [
        replay([(0, met(0)), (1, met(0)), (2, met(2)), (3, LATE)], "a", "t"),
        replay([(0, met(2)), (1, LATE), (2, LATE), (3, LATE)], "b", "t"),
        replay([(1, met(1)), (2, REFUSED)], "a", "u"),
        replay([(1, met(0)), (2, met(2))], "b", "u"),
    ]
    (found,) = compare(replays, "b", KNOWN, draws=50)
    assert (found.policy, found.against) == ("a", "b")
    assert found.attainment.value == pytest.approx(((3 - 1) / 4 + (1 - 2) / 2) / 2)
    assert found.top1.value == pytest.approx(((2 / 3 - 1) + (1 - 1 / 2)) / 2)
    assert found.attainment.low <= found.attainment.value <= found.attainment.high


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=20), st.integers(0, 9))
def test_equal_policies_do_not_differ_and_draws_repeat(draws, seed):
    ends = [(image, met(1) if is_met else LATE) for image, is_met in draws]
    replays = [replay(ends, "a"), replay(ends, "b")]
    (found,) = compare(replays, "a", KNOWN, draws=20, seed=seed)
    assert found.attainment == Interval(0, 0, 0)
    assert found.top1 == (Interval(0, 0, 0) if any(is_met for _, is_met in draws) else None)
    assert compare(replays, "a", KNOWN, draws=20, seed=seed) == [found]


def test_draws_take_traces():
    replays = [
        replay([(0, met(0) if (policy, trace) != ("b", "u") else LATE)], policy, trace)
        for trace in "tu"
        for policy in "ab"
    ]
    (found,) = compare(replays, "b", Known(SLICES), draws=200)
    assert found == Comparison("a", "b", Interval(0.5, 0.0, 1.0), None)


def test_draws_take_images_wherever_they_are_asked_for():
    ends = {
        "a": [(image, met(0)) for image in range(4)],
        "b": [(image, met(0) if image % 2 else LATE) for image in range(4)],
    }
    replays = [replay(ends[policy], policy, "t") for policy in "ab"]
    (found,) = compare(replays, "b", KNOWN, draws=1000)
    assert found.attainment == Interval(0.5, 0.0, 1.0)
    both = [replay([*ends[policy], *ends[policy]], policy, "t") for policy in "ab"]
    assert compare(both, "b", KNOWN, draws=1000) == [found], "an image asked for twice is no two images"


def test_the_page_holds_every_table():
    every = [judged("a", 0.9, 0.9), judged("b", 0.9, None)]
    tables = sheets(every, [Comparison("b", "a", Interval(0.01, -0.02, 0.03), None)], dominated(every))
    page = markdown("Title", [("model", "m/1")], "slicewise simulate", tables)
    assert page.startswith("# Title\n\n| what | value |\n| --- | --- |\n| model | m/1 |\n")
    assert "| b | +1.00 [-2.00, +3.00] | - |" in page
    assert "| t | b | a |" in page
    assert "| t | a | 10 | 9 | 0 | 0 | 1 | 0 | 90.00% | 90.00% | - | 5.00 | 1.00 | 2.00 | 3 |" in page
    assert page.endswith("```console\nslicewise simulate\n```\n")
    for sheet in tables:
        assert {len(row) for row in sheet.rows} == {len(sheet.columns)}, sheet.title


def test_tables_that_would_be_empty_are_left_out():
    assert [len(sheets([judged("a", 1.0, 1.0)], [], [])), Sheet("", (), ()).labels] == [3, 1]
