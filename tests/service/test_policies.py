from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling import look, table, times

from service.latency import LiveTimes
from service.policies import (
    FREE,
    MAX_BATCH,
    PRICES,
    TOP,
    Asking,
    Curve,
    Gate,
    GateSlack,
    MaxAcc,
    MaxBatch,
    Plan,
    SlackFit,
    asked_mixes,
    check_policy_name,
    policy_named,
    priced,
    unasked_widths,
)

# Whole networks of one image take 2, 3 and 5 s; each further one costs a tenth less.
LIVE = times(batch=16)


def test_gate_keeps_the_wish_whatever_the_price():
    policy = Gate()
    (seen,) = policy.looks(np.zeros((1, 3), np.float32), np.array([2]), np.array([2]))
    assert [policy.after(seen, 3, price) for price in (0, TOP)] == [2, 2]
    assert policy.before(1.0, 9, TOP) is None


worths = st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3)


@given(worths)
def test_a_higher_price_never_widens_and_no_price_is_the_wish(worth):
    policy = GateSlack((0, 1, 2), times(), None, FREE)
    worth_NG = np.array([worth], np.float32)
    (seen,) = policy.looks(worth_NG, worth_NG.argmax(1), worth_NG.argmax(1))
    assert len(seen.widths) == len(PRICES)
    assert list(seen.widths) == sorted(seen.widths, reverse=True)
    assert seen.widths[0] == seen.wish == worth_NG.argmax()
    assert seen.widths[TOP] == 0


def test_at_a_price_each_image_takes_what_is_worth_most_to_it():
    policy = GateSlack((0, 1, 2), times(), None, FREE)  # bodies of 1, 2 and 4 s: a quarter, a half and the whole price
    easy, hard = [0.90, 0.91, 0.92], [0.50, 0.60, 0.90]
    seen = policy.looks(np.array([easy, hard], np.float32), np.array([2, 2]), np.array([2, 2]))
    at = next(i for i, price in enumerate(PRICES) if price > 0.1)
    assert [policy.after(s, 3, at) for s in seen] == [0, 2]


def test_choices_are_ladder_indices():
    policy = GateSlack((0, 2), times(), None, FREE)
    (seen,) = policy.looks(np.array([[0.1, 0.9]], np.float32), np.array([2]), np.array([2]))
    assert set(seen.widths) == {2, 0}


def test_urgency_moves_the_price_and_not_its_ends():
    assert [priced(u, 0) for u in range(8)] == [0] * 8
    assert [priced(u, TOP) for u in range(8)] == [TOP] * 8
    assert [priced(u, 8) for u in range(8)] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert (priced(0, 1), priced(7, TOP - 1)) == (1, TOP)


def test_at_the_top_price_nobody_is_asked():
    policy = GateSlack((0, 1, 2), LIVE, None, FREE)
    assert policy.before(1.0, 1, TOP - 1) is None
    assert policy.before(1.0, 1, TOP) == Plan(0, LIVE.table.best_whole_batch(0))


# Seconds at the widths of a ladder whose widest takes 10 ms, and 1 s, of a body.
SMALL, LARGE = (0.002, 0.005, 0.01), (0.2, 0.5, 1.0)
CURVE = Curve((0.80, 0.86, 0.90), ((0.90, (0.1, 0.1, 0.8)), (0.895, (0.4, 0.3, 0.3)), (0.85, (0.8, 0.1, 0.1))))


def test_images_are_asked_while_that_is_worth_its_time():
    asked = [width is None for width in unasked(CURVE, LARGE)]
    assert asked[0]
    assert asked == sorted(asked, reverse=True)  # once not worth it, at no higher price
    assert 10 < sum(asked) < TOP
    assert sum(width is None for width in unasked(CURVE, (0.0002, 0.0005, 0.001))) < sum(asked)


def test_whom_an_exit_answers_costs_no_second_batch():
    small, exits = (0.0, 0.0015, 0.003), replace(CURVE, has_exit=True)
    assert sum(width is None for width in unasked(exits, small)) > sum(width is None for width in unasked(CURVE, small))
    looks = [
        [mix.look_s for mix in asked_mixes(curve, (0, 1, 2), small, Asking(0.0, 4e-4))] for curve in (CURVE, exits)
    ]
    assert looks == [pytest.approx([4e-4] * 3), pytest.approx([3.6e-4, 2.4e-4, 0.8e-4])]
    policy = GateSlack((0, 1, 2), LIVE, exits, Asking(0.0, 4e-4))
    assert policy.look_P[0] == pytest.approx(3.6e-4)
    assert list(policy.look_P) == sorted(policy.look_P, reverse=True)
    assert policy.look_P[TOP] == 0


def test_whom_an_exit_answers_has_been_asked_all_the_same():
    body_s, exits = (0.0, 0.0015, 0.003), replace(CURVE, has_exit=True)
    (mix, *_) = asked_mixes(exits, (0, 1, 2), body_s, Asking(1e-4, 4e-4))
    assert mix.look_s == pytest.approx(0.1 * 1e-4 + 0.9 * 4e-4)
    assert mix.time == pytest.approx((mix.look_s + 0.1 * 0.0015 + 0.8 * 0.003) / 0.003)


def unasked(curve, body_s):
    mixes = asked_mixes(curve, (0, 1, 2), body_s, Asking(0.0, 4e-4))
    return unasked_widths(curve, mixes, [seconds / body_s[-1] for seconds in body_s])


@given(st.lists(st.floats(0.5, 1, width=32), min_size=3, max_size=3), st.sampled_from([SMALL, LARGE]))
def test_unasked_images_take_what_is_worth_most_at_the_price(worth, body_s):
    widths = unasked(Curve(tuple(worth), CURVE.asked), body_s)
    for price, width in list(zip(PRICES, widths, strict=True))[1:-1]:
        if width is not None:
            gains = [w - price * s / body_s[-1] for w, s in zip(worth, body_s, strict=True)]
            assert gains[width] == max(gains)
    taken = [width for width in widths if width is not None]
    assert taken == sorted(taken, reverse=True)
    assert widths[TOP] == 0


def test_a_plan_without_asking_is_for_the_width_of_the_price():
    policy = GateSlack((0, 1, 2), LIVE, Curve((0.8, 0.89, 0.9), ((0.85, (0.4, 0.3, 0.3)),)), FREE)
    assert policy.before(1.0, 9, 0) is None
    assert policy.unasked[1] == 2
    assert policy.before(1.0, 9, 1) == Plan(2, LIVE.table.best_whole_batch(2))


def test_maxbatch_takes_the_largest_batch_and_then_the_widest_width():
    policy = MaxBatch(LIVE)
    assert policy.before(5.0, 99, 0) == Plan(0, 2)  # 3.8 s; three take 5.6 s; width 1 takes 5.7 s
    assert policy.before(5.8, 2, 0) == Plan(1, 2)
    assert policy.before(1e9, 99, 0) == Plan(2, MAX_BATCH)
    assert policy.before(-1.0, 99, 0) == Plan(0, 1)


def test_maxacc_takes_the_widest_width_and_then_the_largest_batch():
    policy = MaxAcc(LIVE)
    assert policy.before(5.8, 99, 0) == Plan(2, 1)
    assert policy.before(4.0, 99, 0) == Plan(1, 1)
    assert policy.before(1e9, 3, 0) == Plan(2, 3)
    assert policy.before(-1.0, 99, 0) == Plan(0, 1)


@given(st.floats(0, 100), st.integers(1, 40))
def test_slackfit_takes_a_batch_that_fits_unless_none_does(slack_s, waiting):
    plan = SlackFit(LIVE, 8).before(slack_s, waiting, 0)
    took_s = LIVE.seconds(None, plan.images) + LIVE.seconds(plan.width, plan.images)
    assert 1 <= plan.images <= MAX_BATCH
    assert took_s <= slack_s or plan == SlackFit(LIVE, 8).before(0.0, waiting, 0)


def test_only_batch_sizes_that_were_published_take_from_other_workers():
    names = ("gate", "gate_slack", "fixed:1", "slackfit", "maxbatch", "maxacc")
    assert [policy_named(name, (0, 1, 2), LIVE).is_fair for name in names] == [True] * 3 + [False] * 3


def test_slackfit_takes_the_largest_batch_of_a_bucket():
    policy = SlackFit(LIVE, 1)
    assert policy.before(1e9, 99, 0) == Plan(2, MAX_BATCH)
    policy = SlackFit(LIVE, 128)  # of 0.6 s each: fine enough to tell these apart
    assert [policy.before(slack_s, 99, 0) for slack_s in (2.0, 3.5, 4.0)] == [Plan(0, 1), Plan(1, 1), Plan(0, 2)]


@pytest.mark.parametrize("name", ["gate", "gate_slack", "slackfit", "maxbatch", "maxacc", "fixed:2"])
def test_policies_go_by_their_names(name):
    policy = policy_named(name, (0, 1, 2), LIVE)
    assert policy.name == name
    policy.renew(LIVE)
    assert policy.asks_gate == name.startswith("gate")


def test_fixed_widths_have_names():
    assert check_policy_name("fixed:widest", 3) == 2
    assert check_policy_name("fixed:narrowest", 3) == 0
    assert policy_named("fixed:1", (0,), LIVE).before(0.0, 1, 0).width == 1


@pytest.mark.parametrize("name", ["", "fixed", "fixed:3", "fixed:-1", "fixed:²", "Gate", "fixed:widest "])
def test_other_names_are_refused_with_what_is_allowed(name):
    with pytest.raises(ValueError, match=r"policy is .*; allowed: gate_slack, gate, .*fixed:0\.\.fixed:2"):
        policy_named(name, (0, 1, 2), LIVE)


def test_blind_policies_follow_what_batches_take():
    live = LiveTimes(table(batch=16))
    policy = MaxAcc(live)
    assert policy.before(5.0, 1, 0).width == 2
    for _ in range(100):
        live.learn(2, 1, 8.0, 0.0)
    policy.renew(live)
    assert policy.before(5.0, 1, 0).width == 1


def test_a_look_keeps_its_widths():
    assert GateSlack((0, 1, 2), LIVE, None, FREE).after(look(2, (2, 1)), 3, 5) == 1
