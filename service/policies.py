"""Which width, and how many images at once: the policies, behind one small interface. PURE.

``gate`` and ``gate_slack`` look at every image: its trunk and gate run first. The others never do; they
choose one width for a whole batch before anything has run, from the time that its most urgent image has left.
A policy only proposes: budgets clamp what it says (``service.routing``).

Sources. ``slackfit``, ``maxbatch`` and ``maxacc``: SuperServe (NSDI 2025), section 4. The paper leaves open
the number of buckets, ties and what happens when too few images wait or nothing fits; what is done here is
said at each. ``gate_slack`` is ours, see docs/scheduling.md.

Shapes: N images, G gate choices, P prices, L ladder length.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.latency import LiveTimes
from service.request import Look

F32 = NDArray[np.float32]

PRICES = (0.0, *(0.002 * 1.5**step for step in range(18)), float("inf"))
"""What the time of the widest body costs, as probability of being right. 0: the gate's wish. inf: the narrowest."""
TOP = len(PRICES) - 1
PRICES_PER_URGENCY = 2
"""How many prices one step of RFC 9218 urgency is worth: a factor of 2.25."""
MIDDLE_URGENCY = 3
Widths = tuple[int | None, ...]
ASK_UNTIL_TOP: Widths = (*(None,) * TOP, 0)
NO_LOOK = (0.0,) * len(PRICES)
MAX_BATCH = 16
SLACKFIT_BUCKETS = 32
"""Ours: the paper does not state it."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What a hold-out says images are worth: their accuracy, less what the operating point asks for their cost.

    worth_L   at every slice, for all images.
    asked     at every operating point of the gate: that, and the share of images at each of its choices.
    has_exit  slice 0 is an early exit: whom it answers costs nothing more than the trunk.
    """

    worth_L: tuple[float, ...]
    asked: tuple[tuple[float, tuple[float, ...]], ...]
    has_exit: bool = False


@dataclass(frozen=True, slots=True)
class Asking:
    """Seconds that asking the gate costs an image beside trunk, gate and body.

    ask_s   that an early exit answers. look_s: whose body is a batch of its own.
    """

    ask_s: float
    look_s: float


ON_CPU, FREE = Asking(7e-5, 4e-4), Asking(0.0, 0.0)
"""On a CPU a second decision, or a second batch and a second way through the event loop (docs/adr/0014, 0019). On a GPU
nobody has measured it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Run up to ``images`` whole networks at ``width``, without asking the gate."""

    width: int
    images: int


class Policy(Protocol):
    """What the scheduler asks. All methods are pure.

    name       as the setting spells it.
    asks_gate  images are looked at before their width is decided; a deadline may then lower it.
    is_priced  the scheduler works out the price of time for it; 0 is passed otherwise.
    is_fair    a plan leaves the other workers their share of what waits; False where the policy was published with
               a batch size of its own.
    unasked    at every price the width of images that the gate is not asked about; None where it is asked.
    look_P     at every price what asking costs the average image, in seconds, beside trunk, gate and body.
    """

    name: str
    asks_gate: bool
    is_priced: bool
    is_fair: bool
    unasked: Widths
    look_P: tuple[float, ...]

    def before(self, slack_s: float, waiting: int, price: int) -> Plan | None:
        """For images that nothing is known of. None: run trunk and gate first.

        slack_s  until the most urgent of them is due; waiting: how many there are.
        """

    def after(self, look: Look, urgency: int, price: int) -> int:
        """The width of an image that the gate has seen."""

    def looks(self, utility_NG: F32, wish_N: NDArray[np.int64], best_N: NDArray[np.int64]) -> list[Look]:
        """What to remember of images that the gate has just seen; called on worker threads.

        utility_NG  probability of being right at each choice, less what the operating point asks for its cost.
        best_N      the widest ladder index up to which that probability, cost apart, does not fall from the wish on.
        """

    def renew(self, times: LiveTimes) -> None:
        """Batches take other times now."""


def priced(urgency: int, price: int) -> int:
    """The price for an image of this urgency: none is asked without pressure, all pay at the top."""
    if urgency == MIDDLE_URGENCY or price in (0, TOP):
        return price
    return min(max(price + PRICES_PER_URGENCY * (urgency - MIDDLE_URGENCY), 1), TOP)


class Gate:
    """The gate's wish at the operating point, never moved by load."""

    name, asks_gate, is_priced, is_fair = "gate", True, False, True
    unasked, look_P = ASK_UNTIL_TOP, NO_LOOK

    def before(self, slack_s: float, waiting: int, price: int) -> Plan | None:
        return None

    def after(self, look: Look, urgency: int, price: int) -> int:
        return look.wish

    def looks(self, utility_NG: F32, wish_N: NDArray[np.int64], best_N: NDArray[np.int64]) -> list[Look]:
        return [Look(wish, (0,) * len(PRICES), wish) for wish in wish_N.tolist()]

    def renew(self, times: LiveTimes) -> None:
        """Nothing depends on them."""


class GateSlack:
    """The width with the greatest utility at the going price of time; at the top price the narrowest, unasked.

    Asking takes time, too: from the price on at which that is worth more than what asking gains, images take the
    width that is worth most to the average one.

    choices  ladder indices that the gate speaks of, ascending.
    curve    None: nothing was measured, and the gate is asked at every price but the top one.
    asking   what it costs beside trunk, gate and body.
    """

    name, asks_gate, is_priced, is_fair = "gate_slack", True, True, True

    def __init__(self, choices: Sequence[int], times: LiveTimes, curve: Curve | None, asking: Asking) -> None:
        self._choices, self._curve, self._asking = np.asarray(choices), curve, asking
        self._plans = [Plan(width, times.table.best_whole_batch(width)) for width in times.table.widths]
        self.renew(times)

    def renew(self, times: LiveTimes) -> None:
        body_s = times.costs().body_s
        seconds_G = np.take(body_s, self._choices)
        self._price_PG = np.multiply.outer(PRICES[:-1], seconds_G / seconds_G[-1])
        self.unasked, self.look_P = ASK_UNTIL_TOP, (self._asking.look_s,) * len(PRICES)
        if self._curve is not None:
            mixes = asked_mixes(self._curve, self._choices.tolist(), body_s, self._asking)
            self.unasked = unasked_widths(self._curve, mixes, [s / seconds_G[-1] for s in body_s])
            self.look_P = tuple(_best(mixes, price).look_s for price in PRICES[:-1]) + NO_LOOK[:1]

    def before(self, slack_s: float, waiting: int, price: int) -> Plan | None:
        width = self.unasked[price]
        return None if width is None else self._plans[width]

    def after(self, look: Look, urgency: int, price: int) -> int:
        return look.widths[priced(urgency, price)]

    def looks(self, utility_NG: F32, wish_N: NDArray[np.int64], best_N: NDArray[np.int64]) -> list[Look]:
        widths_NP = self._choices[(utility_NG[:, None, :] - self._price_PG).argmax(2)]
        widths_NP = np.minimum(widths_NP, wish_N[:, None])  # pressure never widens
        seen = zip(wish_N.tolist(), widths_NP.tolist(), best_N.tolist(), strict=True)
        return [Look(wish, (*widths, 0), best) for wish, widths, best in seen]


@dataclass(frozen=True, slots=True)
class Mix:
    """Of one operating point: what the average image is worth, what it takes behind the trunk, as a share of the
    widest body's seconds, and how many of those seconds go into asking.
    """

    worth: float
    time: float
    look_s: float


def asked_mixes(curve: Curve, choices: Sequence[int], body_s: Sequence[float], asking: Asking) -> list[Mix]:
    """What asking comes to at every operating point. body_s: seconds at every width."""
    mixes = []
    for worth, shares in curve.asked:
        going = [(share, w) for share, w in zip(shares, choices, strict=True) if w or not curve.has_exit]
        goes_on = sum(share for share, _ in going)
        asking_s = asking.look_s * goes_on + asking.ask_s * (1 - goes_on)
        time = (asking_s + sum(share * body_s[w] for share, w in going)) / body_s[choices[-1]]
        mixes.append(Mix(worth, time, asking_s))
    return mixes


def _best(mixes: Sequence[Mix], price: float) -> Mix:
    return max(mixes, key=lambda mix: mix.worth - price * mix.time)


def unasked_widths(curve: Curve, mixes: Sequence[Mix], time_L: Sequence[float]) -> Widths:
    """At every price the width that is worth most to the average image, None where asking the gate is worth more.

    time_L  what bodies take, as a share of the widest one's seconds. Without a price images are asked, at the top one
            they are not.
    """
    alike = list(zip(curve.worth_L, time_L, range(len(time_L)), strict=True))
    widths: list[int | None] = [None]
    for price in PRICES[1:-1]:
        gain, width = max((worth - price * time, -width) for worth, time, width in alike)
        best = _best(mixes, price)
        is_asked = widths[-1] is None and best.worth - price * best.time > gain
        widths.append(None if is_asked else -width)
    return (*widths, 0)


class Blind:
    """What the policies have in common that never look at an image."""

    asks_gate = is_priced = is_fair = False
    unasked, look_P = ASK_UNTIL_TOP, NO_LOOK

    def __init__(self, name: str) -> None:
        self.name = name

    def before(self, slack_s: float, waiting: int, price: int) -> Plan | None:
        raise NotImplementedError

    def after(self, look: Look, urgency: int, price: int) -> int:
        raise AssertionError(f"policy {self.name} never asks the gate: this is a bug")

    def looks(self, utility_NG: F32, wish_N: NDArray[np.int64], best_N: NDArray[np.int64]) -> list[Look]:
        raise AssertionError(f"policy {self.name} never asks the gate: this is a bug")

    def renew(self, times: LiveTimes) -> None:
        raise NotImplementedError


class Fixed(Blind):
    """One width for everything."""

    is_fair = True

    def __init__(self, width: int, times: LiveTimes) -> None:
        super().__init__(f"fixed:{width}")
        self._plan = Plan(width, times.table.best_whole_batch(width))

    def renew(self, times: LiveTimes) -> None:
        """The batch stays: it comes from the table."""

    def before(self, slack_s: float, waiting: int, price: int) -> Plan | None:
        return self._plan


class MaxBatch(Blind):
    """The largest batch that the narrowest width finishes in the slack, then the widest width for it."""

    def __init__(self, times: LiveTimes) -> None:
        super().__init__("maxbatch")
        self.renew(times)

    def renew(self, times: LiveTimes) -> None:
        self._seconds = _whole_seconds(times)

    def before(self, slack_s: float, waiting: int, price: int) -> Plan | None:
        batch = _largest(self._seconds[0][: min(waiting, MAX_BATCH)], slack_s) + 1
        width = _largest([row[batch - 1] for row in self._seconds], slack_s)
        return Plan(width, batch)


class MaxAcc(Blind):
    """The widest width that finishes one image in the slack, then the largest batch at it."""

    def __init__(self, times: LiveTimes) -> None:
        super().__init__("maxacc")
        self.renew(times)

    def renew(self, times: LiveTimes) -> None:
        self._seconds = _whole_seconds(times)

    def before(self, slack_s: float, waiting: int, price: int) -> Plan | None:
        width = _largest([row[0] for row in self._seconds], slack_s)
        return Plan(width, _largest(self._seconds[width][: min(waiting, MAX_BATCH)], slack_s) + 1)


class SlackFit(Blind):
    """Of equal buckets of latency, the highest one below the slack; in it the pair with the largest batch.

    Ours where the paper is silent: of several widths with that batch the widest; empty buckets are passed
    over; with fewer images waiting than the batch, all of them at the bucket's width; a slack below every
    bucket takes the lowest.
    """

    def __init__(self, times: LiveTimes, buckets: int = SLACKFIT_BUCKETS) -> None:
        super().__init__("slackfit")
        self._buckets = buckets
        self.renew(times)

    def renew(self, times: LiveTimes) -> None:
        seconds, buckets = _whole_seconds(times), self._buckets
        low_s, high_s = seconds[0][0], seconds[-1][-1]
        best: dict[int, tuple[int, int, float]] = {}
        for width, row in enumerate(seconds):
            for batch, pair_s in enumerate(row, 1):
                bucket = min(max(int((pair_s - low_s) / (high_s - low_s) * buckets), 0), buckets - 1)
                best[bucket] = max(best.get(bucket, (0, 0, 0.0)), (batch, width, pair_s))
        kept = [best[bucket] for bucket in sorted(best)]
        self._plans = [Plan(width, batch) for batch, width, _ in kept]
        self._plan_s = [pair_s for _, _, pair_s in kept]  # ascending, as buckets are

    def before(self, slack_s: float, waiting: int, price: int) -> Plan | None:
        return self._plans[max(bisect_right(self._plan_s, slack_s) - 1, 0)]


def _whole_seconds(times: LiveTimes) -> list[list[float]]:
    """Seconds of whole networks, [width][batch - 1]."""
    sizes = range(1, MAX_BATCH + 1)
    trunk_s = [times.seconds(None, n) for n in sizes]
    return [
        [trunk + times.seconds(width, n) for trunk, n in zip(trunk_s, sizes, strict=True)]
        for width in times.table.widths
    ]


def _largest(seconds: Sequence[float], limit_s: float) -> int:
    """Index of the last entry within the limit, 0 when there is none."""
    return max((i for i, s in enumerate(seconds) if s <= limit_s), default=0)


NAMED = ("gate_slack", "gate", "slackfit", "maxbatch", "maxacc")


def check_policy_name(name: str, widths: int) -> int | None:
    """The width of ``fixed:WIDTH`` on a ladder of so many, None for the other policies.

    Raises ValueError for a name that is none, with what is allowed.
    """
    kind, _, width = name.partition(":")
    if name in NAMED:
        return None
    if kind == "fixed" and width in ("narrowest", "widest"):
        return 0 if width == "narrowest" else widths - 1
    if kind == "fixed" and width.isdecimal() and width.isascii() and int(width) < widths:
        return int(width)
    allowed = f"{', '.join(NAMED)}, fixed:0..fixed:{widths - 1}, fixed:narrowest, fixed:widest"
    raise ValueError(f"policy is {name!r:.60}; allowed: {allowed}")


def policy_named(
    name: str, choices: Sequence[int], times: LiveTimes, curve: Curve | None = None, asking: Asking = FREE
) -> Policy:
    """The policy of this name; ValueError as ``check_policy_name``.

    choices  ladder indices that the gate speaks of. curve: what is known of the model's answers.
    asking   what asking the gate costs beside trunk, gate and body.
    """
    width = check_policy_name(name, len(times.table.widths))
    if width is not None:
        return Fixed(width, times)
    if name == "gate_slack":
        return GateSlack(choices, times, curve, asking)
    if name == "gate":
        return Gate()
    if name == "slackfit":
        return SlackFit(times)
    return MaxBatch(times) if name == "maxbatch" else MaxAcc(times)
