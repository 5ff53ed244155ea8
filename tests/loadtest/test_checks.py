import math

from loadtest.checks import at_least, at_most, check_table, equal, verdict, within


def test_bars_hold_up_to_their_edge():
    assert equal("a", 3, 3).held
    assert not equal("a", 3, 4).held
    assert at_least("a", 2, 2).held
    assert not at_least("a", 1.9, 2).held
    assert at_most("a", 2, 2).held
    assert not at_most("a", 2.1, 2).held


def test_what_was_not_measured_does_not_hold():
    assert not at_most("a", math.nan, 2).held
    assert not at_least("a", math.nan, 2).held
    assert not within("a", 1, 0, 0.1).held


def test_within_bounds_both_sides():
    assert [within("a", found, 100, 0.02).held for found in (97.9, 98.1, 101.9, 102.1)] == [False, True, True, False]
    assert within("a", 103, 100, 0.02).found == "103, +3.00%"


def test_all_bars_make_the_verdict_and_none_makes_none():
    good, bad = equal("a", 0, 0), equal("b", 1, 0)
    assert verdict([good]) == "held"
    assert verdict([good, bad]) == verdict([]) == "**missed**"
    assert check_table([good, bad])[2:] == ["| a | 0 | 0 | held |", "| b | 0 | 1 | **missed** |"]
