from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import BadRequestError, InfeasibleBudgetError
from service.request import Budget, Reason, Route, SliceFacts, Window
from service.routing import route, window

PROPERTY = settings(deadline=None, max_examples=300)


def ladder(published: Sequence[int], accuracies: Sequence[float | None], head: int = 10) -> tuple[SliceFacts, ...]:
    pairs = zip(published, accuracies, strict=True)
    return tuple(SliceFacts(width, cost, cost + head, accuracy) for width, (cost, accuracy) in enumerate(pairs))


# Width 1 is better than width 2: a floor is kept from an index upwards, not by one slice.
BUMPY = ladder([100, 200, 300, 400], [0.80, 0.89, 0.88, 0.92])
UNMEASURED = ladder([100, 200, 300, 400], [0.80, None, 0.88, 0.92])


@st.composite
def ladders(draw: st.DrawFn) -> tuple[SliceFacts, ...]:
    steps = draw(st.lists(st.integers(0, 50), min_size=1, max_size=6))
    published = [1 + sum(steps[: width + 1]) for width in range(len(steps))]
    accuracy = st.sampled_from([0.0, 0.1, 0.3, 0.7, 0.9142, 1.0])
    # One ladder in five or so has a slice that nobody measured.
    measured = draw(st.integers(0, 4)) > 0
    one = accuracy if measured else st.one_of(st.none(), accuracy)
    accuracies = draw(st.lists(one, min_size=len(steps), max_size=len(steps)))
    return ladder(published, accuracies, head=draw(st.integers(0, 20)))


def budgets(count: int) -> st.SearchStrategy[Budget]:
    return st.builds(
        Budget,
        compute_madds=st.one_of(st.none(), st.integers(0, 330)),
        compute_share=st.one_of(st.none(), st.fractions(Fraction(1, 1000), 1)),
        accuracy_floor=st.one_of(
            st.none(), st.fractions(Fraction(1, 1000), 1), st.sampled_from([Fraction("0.9142"), Fraction("0.7")])
        ),
        forced=st.one_of(st.none(), st.integers(0, count - 1), st.sampled_from(["narrowest", "widest"])),
    )


CASES = ladders().flatmap(lambda slices: st.tuples(st.just(slices), budgets(len(slices))))


class Oracle:
    """The routing paragraph, said again slice by slice."""

    def __init__(self, slices: Sequence[SliceFacts], budget: Budget) -> None:
        self.slices, self.budget = slices, budget
        named = {"narrowest": 0, "widest": len(slices) - 1}
        self.forced = named.get(budget.forced, budget.forced) if isinstance(budget.forced, str) else budget.forced

    def cost(self, width: int) -> int:
        facts = self.slices[width]
        return facts.madds_served if self.forced is None else facts.madds_published

    def within_ceiling(self, width: int) -> bool:
        madds, share = self.budget.compute_madds, self.budget.compute_share
        within_share = share is None or self.cost(width) <= share * self.slices[-1].madds_served
        return within_share and (madds is None or self.cost(width) <= madds)

    def keeps_floor(self, width: int) -> bool:
        floor = self.budget.accuracy_floor
        if floor is None:
            return True
        if any(facts.accuracy is None for facts in self.slices):
            return False
        return all(Fraction(str(facts.accuracy)) >= floor for facts in self.slices[width:])

    def granted(self) -> list[int]:
        good = [w for w in range(len(self.slices)) if self.within_ceiling(w) and self.keeps_floor(w)]
        return good if self.forced is None else [w for w in good if w == self.forced]

    def least_ceiling(self) -> int | None:
        """The least ceiling with which the same request would be granted."""
        costs = (self.cost(width) for width in range(len(self.slices)))
        alone = replace(self.budget, compute_share=None)
        return min((c for c in costs if Oracle(self.slices, replace(alone, compute_madds=c)).granted()), default=None)

    def greatest_floor(self) -> float | None:
        """The greatest floor with which the same request would be granted."""
        floors = (facts.accuracy for facts in self.slices if facts.accuracy)
        return max(
            (f for f in floors if Oracle(self.slices, replace(self.budget, accuracy_floor=Fraction(str(f)))).granted()),
            default=None,
        )


def refusal(budget: Budget, slices: Sequence[SliceFacts]) -> InfeasibleBudgetError:
    with pytest.raises(InfeasibleBudgetError) as caught:
        window(budget, slices)
    assert caught.value.feasible.keys() == {"compute_budget", "accuracy_floor"}
    return caught.value


def asked_again(budget: Budget, feasible: dict[str, float | int | None]) -> Budget:
    """What a client sends next: both values, its own ceiling for a null there, no floor for a null there."""
    floor, ceiling = feasible["accuracy_floor"], feasible["compute_budget"]
    again = replace(budget, accuracy_floor=None if floor is None else Fraction(str(floor)))
    return again if ceiling is None else replace(again, compute_madds=int(ceiling), compute_share=None)


@given(CASES)
@PROPERTY
def test_window_is_what_the_brute_force_reading_of_the_contract_says(
    case: tuple[tuple[SliceFacts, ...], Budget],
) -> None:
    slices, budget = case
    oracle = Oracle(slices, budget)
    granted = oracle.granted()
    if not granted:
        refusal(budget, slices)
        return
    allowed = window(budget, slices)
    widths = range(len(slices))
    assert allowed.lo == min(w for w in widths if oracle.keeps_floor(w))
    assert allowed.hi == max(w for w in widths if oracle.within_ceiling(w))
    assert allowed.forced == oracle.forced
    for width in range(allowed.lo, allowed.hi + 1):
        assert oracle.within_ceiling(width)
        assert oracle.keeps_floor(width)


@given(CASES)
@PROPERTY
def test_the_feasible_point_is_the_nearest_one_and_is_granted_when_asked_for(
    case: tuple[tuple[SliceFacts, ...], Budget],
) -> None:
    slices, budget = case
    oracle = Oracle(slices, budget)
    if oracle.granted():
        return
    feasible = refusal(budget, slices).feasible
    ceiling, floor = oracle.least_ceiling(), oracle.greatest_floor()
    if ceiling is not None or floor is not None:
        assert feasible == {"compute_budget": ceiling, "accuracy_floor": floor}
    assert Oracle(slices, asked_again(budget, feasible)).granted()
    window(asked_again(budget, feasible), slices)


@pytest.mark.parametrize(
    ("budget", "lo", "hi", "forced"),
    [
        (Budget(), 0, 3, None),
        (Budget(compute_madds=310), 0, 2, None),
        (Budget(compute_madds=309), 0, 1, None),
        (Budget(compute_share=Fraction(1)), 0, 3, None),
        (Budget(compute_share=Fraction(310, 410)), 0, 2, None),
        (Budget(compute_share=Fraction(309, 410)), 0, 1, None),
        (Budget(compute_madds=310, compute_share=Fraction(1, 2)), 0, 0, None),
        (Budget(compute_madds=110, compute_share=Fraction(1)), 0, 0, None),
        (Budget(accuracy_floor=Fraction("0.8")), 0, 3, None),
        (Budget(accuracy_floor=Fraction("0.88")), 1, 3, None),
        (Budget(accuracy_floor=Fraction("0.89")), 3, 3, None),
        (Budget(accuracy_floor=Fraction("0.88"), compute_madds=210), 1, 1, None),
        (Budget(forced="narrowest"), 0, 3, 0),
        (Budget(forced="widest"), 0, 3, 3),
        (Budget(forced=2, compute_madds=300), 0, 2, 2),
        (Budget(forced=3, accuracy_floor=Fraction("0.92")), 3, 3, 3),
    ],
)
def test_window(budget: Budget, lo: int, hi: int, forced: int | None) -> None:
    assert window(budget, BUMPY) == Window(lo, hi, forced)


@pytest.mark.parametrize(
    ("budget", "compute_budget", "accuracy_floor", "message"),
    [
        # ceiling below the narrowest; no floor would help
        (Budget(compute_madds=0), 110, None, "compute budget 0 MAdds; allowed: a compute budget of at least 110 MAdds"),
        (Budget(compute_madds=109, accuracy_floor=Fraction("0.88")), 210, None, "accuracy floor 0.88"),
        # floor above every slice; no ceiling would help
        (
            Budget(accuracy_floor=Fraction("0.921")),
            None,
            0.92,
            "accuracy floor 0.921; allowed: an accuracy floor of at most",
        ),
        (Budget(accuracy_floor=Fraction("0.921"), compute_madds=310), None, 0.88, "compute budget 310 MAdds and"),
        # each could be granted, not both
        (
            Budget(accuracy_floor=Fraction("0.9"), compute_madds=310),
            410,
            0.88,
            "at least 410 MAdds or an accuracy floor",
        ),
        # neither could be granted
        (
            Budget(accuracy_floor=Fraction("0.95"), compute_madds=1),
            110,
            0.8,
            "at least 110 MAdds and an accuracy floor",
        ),
        # a forced slice costs what is published
        (Budget(forced=2, compute_madds=299), 300, None, "forced slice 2 is not within compute budget 299 MAdds"),
        (Budget(forced=2, accuracy_floor=Fraction("0.89")), None, 0.88, "forced slice 2"),
        (Budget(forced=1, accuracy_floor=Fraction("0.99"), compute_madds=5), 200, 0.88, "at least 200 MAdds and"),
    ],
)
def test_refusals_say_what_was_given_and_what_is_allowed(
    budget: Budget, compute_budget: int | None, accuracy_floor: float | None, message: str
) -> None:
    error = refusal(budget, BUMPY)
    assert error.feasible == {"compute_budget": compute_budget, "accuracy_floor": accuracy_floor}
    assert message in str(error)


@pytest.mark.parametrize("forced", [None, 0, "widest"])
def test_a_floor_needs_every_slice_to_be_measured(forced: int | None) -> None:
    error = refusal(Budget(accuracy_floor=Fraction("0.1"), forced=forced), UNMEASURED)
    assert error.feasible == {"compute_budget": None, "accuracy_floor": None}
    assert "not measured" in str(error)


def test_a_ceiling_needs_no_measured_accuracy() -> None:
    assert window(Budget(compute_madds=310), UNMEASURED) == Window(0, 2)


def test_a_floor_is_compared_as_the_decimal_that_was_measured() -> None:
    # The binary value of 0.9142 lies below the decimal; 0.1 + 0.2 lies above 0.3.
    slices = ladder([1, 2], [0.1 + 0.2, 0.9142])
    assert window(Budget(accuracy_floor=Fraction("0.9142")), slices) == Window(1, 1)
    assert window(Budget(accuracy_floor=Fraction("0.3")), slices) == Window(0, 1)
    assert refusal(Budget(accuracy_floor=Fraction("0.91420000000000000001")), slices)


@pytest.mark.parametrize("forced", [4, -1, 10**60])
def test_an_unknown_slice_is_a_bad_request_whatever_the_budgets(forced: int) -> None:
    with pytest.raises(BadRequestError, match=r"allowed: an index 0\.\.3, narrowest, widest or auto"):
        window(Budget(forced=forced, compute_madds=0), BUMPY)


def always(_: int) -> bool:
    return True


def at_most(limit: int) -> set[int]:
    return set(range(limit + 1))


@pytest.mark.parametrize(
    ("allowed", "gate_width", "proposal", "fitting", "width", "reason"),
    [
        (Window(0, 7), 4, 4, at_most(7), 4, Reason.GATE),
        (Window(0, 7), 4, 2, at_most(7), 2, Reason.LOAD),
        (Window(0, 7), 4, 6, at_most(7), 6, Reason.WIDENED),
        (Window(0, 7), None, 6, at_most(7), 6, Reason.POLICY),
        (Window(5, 7), 4, 4, at_most(7), 5, Reason.ACCURACY_FLOOR),
        (Window(0, 3), 4, 4, at_most(7), 3, Reason.COMPUTE_BUDGET),
        (Window(0, 7), 4, 4, at_most(2), 2, Reason.LATENCY_BUDGET),
        # no slice of the window fits: the narrowest that is allowed
        (Window(2, 7), 4, 4, at_most(1), 2, Reason.LATENCY_BUDGET),
        # nothing left to lower
        (Window(4, 7), 4, 4, set(), 4, Reason.GATE),
        # a slice that fits below the window is out of reach; a gap in what fits is stepped over
        (Window(2, 7), 6, 6, {0, 1, 3, 4}, 4, Reason.LATENCY_BUDGET),
        # several apply: the first in the order of Reason
        (Window(0, 3), 5, 5, at_most(1), 1, Reason.COMPUTE_BUDGET),
        (Window(5, 7), 6, 4, at_most(7), 5, Reason.ACCURACY_FLOOR),
        (Window(0, 3), 2, 6, at_most(7), 3, Reason.COMPUTE_BUDGET),
        (Window(0, 7), 5, 4, at_most(3), 3, Reason.LATENCY_BUDGET),
        (Window(0, 7), 2, 4, at_most(3), 3, Reason.LATENCY_BUDGET),
        (Window(0, 7), None, 4, at_most(3), 3, Reason.LATENCY_BUDGET),
    ],
)
def test_route(
    allowed: Window, gate_width: int | None, proposal: int, fitting: set[int], width: int, reason: Reason
) -> None:
    assert route(allowed, gate_width, proposal, fitting.__contains__) == Route(width, reason, gate_width)


def test_a_forced_slice_is_never_moved_by_the_deadline() -> None:
    forced = route(Window(0, 7, forced=6), None, 6, lambda _: False)
    assert forced == Route(6, Reason.FORCED, None)


@given(
    bounds=st.tuples(st.integers(0, 7), st.integers(0, 7)).map(sorted),
    gate_width=st.one_of(st.none(), st.integers(0, 7)),
    proposal=st.integers(0, 7),
    fitting=st.sets(st.integers(0, 7)),
    is_forced=st.booleans(),
)
@PROPERTY
def test_route_is_what_the_brute_force_reading_of_the_contract_says(
    bounds: list[int], gate_width: int | None, proposal: int, fitting: set[int], is_forced: bool
) -> None:
    lo, hi = bounds
    clamped = sorted((lo, proposal, hi))[1]
    width = max((w for w in fitting if lo <= w <= clamped), default=lo)
    applies = {
        Reason.FORCED: is_forced,
        Reason.ACCURACY_FLOOR: proposal < lo,
        Reason.COMPUTE_BUDGET: proposal > hi,
        Reason.LATENCY_BUDGET: width < clamped,
        Reason.LOAD: gate_width is not None and proposal < gate_width,
        Reason.WIDENED: gate_width is not None and proposal > gate_width,
        Reason.POLICY: gate_width is None,
        Reason.GATE: True,
    }
    allowed = Window(lo, hi, forced=hi if is_forced else None)
    expected = Route(hi if is_forced else width, next(r for r in Reason if applies[r]), gate_width)
    assert route(allowed, gate_width, proposal, fitting.__contains__) == expected


def test_without_a_deadline_the_gate_is_obeyed() -> None:
    for wish in range(8):
        assert route(Window(0, 7), wish, wish, always) == Route(wish, Reason.GATE, wish)
