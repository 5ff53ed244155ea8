"""Which images run next, together, at which width. PURE: time is an argument, nothing is computed.

Three kinds of queues, each in the order in which its images are due: images that nothing is known of,
images that the gate has seen, and images whose slice is forced. A free worker asks for the next batch, so
no timer is needed while workers are busy, and an idle worker takes what is there at once: the image that
is due first, and those behind it that may run with it.

Widths are decided here, at the last moment: the policy proposes one for the first image, budgets and the
deadline clamp it, and images join it whose clamped width is the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from service.backlog import HEADROOM, Backlog
from service.latency import LiveTimes
from service.policies import PRICES, Policy, priced
from service.queues import Queue
from service.request import Batch, Entry, Reason, Route, Step, Window
from service.routing import clamped, explained, least_width, routed_width

RENEW_S = 0.25
"""How often plans follow what was learnt of the times."""


@dataclass(slots=True)
class Selection:
    """What ``next_batch`` decided.

    batch      what to run, or None when nothing is waiting.
    cancelled  entries whose caller has gone; never computed.
    expired    entries that cannot be finished in time any more; never computed, their promises must still be broken.
    """

    batch: Batch | None = None
    cancelled: list[Entry] = field(default_factory=list)
    expired: list[Entry] = field(default_factory=list)


class Scheduler:
    """Queues of one model. Not thread-safe: called on the event loop only.

    has_exit  slice 0 is an early exit: whom it serves waits no longer once the trunk is done.

    Every image is announced with ``expect`` before its pixels are there, so that what is on its way
    counts; then pushed, or forgotten.
    """

    def __init__(
        self, policy: Policy, times: LiveTimes, workers: int, headroom: float = HEADROOM, *, has_exit: bool = False
    ) -> None:
        self._policy, self._times, self._workers, self._has_exit = policy, times, workers, has_exit
        widths, arrivals = len(times.table.widths), count()
        self._backlog = Backlog(times.costs(), len(PRICES), workers, headroom, is_priced=policy.is_priced)
        self._backlog.renew(times.costs(), policy.unasked, policy.look_P)
        self._renewed_s, self._trunk_images = -math.inf, times.table.best_batch(None)
        self._body_images = [times.table.best_batch(width) for width in range(widths)]
        self._whole_images = [times.table.best_whole_batch(width) for width in range(widths)]
        self._unseen, self._seen = Queue(Step.TRUNK, arrivals), Queue(Step.BODY, arrivals)
        self._forced = [Queue(Step.WHOLE, arrivals) for _ in range(widths)]
        self._queues = [self._unseen, self._seen, *self._forced]
        self._busy_until_s: dict[int, float] = {}
        self._ends_s: list[float] | None = None

    def __len__(self) -> int:
        return sum([len(queue.items) for queue in self._queues])

    def waiting(self) -> dict[int | None, int]:
        """Entries per width (the forced one, else the gate's wish), None for those that nothing is known of."""
        counts: Counter[int | None] = Counter(entry.look.wish for entry in self._seen if entry.look)
        counts[None] = len(self._unseen)
        for width, queue in enumerate(self._forced):
            counts[width] += len(queue)
        return dict(counts)

    def finish_s(self, now_s: float, deadline_s: float, window: Window) -> float:
        """When one image more would be finished, everything at its narrowest width."""
        return self._backlog.finish_s(now_s, deadline_s, least_width(window), self._ends())

    def begun(self, now_s: float, waited_s: float) -> None:
        """A request is looked at that has been there so long: for prices, as many have come unseen."""
        self._backlog.door.learn(waited_s, now_s)

    def expect(self, now_s: float, due_s: float, is_hard: bool, window: Window) -> int:
        """One image more is on its way; returns its place. is_hard: it has a deadline of its own."""
        self._backlog.arrived(now_s)
        return self._backlog.add(due_s, is_hard, window)

    def forget(self, place: int) -> None:
        """The image of this place will not be pushed, or not again."""
        self._backlog.remove(place)

    def push(self, entry: Entry) -> None:
        """Queue an entry that was expected, or whose trunk is done."""
        if entry.look is not None:
            self._backlog.see(entry.place, entry.look.widths)
            self._seen.push(entry)
        elif entry.window.forced is not None:
            self._forced[entry.window.forced].push(entry)
        else:
            self._unseen.push(entry)

    def push_seen(self, entries: Sequence[Entry], now_s: float) -> Batch | None:
        """Queue entries of a trunk that is done, but for those that an early exit serves now: a batch for no worker."""
        if not self._has_exit:
            for entry in entries:
                self.push(entry)
            return None
        for place, look in [(entry.place, entry.look) for entry in entries if entry.look]:
            self._backlog.see(place, look.widths)
        price, leaving = self._price(now_s, self._ends()), []
        for entry in entries:
            if self._width(entry, now_s, price) == 0 and not entry.abandoned():
                leaving.append(entry)
            else:
                self._seen.push(entry)
        if not leaving:
            return None
        self._backlog.remove(*[entry.place for entry in leaving])
        return Batch(Step.BODY, 0, tuple(leaving), self._seen_routes(leaving, price, 0))

    def is_answered(self, entry: Entry) -> bool:
        """Whether an early exit has its answer, with a slice that it allows: nobody need be late or refused then."""
        return self._has_exit and entry.look is not None and entry.window.lo == 0

    def next_batch(self, now_s: float) -> Selection:
        """Take the most urgent batch and drop what is of no use on the way.

        It is for a worker that is free, or with none for the one that will be free first.
        """
        selection, waiting, due_first = Selection(), 0, None
        for queue in [queue for queue in self._queues if queue.items]:
            while queue.items and self._sort_out(queue.items[0][2], now_s, selection):
                self._backlog.remove(queue.pop().place)
            if queue.items:
                waiting += len(queue.items)
                if due_first is None or queue.items[0] < due_first.items[0]:
                    due_first = queue
        if due_first is None:
            return selection
        ends_s = self._ends()
        price = self._price(now_s, ends_s)
        free = self._workers - len(ends_s)
        begins_s = now_s if free > 0 else max(now_s, min(ends_s))
        batch = self._form(due_first, begins_s, price, -(-waiting // max(1, free)))
        self._busy_until_s[id(batch)] = begins_s + self._batch_s(batch.step, batch.width, len(batch.entries))
        self._ends_s = None
        leave = self._backlog.begin if batch.step is Step.TRUNK else self._backlog.remove
        leave(*[entry.place for entry in batch.entries])
        selection.batch = batch
        return selection

    def finished(self, batch: Batch, now_s: float, trunk_s: float = 0.0, body_s: float = 0.0) -> None:
        """The worker that had this batch is free again; what it took of its time is learnt, unless it failed: 0."""
        self._busy_until_s.pop(id(batch), None)
        self._ends_s = None
        if trunk_s:
            self._times.learn(None, len(batch.entries), trunk_s, now_s)
        if body_s and batch.width is not None:
            self._times.learn(batch.width, len(batch.entries), body_s, now_s)
        self._renew(now_s)

    def _renew(self, now_s: float) -> None:
        """Let plans follow what was learnt and what is forgotten."""
        if now_s - self._renewed_s > RENEW_S:
            self._renewed_s = now_s
            self._times.age(now_s)
            self._policy.renew(self._times)
            self._backlog.renew(self._times.costs(), self._policy.unasked, self._policy.look_P)

    def prune(self, now_s: float) -> Selection:
        """Drop every dead entry wherever it stands; called when the queue looks full."""
        selection = Selection()
        for queue in self._queues:
            queue.remove([entry for entry in queue if self._sort_out(entry, now_s, selection)])
        for entry in (*selection.cancelled, *selection.expired):
            self._backlog.remove(entry.place)
        return selection

    def shed(self, urgency: int, images: int) -> list[Entry] | None:
        """Give up the ``images`` least urgent that somebody waits for, of several the ones due last.

        None, and none is given up, if fewer are less urgent: whoever has left has returned its place.
        """
        given_up = [entry for entry in self._less_urgent(urgency) if not entry.abandoned()][:images]
        if len(given_up) < images:
            return None
        for entry in given_up:
            self.withdraw(entry)
        return given_up

    def make_room(self, now_s: float, deadline_s: float, window: Window, urgency: int) -> list[Entry] | None:
        """Give up less urgent images, as few as it takes for one more to be in time; None if that would not help."""
        self._renew(now_s)  # where nothing is let in, no batch ends
        missing_s, until_s = self._missing(now_s, deadline_s, window)
        if missing_s <= 0:
            return []
        rivals = [e for e in self._less_urgent(urgency) if e.due_s <= until_s and not self.is_answered(e)]
        given_up: list[Entry] = []
        for entry in rivals:
            if missing_s <= 0:
                break
            missing_s -= self._backlog.still_s(entry.place)
            given_up.append(entry)
        if missing_s > 0:
            return None
        for entry in given_up:
            self.withdraw(entry)
        return given_up

    def _missing(self, now_s: float, deadline_s: float, window: Window) -> tuple[float, float]:
        """As of the backlog, for one image more at its narrowest width; nothing without a deadline."""
        if deadline_s == math.inf:
            return 0.0, deadline_s
        ends_s, least = self._ends(), least_width(window)
        if self._backlog.is_ample(now_s, deadline_s, least, ends_s):
            return 0.0, deadline_s
        return self._backlog.missing(now_s, deadline_s, least, ends_s)

    def _less_urgent(self, urgency: int) -> list[Entry]:
        """What waits and is less urgent, the least urgent first, of those the one due last."""
        queues = [queue for queue in self._queues if queue.has_less_urgent(urgency)]
        rivals = [entry for queue in queues for entry in queue if entry.urgency > urgency]
        return sorted(rivals, key=lambda entry: (-entry.urgency, -entry.due_s))

    def withdraw(self, entry: Entry) -> None:
        """Take out an entry that waits."""
        for queue in self._queues:
            queue.remove([entry])
        self._backlog.remove(entry.place)

    def has_less_urgent(self, urgency: int) -> bool:
        """Whether ``shed`` might find an image."""
        return any(queue.has_less_urgent(urgency) for queue in self._queues)

    def clear(self) -> tuple[Entry, ...]:
        """Empty every queue and hand back what was waiting, for shutdown."""
        entries = tuple(entry for queue in self._queues for entry in queue)
        for queue in self._queues:
            queue.remove(list(queue))
        return entries

    def _form(self, queue: Queue, now_s: float, price: int, share: int) -> Batch:
        """A batch that the first image of this queue leads. share: so many images leave no other free worker idle."""
        first = queue.first
        if queue.step is Step.BODY:
            return self._form_body(queue, now_s, price, share)
        if queue.step is Step.WHOLE:
            assert first.window.forced is not None, "only forced images wait here: this is a bug"
            limit = min(self._whole_images[first.window.forced], share)
            return self._form_whole(queue, 0, self._in_time(queue, now_s, first.window.forced, limit))
        plan = self._policy.before(first.due_s - now_s, len(queue), priced(first.urgency, price))
        if plan is None:
            unasked, urgency = self._policy.unasked, first.urgency
            images = self._in_time(queue, now_s, None, min(self._trunk_images, share))
            asked = queue.take(images, lambda e: e.urgency == urgency or unasked[priced(e.urgency, price)] is None)
            return Batch(Step.TRUNK, None, asked)
        if self._policy.asks_gate:
            return self._form_unasked(queue, now_s, price, plan.width, share)
        return self._form_whole(queue, plan.width, min(plan.images, share) if self._policy.is_fair else plan.images)

    def _form_unasked(self, queue: Queue, now_s: float, price: int, proposal: int, share: int) -> Batch:
        """The first entry, for which this is proposed unseen, and those that are served at the same width now."""
        unasked, urgency = self._policy.unasked, queue.first.urgency

        def proposed(entry: Entry) -> int | None:
            return proposal if entry.urgency == urgency else unasked[priced(entry.urgency, price)]

        def joins(entry: Entry) -> bool:
            unseen = proposed(entry)
            if unseen is None:
                return False
            most = clamped(unseen, entry.window)
            if most == entry.window.lo or entry.deadline_s == math.inf:
                return most == width  # no deadline moves it
            return most >= width and self._unasked_width(entry, now_s, unseen) == width

        width, left_s = self._unasked_width(queue.first, now_s, proposal), queue.first.deadline_s - now_s
        images = self._largest(Step.WHOLE, width, min(self._whole_images[width], share, len(queue)), left_s)
        entries = queue.take(images, joins)
        routes = [self._unasked(entry.window, _given(proposed(entry)), width) for entry in entries]
        return Batch(Step.WHOLE, width, entries, tuple(routes))

    def _form_body(self, queue: Queue, now_s: float, price: int, share: int) -> Batch:
        """The first entry, and those that are served at the same width now."""
        after, alone_s = self._policy.after, self._times.alone_s

        def joins(entry: Entry) -> bool:
            most, least = clamped(after(entry.seen, entry.urgency, price), entry.window), entry.window.lo
            if most < width:
                return False  # only a deadline moves it from here, and only down
            if most == least or alone_s(most) <= entry.deadline_s - now_s:
                return most == width  # as ``route`` says in a multiple of the time
            return self._width(entry, now_s, price) == width

        width = self._width(queue.first, now_s, price)
        images = self._in_time(queue, now_s, width, min(self._body_images[width], share))
        entries = queue.take(images, joins)
        wider = self._wider(width, entries) if price == 0 and self._policy.is_priced else width
        if wider > width:
            return Batch(Step.BODY, wider, entries, tuple(Route(wider, Reason.WIDENED, e.seen.wish) for e in entries))
        return Batch(Step.BODY, width, entries, self._seen_routes(entries, price, width))

    def _price(self, now_s: float, ends_s: Sequence[float]) -> int:
        return self._backlog.price(now_s, ends_s) if self._policy.is_priced else 0

    def _width(self, entry: Entry, now_s: float, price: int) -> int:
        """That of an image that the gate has seen, if its body ran now."""
        proposal, left_s = self._policy.after(entry.seen, entry.urgency, price), entry.deadline_s - now_s
        return routed_width(entry.window, proposal, lambda width: self._times.alone_s(width) <= left_s)

    def _seen_routes(self, entries: Sequence[Entry], price: int, width: int) -> tuple[Route, ...]:
        """Why images that the gate has seen are served at this width, which is theirs."""
        after = self._policy.after
        return tuple([explained(e.window, e.seen.wish, after(e.seen, e.urgency, price), width) for e in entries])

    def _wider(self, width: int, entries: Sequence[Entry]) -> int:
        """Where none of these images is likelier to be wrong, if that takes no longer; else the width as it is.

        It stays unless the gate wished it for all of them and their budgets allow the other.
        """
        looks = [entry.look for entry in entries if entry.look is not None]
        best = min(look.best for look in looks)
        if best <= width or any(look.wish != width for look in looks) or any(best > e.window.hi for e in entries):
            return width
        images = len(entries)
        return best if self._times.seconds(best, images) <= self._times.seconds(width, images) else width

    def _form_whole(self, queue: Queue, proposal: int, images: int) -> Batch:
        """The first entry, and up to ``images`` in all that the proposal comes to the same width for."""
        width = clamped(proposal, queue.first.window)
        entries = queue.take(images, lambda entry: clamped(proposal, entry.window) == width)
        return Batch(Step.WHOLE, width, entries, tuple([self._unasked(e.window, proposal, width) for e in entries]))

    def _unasked_width(self, entry: Entry, now_s: float, proposal: int) -> int:
        """That of an image that nothing is known of, if its whole network ran now."""
        left_s = entry.deadline_s - now_s
        return routed_width(entry.window, proposal, lambda width: self._batch_s(Step.WHOLE, width, 1) <= left_s)

    def _unasked(self, window: Window, proposal: int, width: int) -> Route:
        """Why its width is this. Where the gate would be asked but for load, load is why."""
        return explained(window, None, proposal, width, Reason.LOAD if self._policy.asks_gate else Reason.POLICY)

    def _in_time(self, queue: Queue, now_s: float, width: int | None, limit: int) -> int:
        """How many images may run together so that the first is not late because of the others; at least 1.

        width  of the body; None: of a trunk, and time is left for the first image's narrowest body behind it.
        """
        first = queue.first
        limit = min(limit, len(queue))
        if limit <= 1 or first.deadline_s == math.inf:
            return limit
        left_s = first.deadline_s - now_s
        if queue.step is Step.TRUNK:
            left_s -= self._times.seconds(least_width(first.window), 1)
        return self._largest(queue.step, width, limit, left_s)

    def _largest(self, step: Step, width: int | None, limit: int, left_s: float) -> int:
        """The most images up to the limit whose batch takes no longer; at least 1."""
        while limit > 1 and self._batch_s(step, width, limit) > left_s:
            limit -= 1
        return max(1, limit)

    def _batch_s(self, step: Step, width: int | None, images: int) -> float:
        trunk_s = 0.0 if step is Step.BODY else self._times.seconds(None, images)
        return trunk_s + (0.0 if width is None else self._times.seconds(width, images))

    def _least_s(self, entry: Entry) -> float:
        """Worker seconds that an image still needs at the narrowest width it allows, alone."""
        body_s = self._times.seconds(least_width(entry.window), 1)
        return body_s if entry.look is not None else self._times.seconds(None, 1) + body_s

    def _ends(self) -> list[float]:
        """When each worker that has a batch is done with all it has: what waits ready-made goes on the first."""
        if self._ends_s is None:  # asked for more often than it changes
            self._ends_s = sorted(self._busy_until_s.values())[-self._workers :]
        return self._ends_s

    def _sort_out(self, entry: Entry, now_s: float, selection: Selection) -> bool:
        """Put an entry that is of no use on its list and say so; any other is left alone."""
        if entry.deadline_s < math.inf and now_s + self._least_s(entry) > entry.deadline_s:
            selection.expired.append(entry)
        elif entry.abandoned():
            selection.cancelled.append(entry)
        else:
            return False
        return True


def _given(unseen: int | None) -> int:
    assert unseen is not None, "who is asked does not join: this is a bug"
    return unseen
