import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.objectives import Finding, Objective, Window, judge, parse_objective, parse_window
from loadtest.outcomes import NUMBERS, Answer, figures
from loadtest.results import Side

numbers = st.floats(0, 1e300)
windows = st.tuples(st.floats(0, 1e5), st.floats(1e5, 1e6, exclude_min=True)).map(lambda span: Window(*span))
objectives = st.builds(Objective, st.sampled_from(NUMBERS), st.sampled_from(Side), numbers, st.none() | windows)


def measured(latencies_ms=(10.0, 20.0, 30.0, 40.0)):
    """Four requests, one each second, that are met up to 35 ms; of any window of them."""
    answers = [Answer(at_s, 0, "", 35.0, 0.0, latency_ms, 200) for at_s, latency_ms in enumerate(latencies_ms)]
    return lambda window: figures(answers, *((window.start_s, window.end_s) if window else (0, 10)))


@given(objectives)
def test_what_is_printed_is_read_again(objective):
    assert parse_objective(str(objective)) == objective


@given(windows)
def test_a_window_that_is_printed_is_read_again(window):
    assert parse_window(str(window)) == window


def test_objectives_are_printed_as_they_are_written():
    for text in ("attainment>=0.99", "p99_ms<=36", "attainment@61:62>=0.9", "top1@0.5:1.25>=0.88", "late_sends<=0"):
        assert str(parse_objective(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "attainment", "attainment>0.99", "attainment=0.99", "attainment >= 0.99", "attainment>=99%", "attainment>=-1",
     "attainment>=nan", "attainment>=1e3", "attainment>=", ">=0.9", "accuracy>=0.9", "widths>=1", "start_s>=0",
     "attainment@61>=0.9", "attainment@61:62:63>=0.9", "attainment>=0.9,p99_ms<=3", "p99_ms<=" + "9" * 400,
     "attainment>=0.9\n"],
)  # fmt: skip
def test_a_malformed_objective_is_refused_with_grammar_and_figures(text):
    with pytest.raises(ValueError, match=r"allowed: FIGURE\[@FROM:TO\]>=NUMBER .*figures requests, met, .*late_sends"):
        parse_objective(text)


@pytest.mark.parametrize("text", ["", "61", "62:61", "61:61", "61-62", "-1:2", "a:b", "61:62:63", "1:" + "9" * 400])
def test_a_malformed_window_is_refused_with_its_grammar(text):
    with pytest.raises(ValueError, match="allowed: FROM:TO in seconds of the trace"):
        parse_window(text)


def test_an_objective_with_a_window_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match="FROM below TO"):
        parse_objective("attainment@62:61>=0.9")


@pytest.mark.parametrize(
    ("text", "value", "met"),
    [
        ("attainment>=0.75", 0.75, True),
        ("attainment>=0.7501", 0.75, False),
        ("p50_ms<=25", 25.0, True),
        ("p50_ms<=24.999", 25.0, False),
        ("requests>=4", 4, True),
        ("attainment@3:4>=0.5", 0.0, False),
        ("attainment@0:3>=1", 1.0, True),
        ("top1>=0", None, False),  # no label, so nothing was measured
        ("p99_ms@5:6<=1000", None, False),
    ],
)
def test_an_objective_is_held_against_the_figures_of_its_window(text, value, met):
    assert judge(parse_objective(text), measured()) == Finding(text, value, met)


@given(st.floats(0, 100, allow_nan=False), st.sampled_from(Side))
def test_one_side_or_the_other_is_met(target, side):
    at_least, at_most = (judge(Objective("p50_ms", s, target), measured()).met for s in (Side.AT_LEAST, Side.AT_MOST))
    assert at_least or at_most
    assert (at_least and at_most) == math.isclose(target, 25.0, rel_tol=0, abs_tol=0)
