import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.ds_mbnet import DsMbnet, imagenet14
from models.ladder import Slice, make_divisible, uniform_ladder


@pytest.mark.parametrize(("channels", "hidden"), [(24, 6), (88, 22), (168, 42), (264, 66), (640, 160), (1152, 288)])
def test_hidden_sizes_of_the_published_squeeze_excite(channels, hidden):
    assert make_divisible(channels * 0.25) == hidden


@given(value=st.floats(1, 10_000), divisor=st.integers(1, 64))
def test_divisible_near_and_never_much_smaller(value, divisor):
    rounded = make_divisible(value, divisor)
    assert rounded % divisor == 0
    assert rounded >= 0.9 * value
    assert rounded - value <= divisor


def test_rounding_down_by_more_than_a_tenth_rounds_up_instead():
    assert make_divisible(11, 8) == 16  # nearest is 8, which loses 27 %
    assert make_divisible(3, 8) == 8
    assert make_divisible(3, 2, minimum=10) == 10


def test_a_divisor_below_one_is_refused():
    with pytest.raises(ValueError, match="divisor is 0"):
        make_divisible(5, 0)


def test_one_index_moves_every_routed_stage():
    ladder = uniform_ladder([(4, 8), (2, 3, 5), (7, 8, 9)], fixed=[True, False, False])
    assert ladder == (Slice(0, (4, 2, 7)), Slice(1, (4, 3, 8)), Slice(2, (4, 5, 9)))


def test_the_published_ladder():
    ladder = DsMbnet(imagenet14()).ladder
    assert [s.extents for s in ladder] == [(16, 32, 48, 96, 224 + 32 * k, 736 + 32 * k) for k in range(14)]


@pytest.mark.parametrize("widths", [(), (4, 4), (8, 4), (0, 4), (-1, 2)])
def test_widths_must_be_positive_and_ascend(widths):
    with pytest.raises(ValueError, match="must be positive and strictly ascending"):
        uniform_ladder([(1, 2), widths], fixed=[False, True])


def test_routed_stages_must_agree_in_length():
    with pytest.raises(ValueError, match=r"equally many widths, got lengths \[2, 3\]"):
        uniform_ladder([(1, 2), (1, 2, 3)], fixed=[False, False])
    with pytest.raises(ValueError, match=r"got lengths \[\]"):
        uniform_ladder([(1, 2)], fixed=[True])
