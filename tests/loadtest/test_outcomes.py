import dataclasses
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.outcomes import NOT_SENT, NUMBERS, Answer, Exchange, Fate, answer_of, budget_ms, by_second, figures

HEADERS = {"Slice-Width": "3", "Slice-Gate-Width": "4", "Slice-Reason": "load", "Compute-MAdds": "1200"}
BODY = json.dumps({"predictions": [{"label": "cat"}, {"label": "dog"}]}).encode()


def answer(at_s: float = 0.0, **changes) -> Answer:
    values = {
        "image": 0, "label": "cat", "limit_ms": 20.0, "send_late_ms": 0.1, "latency_ms": 10.0, "status": 200,
        "width": "1", "gate_width": "2", "reason": "gate", "madds": 100, "predicted": "cat",
    }  # fmt: skip
    return Answer(at_s, **(values | changes))


def error(at_s: float, status: int, error_type: str) -> Answer:
    empty = {"width": "", "gate_width": "", "reason": "", "madds": None, "predicted": ""}
    return answer(at_s, status=status, error_type=error_type, **empty)


not_sent = error(0.5, 0, NOT_SENT)
not_sent = dataclasses.replace(not_sent, latency_ms=None, send_late_ms=None)


@st.composite
def some_answers(draw) -> list[Answer]:
    """Answers of any kind in the order of their instants, within 5 s."""
    count = draw(st.integers(0, 10))
    instants = sorted(draw(st.lists(st.floats(0, 5, exclude_max=True), min_size=count, max_size=count)))
    statuses = st.sampled_from([200, 200, 200, 400, 422, 429, 500, 503, 504, 0])
    latencies = st.floats(0.1, 40)
    labels = st.sampled_from(["cat", "dog", ""])
    found = []
    for at_s in instants:
        status = draw(statuses)
        if status == 200:
            found.append(
                answer(at_s, latency_ms=draw(latencies), label=draw(labels), width=draw(st.sampled_from("012")))
            )
        else:
            found.append(error(at_s, status, "some"))
    return found


@pytest.mark.parametrize(
    ("changes", "fate"),
    [
        ({"latency_ms": 20.0}, Fate.MET),
        ({"latency_ms": 20.001}, Fate.LATE),
        ({"status": 504}, Fate.EXPIRED),
        ({"status": 504, "outcome": "refused"}, Fate.REFUSED),
        ({"status": 503}, Fate.REFUSED),
        ({"status": 429}, Fate.REFUSED),
        ({"status": 422}, Fate.INFEASIBLE),
        ({"status": 500}, Fate.FAILED),
        ({"status": 400, "latency_ms": 1.0}, Fate.FAILED),
        ({"status": 0, "latency_ms": None}, Fate.FAILED),
    ],
)
def test_the_fate_of_a_request(changes, fate):
    assert answer(**changes).fate is fate


@given(some_answers())
def test_every_request_has_one_fate_and_the_attainment_follows(answers):
    found = figures(answers, 0, 5)
    missed = found.late + found.expired + found.refused + found.failed
    assert found.requests == len(answers) == found.met + missed + found.infeasible == sum(found.statuses.values())
    if found.met + missed:
        assert found.attainment == found.met / (found.met + missed)
        assert 0 <= found.attainment <= 1
    else:
        assert found.attainment is None
    assert sum(found.errors.values()) == len(answers) - found.met - found.late
    assert sum(found.widths.values()) == found.met + found.late


@given(some_answers(), st.floats(0.1, 4.9))
def test_the_parts_of_an_interval_add_up(answers, cut_s):
    whole, first, second = (figures(answers, a, b) for a, b in ((0, 5), (0, cut_s), (cut_s, 5)))
    for name in ("requests", "met", "late", "expired", "refused", "infeasible", "failed", "late_sends"):
        assert getattr(first, name) + getattr(second, name) == getattr(whole, name)


@given(some_answers())
def test_more_patience_never_lowers_the_attainment(answers):
    patient = [dataclasses.replace(one, limit_ms=30.0) for one in answers]
    assert figures(patient, 0, 5).met >= figures(answers, 0, 5).met


@given(some_answers(), st.floats(0, 2.5), st.floats(2.6, 5))
def test_seconds_add_up_to_the_interval(answers, start_s, end_s):
    seconds = by_second(answers, start_s, end_s)
    assert (seconds[0].start_s, seconds[-1].end_s) == (start_s, end_s)
    assert all(a.end_s == b.start_s for a, b in itertools.pairwise(seconds))
    assert all(0 < second.end_s - second.start_s <= 1 for second in seconds)
    assert all(second.end_s == int(second.end_s) for second in seconds[:-1])
    assert sum(second.met for second in seconds) == figures(answers, start_s, end_s).met


def test_figures_of_known_answers():
    answers = [
        answer(0.0, latency_ms=10.0),
        answer(0.1, latency_ms=20.0, predicted="dog", width="3", madds=300, send_late_ms=1.5),
        answer(0.2, latency_ms=30.0, reason="load"),
        error(0.3, 504, "deadline_exceeded"),
        error(0.4, 422, "infeasible_budget"),
        not_sent,
        answer(2.0, latency_ms=1000.0),  # due at the end, so not within
    ]
    found = figures(answers, 0.0, 2.0)
    assert (found.requests, found.met, found.late, found.expired, found.infeasible) == (6, 2, 1, 1, 1)
    assert (found.failed, found.not_sent, found.refused) == (1, 1, 0)
    assert found.attainment == 2 / 5
    assert (found.arrivals_per_s, found.throughput_per_s, found.goodput_per_s) == (3.0, 1.5, 1.0)
    assert (found.p50_ms, found.p90_ms) == (20.0, 28.0)
    assert found.p99_9_ms == pytest.approx(29.98)
    assert found.top1 == 1 / 2  # the late answer was right, and does not count
    assert found.mean_madds == pytest.approx(500 / 3)
    assert (found.late_sends, found.send_late_max_ms) == (1, 1.5)
    assert found.send_late_p99_ms == pytest.approx(1.5 - 0.04 * 1.4)
    assert (found.widths, found.gate_widths) == ({"1": 2, "3": 1}, {"2": 3})
    assert found.reasons == {"gate": 2, "load": 1}
    assert found.statuses == {"200": 3, "422": 1, "504": 1, "none": 1}
    assert found.errors == {"deadline_exceeded": 1, "infeasible_budget": 1, NOT_SENT: 1}


def test_late_sends_are_counted_by_the_threshold():
    answers = [answer(0.0, send_late_ms=late_ms) for late_ms in (0.5, 1.0, 1.1, 3.0)]
    assert [figures(answers, 0, 1, late_ms).late_sends for late_ms in (0.4, 1.0, 2.0)] == [4, 2, 1]


def test_an_image_without_a_label_has_no_part_in_the_accuracy():
    assert figures([answer(label=""), answer()], 0, 1).top1 == 1
    assert figures([answer(label="")], 0, 1).top1 is None


def test_nothing_due_measures_nothing():
    found = figures([], 0, 1)
    assert found.requests == 0
    for name in ("attainment", "p50_ms", "p99_9_ms", "top1", "mean_madds", "send_late_p99_ms", "send_late_max_ms"):
        assert getattr(found, name) is None
    assert {"attainment", "p99_ms", "late_sends", "mean_madds"} < set(NUMBERS)
    assert not {"start_s", "end_s", "widths"} & set(NUMBERS)


def test_an_interval_without_length_is_refused():
    with pytest.raises(ValueError, match="from 2 s to 2 s; allowed: from < to"):
        figures([], 2, 2)


def test_a_good_answer_is_read():
    found = answer_of(Exchange(1.5, 0.002, 0.03, 200, "", HEADERS, BODY), 7, "cat", 36.0)
    assert found == Answer(1.5, 7, "cat", 36.0, 2.0, 30.0, 200, "", "3", "4", "load", 1200, "cat")


@pytest.mark.parametrize(
    "body", [b"", b"no JSON", b"[]", b"{}", b'{"predictions": []}', b'{"predictions": [3]}',
             b'{"predictions": [{"label": 3}]}', b"\xff"]
)  # fmt: skip
def test_a_body_without_a_prediction_predicts_nothing(body):
    found = answer_of(Exchange(0.0, 0.0, 0.01, 200, "", {}, body), 0, "cat", 36.0)
    assert (found.predicted, found.width, found.madds, found.fate) == ("", "", None, Fate.MET)


def test_an_error_is_read_by_its_type():
    body = b'{"error": "late", "error_type": "deadline_exceeded"}'
    found = answer_of(Exchange(0.0, 0.0, 0.01, 504, "", {}, body), 0, "cat", 36.0)
    assert (found.error_type, found.fate, found.predicted) == ("deadline_exceeded", Fate.EXPIRED, "")
    refused = answer_of(Exchange(0.0, 0.0, 0.01, 504, "", {}, body[:-1] + b', "outcome": "refused"}'), 0, "cat", 36.0)
    assert refused.fate is Fate.REFUSED
    assert answer_of(Exchange(0.0, 0.0, 0.01, 502, "", {}, b"<html>"), 0, "", 36.0).error_type == ""


def test_no_answer_says_why():
    found = answer_of(Exchange(0.0, None, failure=NOT_SENT), 0, "cat", 36.0)
    assert (found.error_type, found.latency_ms, found.send_late_ms, found.fate) == (NOT_SENT, None, None, Fate.FAILED)


@pytest.mark.parametrize(
    ("text", "milliseconds"), [("25", 25), ("25ms", 25), ("0.5s", 500), ("36.5MS", 36.5), ("1S", 1000)]
)
def test_a_budget_is_in_milliseconds_unless_it_says_seconds(text, milliseconds):
    assert budget_ms(text) == milliseconds


@pytest.mark.parametrize("text", ["", "0", "0ms", "-1", "1e3", "25 ms", "ms", ".5", "25m", "nan", "²", "9" * 400])
def test_a_malformed_budget_is_refused(text):
    with pytest.raises(ValueError, match="allowed: a decimal above 0 with suffix ms or s"):
        budget_ms(text)
