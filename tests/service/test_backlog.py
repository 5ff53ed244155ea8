import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import service.backlog
import service.sums
from service.backlog import LAZY_IMAGES, Backlog
from service.latency import Costs
from service.request import Window

COSTS = Costs(0.5, (1.0, 2.0, 4.0))
WINDOW = Window(0, 2)
PRICES = 4  # widths of a seen image: its wish, ..., the narrowest


def backlog(workers=1, headroom=1.0, prices=PRICES):
    return Backlog(COSTS, prices, workers, headroom)


def brute_force(images, now_s, workers, busy_s):
    """The price by the definition, image by image."""
    free_s = [max(now_s, busy) for busy in busy_s] + [now_s] * (workers - len(busy_s))
    for price in range(PRICES):
        used_s, is_feasible = 0.0, True
        for due_s, widths in sorted(images, key=lambda image: image[0]):
            cost_s = COSTS.body_s[widths[price]]
            used_s += cost_s
            capacity_s = sum(max(0.0, due_s - free) for free in free_s)
            need_s = max(used_s + (workers - 1) / 2 * cost_s, workers * cost_s)
            is_feasible = is_feasible and need_s <= capacity_s + 1e-9
        if is_feasible:
            return price
    return PRICES - 1


seen_images = st.lists(
    st.tuples(st.integers(0, 60).map(float), st.sampled_from([(2, 2, 1, 0), (2, 1, 0, 0), (1, 1, 1, 0), (0, 0, 0, 0)])),
    min_size=1,
    max_size=20,
)


@given(seen_images, st.integers(1, 3), st.lists(st.integers(0, 9).map(float), max_size=1))
def test_the_price_is_the_lowest_at_which_everybody_is_in_time(images, workers, busy_s):
    b = backlog(workers)
    for due_s, widths in images:
        b.see(b.add(due_s, False, WINDOW), widths)
    assert b.price(0.0, busy_s) == brute_force(images, 0.0, workers, busy_s)


mixed_images = st.lists(
    st.tuples(
        st.floats(0, 60),
        st.booleans(),  # promised to be in time
        st.sampled_from([Window(0, 2), Window(0, 1), Window(1, 2), Window(1, 1, 1)]),
        st.one_of(st.none(), st.lists(st.integers(0, 2), min_size=PRICES, max_size=PRICES)),  # None: not seen yet
        st.booleans(),  # its trunk runs
        st.booleans(),  # it has gone again
    ),
    max_size=30,
)


def come(b, now_s, image):
    """An image is added, and goes as far as it is said to."""
    due_s, is_hard, window, widths, is_running, is_gone = image
    slot = b.add(now_s + due_s, is_hard, window)
    if widths is not None:
        b.see(slot, sorted(widths, reverse=True))
    elif is_running:
        b.begin(slot)
    if is_gone:
        b.remove(slot)


@given(
    mixed_images,
    st.integers(1, 4),
    st.lists(st.floats(-9, 30), max_size=4),
    st.sampled_from([0.05, 0.25, 1.0, 8.0]),
    st.floats(0, 1e6),
    st.floats(0, 10),
)
def test_a_few_images_are_planned_as_many_would_be(images, workers, busy_s, headroom, now_s, waited_s):
    b = backlog(workers, headroom)
    for _ in range(200):
        b.arrived(now_s)
    b.door.learn(waited_s, now_s)
    for image in images:
        come(b, now_s, image)
    plans = []
    for few_images in (0, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.backlog, "FEW_IMAGES", few_images)
            plans.append(b._make_plan(now_s, [now_s + busy for busy in busy_s[:workers]]))
            b._complete(plans[-1])
    many, few = plans
    assert len(few.due_s) == len(b)
    assert (few.price, few.is_calm) == (many.price, many.is_calm)
    for few_N, many_N in ((few.due_s, many.due_s), (few.used_s, many.used_s), (few.room_s, many.room_s)):
        assert list(few_N) == list(many_N)


@given(mixed_images, st.integers(1, 4), st.lists(st.floats(-9, 30), max_size=4), st.floats(0, 90))
def test_where_there_is_ample_room_nothing_is_missing(images, workers, busy_s, due_s):
    b = backlog(workers)
    for image_due_s, is_hard, window, widths, is_running, is_gone in images:
        slot = b.add(image_due_s, is_hard, window)
        if widths is not None:
            b.see(slot, (*sorted(widths[1:], reverse=True), 0))
        elif is_running:
            b.begin(slot)
        if is_gone:
            b.remove(slot)
    busy_s = sorted(busy_s)[:workers]
    if b.is_ample(0.0, due_s, 0, busy_s):
        assert b.missing(0.0, due_s, 0, busy_s)[0] <= 1e-9


def test_room_is_ample_until_the_work_that_waits_reaches_a_deadline():
    b = backlog()
    assert b.is_ample(0.0, 1.5, 0, [])
    assert not b.is_ample(0.0, 1.4, 0, [])
    slot = b.add(4.0, True, WINDOW)
    assert b.is_ample(0.0, 9.0, 0, [1.0])
    assert not b.is_ample(0.0, 9.0, 0, [1.1])
    b.remove(slot)
    assert b.is_ample(0.0, 1.5, 0, [])


@pytest.mark.parametrize("count", [2, 5, 70])
def test_equal_due_times_are_planned_in_the_order_of_arrival(count):
    b = backlog()
    slots = [b.add(1000.0, True, WINDOW) for _ in range(count)]
    b.remove(slots.pop(0))
    slots.append(b.add(1000.0, True, WINDOW))  # in the slot that was left
    assert list(b._slots) == slots


@given(mixed_images, st.integers(1, 3), st.floats(0, 60), st.booleans())
def test_a_plan_says_the_same_whenever_it_is_summed_up(images, workers, due_s, is_priced):
    """Also if estimates are renewed, which alone makes no new plan."""
    answers = []
    for lazy_images in (0, LAZY_IMAGES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.backlog, "LAZY_IMAGES", lazy_images)
            b, found = Backlog(COSTS, PRICES, workers, 1.0, is_priced=is_priced), []
            for image in images:
                come(b, 0.0, image)
                b.price(0.0, [])
                b.renew(Costs(COSTS.trunk_s + len(found), COSTS.body_s), b.unasked, b.look_P)
                found.append((b.missing(0.0, due_s, 0, []), b.finish_s(0.0, due_s, 0, [])))
            answers.append(found)
    assert answers[0] == answers[1]


def test_headroom_is_kept_back():
    for headroom, price in ((1.0, 0), (0.5, 2)):
        b = backlog(headroom=headroom)
        b.see(b.add(6.0, True, WINDOW), (2, 2, 1, 0))  # 4, 4, 2 or 1 s
        assert b.price(0.0, []) == price


@pytest.mark.parametrize("images", [1, 3 * service.backlog.FEW_IMAGES])
def test_admission_counts_the_overhead_and_prices_do_not(images):
    due_s = 1.6 * (images + 1)  # 1.5 s each without, 2.25 s with it
    counted, bare = backlog(), backlog()
    counted.renew(Costs(0.5, COSTS.body_s, 0.75), counted.unasked, counted.look_P)
    for b in (counted, bare):
        slots = [b.add(due_s, True, WINDOW) for _ in range(images)]
        assert b._make_plan(0.0, []).price == 0
    assert counted.finish_s(0.0, due_s, 0, []) - bare.finish_s(0.0, due_s, 0, []) == pytest.approx(0.75 * (images + 1))
    assert bare.missing(0.0, due_s, 0, [])[0] <= 0 < counted.missing(0.0, due_s, 0, [])[0]
    assert counted.still_s(slots[0]) - bare.still_s(slots[0]) == 0.75


def test_widths_count_as_far_as_budgets_allow_them():
    b = backlog()
    b.see(b.add(2.5, True, Window(0, 1)), (2, 2, 2, 0))
    assert b.price(0.0, []) == 0
    b = backlog()
    b.see(b.add(1.5, True, Window(1, 2)), (2, 2, 2, 0))
    assert b.price(0.0, []) == PRICES - 1  # and even that is too late
    assert b.missing(0.0, 0.0, 0, [])[0] > 0


def test_unseen_images_are_expected_to_be_like_those_seen():
    b = backlog(workers=1)
    for _ in range(3000):
        slot = b.add(1e9, False, WINDOW)
        b.see(slot, (2, 1, 1, 0))
        b.remove(slot)
    b.add(1e6 + 4.0, True, WINDOW)
    assert b.price(1e6, []) == 1  # 0.5 s of trunk and 4 s of body would be late, 2 s are not


def test_an_image_on_a_worker_still_needs_its_body():
    b = backlog()
    slot = b.add(9.0, True, WINDOW)
    assert b.finish_s(0.0, 9.0, 0, []) == pytest.approx(3.0)
    b.begin(slot)
    assert b.finish_s(0.0, 9.0, 0, [0.5]) == pytest.approx(0.5 + 1.0 + 1.5)
    b.remove(slot)
    assert b.finish_s(0.0, 9.0, 0, []) == pytest.approx(1.5)


def test_who_is_due_earlier_goes_first_in_the_prediction():
    b = backlog(workers=2)
    for due_s in (5.0, 5.0, 50.0):
        b.add(due_s, True, WINDOW)
    early_s, late_s = b.finish_s(0.0, 6.0, 0, []), b.finish_s(0.0, 60.0, 0, [])
    assert (early_s, late_s) == (pytest.approx(1.5 + 1.5 * 3 / 4), pytest.approx(2.25 + 1.5 * 3 / 4))


def test_an_image_alone_takes_its_whole_time_however_many_workers_are_idle():
    b = backlog(workers=8)
    assert b.finish_s(10.0, 99.0, 2, []) == pytest.approx(14.5)
    assert b.missing(10.0, 14.4, 2, []) == (math.inf, 14.4)
    assert b.missing(10.0, 14.6, 2, [])[0] <= 0


def test_only_promises_can_be_spoilt():
    for is_hard in (True, False):
        b = backlog()
        b.add(2.0, is_hard, WINDOW)
        assert b.missing(0.0, 1.6, 0, []) == pytest.approx((1.0, 2.0) if is_hard else (-0.1, 1.6))
        assert b.missing(0.0, 3.5, 0, []) == pytest.approx((-0.5, 3.5))


def test_what_came_since_the_plan_was_made_counts():
    b = backlog()
    for number in range(64):
        b.add(1000.0 + number, True, WINDOW)
    before_s = b.finish_s(0.0, 2000.0, 0, [])
    b.add(1500.0, True, WINDOW)  # too few changes for a new plan
    assert b.finish_s(0.001, 2000.0, 0, []) == pytest.approx(before_s + 1.5)
    assert b.finish_s(0.001, 1400.0, 0, []) == pytest.approx(before_s)


def test_more_than_can_lastingly_be_done_raises_the_price():
    b, now_s = backlog(workers=2), 0.0
    for _ in range(2000):
        now_s += 0.8  # 1.25 images/s: 2 workers have 1.6 s for each
        slot = b.add(now_s + 1000.0, False, WINDOW)
        b.arrived(now_s)
        b.see(slot, (2, 1, 0, 0))
        b.remove(slot)
    assert b.rate(now_s) == pytest.approx(1.25, rel=0.05)
    assert b.price(now_s, []) == 0  # nothing waits
    b.see(b.add(now_s + 8.0, False, WINDOW), (2, 1, 0, 0))
    assert b.price(now_s, []) == 2
    b.see(b.add(now_s + 2e4, False, WINDOW), (2, 1, 0, 0))
    assert b.rate(now_s + 1e4) < 1e-9


def test_who_has_come_and_is_not_here_yet_counts_as_work_of_the_narrowest_width():
    for waited_s, price in ((0.0, 0), (1.0, 1), (2.5, 2)):  # at one a second
        b, now_s = backlog(), 0.0
        for _ in range(2000):
            now_s += 1.0
            b.arrived(now_s)
            b.door.learn(waited_s, now_s)
        b.see(b.add(now_s + 5.0, True, WINDOW), (2, 1, 0, 0))
        assert b._make_plan(now_s, []).price == price


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "see", "begin"]), st.floats(0, 1e3)), max_size=300))
def test_the_books_balance(events):
    b, slots, rng = backlog(workers=2), [], np.random.default_rng(0)
    for what, due_s in events:
        if what == "add":
            slots.append(b.add(due_s, True, WINDOW))
        elif slots:
            slot = slots[rng.integers(len(slots))]
            if what == "remove":
                slots.remove(slot)
                b.remove(slot)
            elif what == "see":
                b.see(slot, (2, 1, 1, 0))
            else:
                b.begin(slot)
        assert len(b) == len(slots)
        assert b.price(0.0, []) in range(PRICES)
    assert len(set(slots)) == len(slots)
    assert math.isfinite(b.finish_s(0.0, 1e3, 0, []))


@given(st.integers(1, 19), st.integers(1, 19))
def test_the_lowest_price_is_found_whatever_it_was_before(lowest, guess):
    """As bisection finds it, and with two questions where nothing has changed."""
    asked = []

    def fits(price):
        assert 1 <= price < 19, "the top price always fits"
        asked.append(price)
        return price >= lowest

    assert service.sums.lowest(19, guess, fits) == lowest
    assert len(asked) <= (2 if guess == lowest else 7)


@pytest.mark.parametrize("together", [[0, 1, 2], [3, 1], [5], [5, 0, 3, 1, 4, 2]])
def test_images_go_together_as_they_would_one_by_one(together):
    one_by_one, at_once = backlog(), backlog()
    for b in (one_by_one, at_once):
        slots = [b.add(float(due_s), True, Window(0, 2)) for due_s in (1, 2, 2, 5, 6, 9)]
    for number in together:
        one_by_one.remove(slots[number])
    at_once.remove(*(slots[number] for number in together))
    assert list(at_once._slots) == list(one_by_one._slots)
    assert list(at_once._slots_due_s) == list(one_by_one._slots_due_s)
    assert at_once._least_sum_s == pytest.approx(one_by_one._least_sum_s)
    assert at_once.finish_s(0.0, 20.0, 0, [0.0]) == pytest.approx(one_by_one.finish_s(0.0, 20.0, 0, [0.0]))


def test_asking_is_planned_for_whatever_budgets_allow():
    """Of images that nothing is known of, but for those that are never asked."""
    b = backlog(headroom=1.0)
    b.unasked, b.look_P = (None, None, 1, 0), (1.0,) * 4
    for window in (WINDOW, Window(0, 0), Window(2, 2), Window(1, 1, 1)):
        b.add(100.0, False, window)
    least_s = [COSTS.trunk_s + COSTS.body_s[width] for width in (0, 0, 2, 1)]
    for few_images in (0, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.backlog, "FEW_IMAGES", few_images)
            sums = (b._few if few_images else b._many)(0.0, [0.0])
            assert sums.load(0) == pytest.approx((sum(least_s) + 3 * 1.0) / 100)
            assert sums.load(2) == pytest.approx((sum(least_s) + 1.0) / 100)  # the first image's body is a wider one


def test_a_given_up_image_frees_what_it_still_needs():
    b = backlog()
    waiting, begun = b.add(9.0, True, Window(1, 2)), b.add(9.0, True, WINDOW)
    b.begin(begun)
    assert (b.still_s(waiting), b.still_s(begun)) == (0.5 + 2.0, 1.0)
