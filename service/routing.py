"""Budgets and the gate's wish -> the slice of one image. PURE.

First ``window``, before anything is queued: which slices the budgets allow. Then ``route``, after the
trunk: which of those is served, and why. Ladders are ordered: a wider slice never costs less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import accumulate

from service.errors import BadRequestError, InfeasibleBudgetError
from service.request import Budget, Forced, Reason, Route, SliceFacts, Window


@dataclass(frozen=True, slots=True)
class _Ask:
    """A request against one ladder.

    costs    MAdds per slice: published when one is forced, because the gate does not run then; else served.
    floors   per slice, the greatest floor that it and every wider slice keep; None unless all are measured.
    ceiling  MAdds, None without a compute budget.
    floor    exact ratio, None without an accuracy floor.
    """

    costs: tuple[int, ...]
    floors: tuple[float, ...] | None
    ceiling: int | None
    floor: Fraction | None
    forced: int | None

    @property
    def hi(self) -> int:
        """The widest slice within the ceiling; -1 when even the narrowest is above it."""
        if self.ceiling is None:
            return len(self.costs) - 1
        return max((width for width, cost in enumerate(self.costs) if cost <= self.ceiling), default=-1)

    @property
    def lo(self) -> int:
        """The smallest index from which every wider slice keeps the floor; the ladder's length when none does."""
        if self.floor is None:
            return 0
        # The shortest text of a float is the number that was measured; its binary value may lie just below it.
        keeping = (width for width, best in enumerate(self.floors or ()) if Fraction(str(best)) >= self.floor)
        return next(keeping, len(self.costs))


def window(budget: Budget, slices: Sequence[SliceFacts]) -> Window:
    """The slices that a request allows, lo <= hi, with the forced one inside when there is one.

    hi comes from the compute ceiling (the stricter one of MAdds and share; a share is taken of the widest
    slice's served MAdds and floored), compared with served MAdds, or with published ones when a slice
    is forced. lo comes from the accuracy floor, compared exactly.

    Raises BadRequestError for an unknown slice index and InfeasibleBudgetError when no slice, or not
    the forced one, is within the budgets. Its ``feasible`` names, for each budget, the nearest value
    with which the request as it stands would be granted, all else kept:

    * ``compute_budget``: the cost of the narrowest slice that keeps the floor, or of the forced slice;
      None when no ceiling would do, because the floor is above every slice (or the forced one), or
      accuracies are not measured.
    * ``accuracy_floor``: the greatest floor that the widest slice within the ceiling, or the forced
      slice, keeps; None when no floor would do, because the ceiling is below every slice (or the forced
      one), or accuracies are not measured.

    When neither alone would do, both have to change and are named together: the narrowest (or forced)
    slice's cost and the floor that it keeps. So a client that asks again with both values, leaving its
    ceiling as it is for a None there and leaving out its floor for a None there, is always granted.
    """
    forced = _resolve(budget.forced, len(slices))
    ask = _Ask(
        costs=tuple(facts.madds_served if forced is None else facts.madds_published for facts in slices),
        floors=_kept_floors(slices),
        ceiling=_ceiling_madds(budget, slices[-1].madds_served),
        floor=budget.accuracy_floor,
        forced=forced,
    )
    lo, hi = ask.lo, ask.hi
    if lo <= hi and (forced is None or lo <= forced <= hi):
        return Window(lo, hi, forced)
    raise _infeasible(ask)


def route(window: Window, gate_width: int | None, proposal: int, fits: Callable[[int], bool]) -> Route:
    """The slice of one image.

    gate_width  the gate's wish, None when the gate did not run.
    proposal    the policy's choice; for the policy ``gate`` the wish itself.
    fits        whether a slice would be answered before the deadline.

    A forced slice is served as it is. Otherwise the proposal is clamped to the window, then lowered to
    the widest slice that fits, or to lo when none does. The reason is the first that applies in the order
    of Reason, even if a later one moved the slice further: a proposal cut by the ceiling and then
    lowered again by the deadline is ``compute_budget``, one narrowed under load and then lowered by the
    deadline is ``latency_budget``. ``load``, ``widened`` and ``gate`` compare the proposal with the
    wish; ``policy`` stands for a proposal that was made without one.

    The scheduler takes the two steps apart: it needs many widths and few reasons.
    """
    return explained(window, gate_width, proposal, routed_width(window, proposal, fits))


def routed_width(window: Window, proposal: int, fits: Callable[[int], bool]) -> int:
    """The width of ``route``, for who need not know why."""
    width = clamped(proposal, window)
    if window.forced is None:
        while width > window.lo and not fits(width):
            width -= 1
    return width


def explained(
    window: Window, gate_width: int | None, proposal: int, width: int, unseen: Reason = Reason.POLICY
) -> Route:
    """The same slice at a width that is known. unseen: the reason for a proposal that was made without a wish."""
    if window.forced is not None:
        return _known(width, Reason.FORCED, gate_width)
    return _known(width, _reason(window, gate_width, proposal, width, unseen), gate_width)


@cache
def _known(width: int, reason: Reason, gate_width: int | None) -> Route:
    """There are only so many; one is found in a fraction of the time that it takes to make."""
    return Route(width, reason, gate_width)


def _reason(window: Window, gate_width: int | None, proposal: int, width: int, unseen: Reason) -> Reason:
    if proposal < window.lo:
        return Reason.ACCURACY_FLOOR
    if proposal > window.hi:
        return Reason.COMPUTE_BUDGET
    if width < proposal:
        return Reason.LATENCY_BUDGET
    if gate_width is None:
        return unseen
    if proposal == gate_width:
        return Reason.GATE
    return Reason.LOAD if proposal < gate_width else Reason.WIDENED


def _resolve(forced: Forced | None, count: int) -> int | None:
    if forced == "narrowest":
        return 0
    if forced == "widest":
        return count - 1
    if forced is not None and not 0 <= forced < count:
        raise BadRequestError(
            f"slice {forced!s:.64} is unknown; allowed: an index 0..{count - 1}, narrowest, widest or auto"
        )
    return forced


def _ceiling_madds(budget: Budget, widest_madds: int) -> int | None:
    ceilings = [] if budget.compute_madds is None else [budget.compute_madds]
    if budget.compute_share is not None:
        ceilings.append(math.floor(budget.compute_share * widest_madds))
    return min(ceilings, default=None)


def _kept_floors(slices: Sequence[SliceFacts]) -> tuple[float, ...] | None:
    """Per slice, the least accuracy among it and all wider ones; None unless every slice is measured."""
    accuracies = [facts.accuracy for facts in slices if facts.accuracy is not None]
    if len(accuracies) < len(slices):
        return None
    return tuple(accumulate(reversed(accuracies), min))[::-1]


def _infeasible(ask: _Ask) -> InfeasibleBudgetError:
    lo, hi, forced = ask.lo, ask.hi, ask.forced
    if forced is None:
        floor_can_stay, ceiling_can_stay = lo < len(ask.costs), hi >= 0
        least, most = lo if floor_can_stay else 0, hi if ceiling_can_stay else 0
    else:
        floor_can_stay, ceiling_can_stay = lo <= forced, forced <= hi
        least = most = forced
    compute_budget: int | None = None
    accuracy_floor: float | None = None
    allowed = []
    if floor_can_stay or not ceiling_can_stay:
        compute_budget = ask.costs[least]
        allowed.append(f"a compute budget of at least {compute_budget} MAdds")
    if ceiling_can_stay or not floor_can_stay:
        if ask.floors is not None and ask.floors[most] > 0:
            accuracy_floor = ask.floors[most]
            allowed.append(f"an accuracy floor of at most {accuracy_floor}")
        else:
            allowed.append("no accuracy floor" + (", as accuracies are not measured" if ask.floors is None else ""))
    joined = " or " if floor_can_stay or ceiling_can_stay else " and "
    message = f"{_refused(ask)}; allowed: {joined.join(allowed)}"
    return InfeasibleBudgetError(message, {"compute_budget": compute_budget, "accuracy_floor": accuracy_floor})


def _refused(ask: _Ask) -> str:
    given = [] if ask.ceiling is None else [f"compute budget {ask.ceiling} MAdds"]
    if ask.floor is not None:
        given.append(f"accuracy floor {float(ask.floor)}")
    who = "no slice is" if ask.forced is None else f"forced slice {ask.forced} is not"
    return f"{who} within {' and '.join(given)}"


def clamped(proposal: int, window: Window) -> int:
    """The width next to a proposal that a request allows."""
    if window.forced is not None:
        return window.forced
    if proposal < window.lo:
        return window.lo
    return window.hi if proposal > window.hi else proposal


def least_width(window: Window) -> int:
    """The narrowest width that a request allows."""
    return window.lo if window.forced is None else window.forced
