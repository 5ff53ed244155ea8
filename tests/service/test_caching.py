import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import caching
from service.caching import Answer
from service.request import Reason, Route, Window

K, LADDER = 10, 6
finite = st.floats(-1e6, 1e6, width=32)


@st.composite
def answers(draw):
    width = draw(st.integers(0, LADDER - 1))
    wish = draw(st.integers(0, width))
    reason = Reason.GATE if wish == width else Reason.WIDENED
    logits_K = np.array(draw(st.lists(finite, min_size=K, max_size=K)), np.float32)
    gate_logits_G = np.array(draw(st.lists(finite, max_size=4)), np.float32)
    return Answer(Route(width, reason, wish), logits_K, gate_logits_G)


@st.composite
def windows(draw):
    lo = draw(st.integers(0, LADDER - 1))
    return Window(lo, draw(st.integers(lo, LADDER - 1)))


def answer(width, wish=None):
    route = Route(width, Reason.GATE if wish is None else Reason.WIDENED, width if wish is None else wish)
    return Answer(route, np.zeros(K, np.float32), np.zeros(3, np.float32))


@given(answers())
def test_an_answer_survives_its_bytes(given_answer):
    back = caching.decode(caching.encode(given_answer), given_answer.route.width, K)
    assert back.route == given_answer.route
    assert back.logits_K.tobytes() == given_answer.logits_K.tobytes()
    assert back.gate_logits_G.tobytes() == given_answer.gate_logits_G.tobytes()


@given(st.binary(max_size=200))
def test_foreign_bytes_are_an_error_and_nothing_else(data):
    try:
        found = caching.decode(data, 0, K)
    except ValueError:
        return
    assert len(found.logits_K) == K


@given(answers(), st.data())
def test_damaged_bytes_never_pass_for_another_slice_or_shape(given_answer, data):
    encoded = caching.encode(given_answer)
    width = given_answer.route.width
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(ValueError, match="bytes"):
        caching.decode(encoded[:cut], width, K)
    with pytest.raises(ValueError, match="slice"):
        caching.decode(encoded, width + 1, K)
    with pytest.raises(ValueError, match="classes"):
        caching.decode(encoded, width, K + 1)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_an_error(number):
    bad = Answer(Route(0, Reason.GATE, 0), np.full(K, number, np.float32), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="finite"):
        caching.decode(caching.encode(bad), 0, K)


@pytest.mark.parametrize("reason", list(Reason))
def test_only_what_the_gate_wished_or_wider_is_kept(reason):
    route = Route(2, reason, 2)
    assert caching.storable(route) == (reason in (Reason.GATE, Reason.WIDENED))
    if not caching.storable(route):
        with pytest.raises(ValueError, match=reason.value):
            caching.encode(Answer(route, np.zeros(K, np.float32), np.zeros(3, np.float32)))


@given(st.sets(st.integers(0, LADDER - 1)), windows())
def test_an_answer_at_k_serves_exactly_the_windows_that_hold_k(kept, window):
    found = caching.best({width: answer(width) for width in kept}, window)
    serving = [width for width in kept if window.lo <= width <= window.hi]
    assert (found is None) == (not serving)
    if found is not None:
        assert found.route.width == max(serving)


def test_a_forced_slice_is_never_served_from_the_cache():
    assert caching.best({2: answer(2)}, Window(0, 3, forced=2)) is None


def test_every_part_of_the_scope_and_the_image_tells_answers_apart():
    base = ("sha256:a", {"input": {"height": 32}}, 1, "0.1.0")
    others = [
        ("sha256:b", *base[1:]),
        ("sha256:a", {"input": {"height": 64}}, 1, "0.1.0"),
        ("sha256:a", base[1], 2, "0.1.0"),
        ("sha256:a", base[1], None, "0.1.0"),
        (*base[:3], "0.2.0"),
    ]
    scopes = {caching.scope(*parts) for parts in (base, *others)}
    keys = {caching.key(scope, caching.image_digest(image)) for scope in scopes for image in (b"one", b"two")}
    assert len(keys) == 2 * (1 + len(others))
    assert caching.scope(*base) == caching.scope(*base)
    assert len(caching.image_digest(b"")) * 8 >= 128
