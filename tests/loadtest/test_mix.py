from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.mix import Mix

WIDTHS = "Slice-Width=0:10,3:3,7:2,13:1"


@given(st.integers(0, 2**32), st.integers(1, 20))
def test_every_cycle_keeps_the_shares_exactly(seed, cycles):
    values = Mix.parse(WIDTHS).endless(seed)
    for _ in range(cycles):
        assert Counter(islice(values, 16)) == {"0": 10, "3": 3, "7": 2, "13": 1}


def test_cycles_are_shuffled_by_the_seed_and_not_repeated():
    def order(seed):
        return list(islice(Mix.parse(WIDTHS).endless(seed), 64))

    assert order(1) == order(1) != order(2)
    assert order(1)[:16] != order(1)[16:32]


def test_a_single_value_is_always_sent():
    assert set(islice(Mix.parse("Slice-Width=widest").endless(0), 5)) == {"widest"}


@pytest.mark.parametrize("text", [WIDTHS, "Slice-Width=widest:1"])
def test_what_is_printed_is_read_again(text):
    assert str(Mix.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "Slice-Width", "=0:1", "W=", "W=0:0", "W=0:-1", "W=0:x", "W=0:1,,3:1", "W=:2", "W=0:²"]
)
def test_a_malformed_mix_is_refused_with_the_grammar(text):
    with pytest.raises(ValueError, match=r"HEADER=VALUE\[:SHARE\]"):
        Mix.parse(text)
