from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.latency import DELAY_MEMORY_S, OVERHEAD_SHARE, Costs, Delay, LatencyTable, LiveTimes, Overhead

TIMES = {(None, 1): 0.5, (None, 4): 1.0, (0, 1): 1.0, (0, 2): 1.5, (0, 8): 4.5, (1, 1): 2.0, (1, 2): 4.0, (1, 4): 9.0}
TABLE = LatencyTable(TIMES)


@pytest.mark.parametrize(
    ("width", "batch", "seconds"),
    [
        (0, 1, 1.0),
        (0, 2, 1.5),
        (0, 3, 2.0),
        (0, 7, 4.0),
        (0, 8, 4.5),
        (0, 16, 9.0),
        (None, 2, 0.5 + 0.5 / 3),
        (None, 8, 2.0),
        (1, 6, 13.5),
    ],
)
def test_unmeasured_sizes_are_interpolated_and_then_cost_per_image_what_the_largest_costs(
    width: int | None, batch: int, seconds: float
) -> None:
    assert TABLE.seconds(width, batch) == pytest.approx(seconds)


def test_a_queue_with_one_size_grows_in_proportion() -> None:
    assert LatencyTable({(None, 1): 0.1, (0, 1): 0.2}).seconds(0, 5) == pytest.approx(1.0)


def test_the_best_batch_costs_least_per_image_and_equals_go_to_the_smaller() -> None:
    assert TABLE.best_batch(None) == 4
    assert TABLE.best_batch(0) == 8
    assert TABLE.best_batch(1) == 1


@pytest.mark.parametrize("trunk_4_ms", [0.93, 0.98])
def test_small_networks_batch_by_their_handovers(trunk_4_ms: float) -> None:
    """Of 0.25 ms an image at 2: without a hand-over the second would not save its 5 %."""
    times = {(None, 1): 0.335e-3, (None, 2): 0.507e-3, (None, 4): trunk_4_ms * 1e-3, (None, 8): 1.93e-3, (0, 1): 1e-3}
    assert LatencyTable(times).best_batch(None) == 4


def test_one_image_alone_pays_trunk_and_body() -> None:
    assert TABLE.image_seconds(1) == 2.5


def test_unknown_queues_and_empty_batches_are_refused() -> None:
    for width in (7, -1):
        with pytest.raises(KeyError):
            TABLE.seconds(width, 3)
        with pytest.raises(KeyError):
            TABLE.best_batch(width)
    with pytest.raises(ValueError, match="at least 1"):
        TABLE.seconds(0, 0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_times_are_finite_and_above_0(seconds: float) -> None:
    with pytest.raises(ValueError, match="width 1 takes"):
        LatencyTable({**TIMES, (1, 1): seconds})


def test_batches_have_at_least_one_image() -> None:
    with pytest.raises(ValueError, match="at least 1 image"):
        LatencyTable({**TIMES, (0, 0): 1.0})


@pytest.mark.parametrize(("missing", "named"), [((None, 1), "the trunk"), ((1, 1), "width 1")])
def test_every_queue_is_measured_at_one_image(missing: tuple[int | None, int], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} is not measured at a batch of 1"):
        LatencyTable({key: seconds for key, seconds in TIMES.items() if key != missing})


@pytest.mark.parametrize("rows", [{}, {(None, 1): 1.0}, {(0, 1): 1.0}])
def test_a_table_has_a_trunk_and_a_body(rows: dict[tuple[int | None, int], float]) -> None:
    with pytest.raises(ValueError, match="trunk and at least one body"):
        LatencyTable(rows)


def test_the_table_is_a_copy_that_nobody_can_write_to() -> None:
    rows: dict[tuple[int | None, int], float] = {(None, 1): 1.0, (0, 1): 1.0}
    table = LatencyTable(rows)
    rows[0, 1] = 9.0
    assert table.seconds(0, 1) == 1.0
    with pytest.raises(TypeError):
        table.seconds_by_batch[0, 1] = 9.0  # type: ignore[index]


def live(**seconds):
    return LiveTimes(LatencyTable({(None, 1): 1.0, (0, 1): 2.0, (0, 4): 6.0} | seconds))


def test_without_batches_the_table_holds():
    times = live()
    assert [times.seconds(0, n) for n in (1, 2, 4, 8)] == [times.table.seconds(0, n) for n in (1, 2, 4, 8)]
    assert times.spread_s(0) == 0.0


def test_a_slower_machine_is_learnt_per_queue_with_its_slope():
    times = live()
    for number in range(400):
        images = 1 + number % 4
        times.learn(0, images, times.table.seconds(0, images) + 0.5 * images + 0.25, number * 1e-3)
    for images in (1, 2, 4):
        assert times.seconds(0, images) == pytest.approx(times.table.seconds(0, images) + 0.5 * images + 0.25, rel=0.1)
    assert times.seconds(None, 1) == 1.0
    assert times.spread_s(0) < 0.3


def test_what_was_said_is_forgotten_when_the_queue_learns():
    times = live()
    before = times.seconds(0, 3), times.alone_s(0), times.seconds(None, 1)
    times.learn(0, 4, 9.0, 0.0)
    assert times.seconds(0, 3) > before[0]
    assert times.alone_s(0) == times.seconds(0, 1) + times.spread_s(0) > before[1]
    assert times.seconds(None, 1) == before[2]
    with pytest.raises(KeyError):
        times.seconds(7, 1)


def test_one_batch_that_the_machine_stopped_for_an_hour_is_not_believed():
    times = live()
    times.learn(None, 1, 3600.0, 0.0)
    assert times.seconds(None, 1) <= 8.0


def test_a_bad_moment_is_forgotten_even_when_nothing_runs():
    times = live()
    for _ in range(100):
        times.learn(None, 1, 8.0, 0.0)
    assert times.seconds(None, 1) > 6.0
    times.age(200.0)
    assert times.seconds(None, 1) < 1.1


@given(
    st.lists(st.tuples(st.integers(1, 64), st.floats(1e-6, 1e3), st.floats(0, 1e3)), max_size=60), st.integers(1, 64)
)
def test_no_history_makes_a_batch_free(history, images):
    times = live()
    for size, seconds, now_s in history:
        times.learn(0, size, seconds, now_s)
        times.age(now_s)
    assert times.seconds(0, images) >= 0.25 * times.table.seconds(0, images)
    assert math.isfinite(times.seconds(0, images))
    assert math.isfinite(times.spread_s(0))


def test_costs_are_per_image_where_batches_pay():
    assert live().costs() == Costs(1.0, (1.5,))
    assert live().table.widths == (0,)


@given(st.lists(st.floats(0, 10), max_size=200), st.floats(0, 100))
def test_a_delay_is_within_what_was_seen_and_forgotten_when_nothing_is(delays_s, idle_s):
    delay = Delay()
    for at, delay_s in enumerate(delays_s):
        delay.learn(delay_s, at * 1e-3)
    last_s, most_s = max(0, len(delays_s) - 1) * 1e-3, max(delays_s, default=0)
    fade = math.exp(-idle_s / DELAY_MEMORY_S)
    assert 0 <= delay.mean_s <= most_s + 1e-9
    assert 0 <= delay.expected_s(last_s + idle_s) <= most_s * fade + 1e-9
    assert delay.expected_s(last_s) <= delay.allowance_s(last_s)
    assert 0 <= delay.allowance_s(last_s + idle_s) <= 3 * most_s * fade + 1e-9


def test_a_steady_delay_is_learnt():
    delay = Delay()
    for at in range(1000):
        delay.learn(0.004, at * 1e-3)
    assert delay.expected_s(0.999) == pytest.approx(0.004)
    assert delay.allowance_s(0.999) == pytest.approx(0.004, rel=1e-3)


def test_a_bad_moment_is_over_with_the_first_good_one_after_a_while():
    delay = Delay()
    for at in range(100):
        delay.learn(0.3, at * 1e-3)
    assert delay.allowance_s(0.1) > 0.2
    assert delay.allowance_s(4.0) < 0.001  # nobody was let in, so nothing was learnt
    delay.learn(0.0003, 4.0)
    assert delay.allowance_s(4.0) < 0.002


def test_the_first_delay_of_all_is_one_of_many():
    delay = Delay()
    delay.learn(0.1, 1000.0)
    assert delay.expected_s(1000.0) < 0.01


def overhead_of(windows, images=100):
    """Windows of a quarter of a second: CPU seconds of the process and of its batches in each."""
    overhead, cpu_s = Overhead(), 0.0
    overhead.learn(0.0, 0.0)
    for at, (process_s, batches_s) in enumerate(windows, 1):
        for _ in range(images):
            overhead.worked(batches_s / images, 1)
        cpu_s += process_s
        overhead.learn(at * 0.25, cpu_s)
    return overhead


def test_the_overhead_is_what_the_process_spends_beside_its_batches_per_image():
    assert overhead_of([(0.4, 0.25)] * 50).per_image_s(12.5) == pytest.approx(0.15 / 100)


@given(st.lists(st.tuples(st.floats(0, 4), st.floats(0, 4)), min_size=1, max_size=40))
def test_the_overhead_is_within_what_was_seen(windows):
    seen = [max(0.0, process_s - batches_s) / 100 for process_s, batches_s in windows]
    assert 0 <= overhead_of(windows).per_image_s(0.25 * len(windows)) <= max(seen) + 1e-9


def test_who_is_turned_away_bears_its_share_of_the_overhead():
    overhead = Overhead()
    overhead.learn(0.0, 0.0)
    for _ in range(50):
        overhead.worked(0.001, 1)
        overhead.turned_away()
    overhead.learn(0.25, 0.25)
    assert overhead.per_image_s(0.25) == pytest.approx(OVERHEAD_SHARE * (0.25 - 0.05) / 100)


def test_among_a_few_images_nothing_is_shared_out():
    """A scrape of the metrics between two images is not what an image costs."""
    assert overhead_of([(0.4, 0.25)] * 50, images=2).per_image_s(12.5) == 0.0


def test_the_overhead_is_forgotten_with_or_without_another_batch():
    overhead = overhead_of([(0.4, 0.25)] * 50)
    assert overhead.per_image_s(13.4) > 0
    assert overhead.per_image_s(13.6) == 0.0
    overhead.worked(0.01, 100)
    overhead.learn(60.0, 100.0)
    assert overhead.per_image_s(60.0) == 0.0


def test_batches_that_end_in_the_next_window_do_not_count_as_overhead():
    """On average: their time is missing in the one and too much in the other."""
    swinging = overhead_of([(0.25, 0.0), (0.25, 0.5)] * 50).per_image_s(25.0)
    assert swinging < 0.2 * 0.25 / 100


def test_the_overhead_is_a_cost_of_its_own_up_to_that_of_the_widest_network():
    overhead = overhead_of([(25.0, 12.5)] * 50)  # 0.125 s per image
    times, bare = LiveTimes(TABLE, overhead), LiveTimes(TABLE).costs()
    times.age(12.5)
    assert times.costs().overhead_s == pytest.approx(0.125)
    assert (times.costs().trunk_s, times.costs().body_s) == (bare.trunk_s, bare.body_s)
    times = LiveTimes(TABLE, overhead_of([(1e5, 0.0)] * 50))
    times.age(12.5)
    assert times.costs().overhead_s == pytest.approx(bare.trunk_s + bare.body_s[-1])
