"""The open-loop generator: every request is sent at its instant, however many are still unanswered.

It drives its whole process: collection of garbage is held off while it runs, so that no pause of the client's is
taken for one of the server's. Nothing is parsed until the last answer is in.

An event loop's timers are whole milliseconds. A thread that sleeps until the next instant wakes the loop instead,
to within a small part of one, and polls on no core that the server may need.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from loadtest.http_client import Client, Reply
from loadtest.outcomes import NOT_SENT, Exchange

OUTSTANDING_LIMIT = 2000
"""Requests unanswered at once; more would measure the client's sockets."""
REQUEST_LIMIT_S = 10.0
"""A request without its whole answer so long after it was sent counts as failed."""
_HEAD_START_S = 0.1
"""From the start of the replay to the first instant of the trace."""
_SWITCH_INTERVAL_S = 0.0005
"""How long the event loop may keep the waking thread from the interpreter."""
_SPARE_FILES = 100


@dataclass(frozen=True, slots=True)
class Post:
    """A request that is ready to send: when, in seconds from the start of the trace, and what."""

    at_s: float
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Limits:
    """outstanding: requests unanswered at once, any further one is not sent. request_s: time for one."""

    outstanding: int = OUTSTANDING_LIMIT
    request_s: float = REQUEST_LIMIT_S

    def __post_init__(self) -> None:
        if self.outstanding < 1:
            raise ValueError(f"limit of {self.outstanding} outstanding requests; allowed: 1 or more")
        if not self.request_s > 0:
            raise ValueError(f"limit of {self.request_s:g} s for a request; allowed: above 0 s")


@dataclass(frozen=True, slots=True)
class Playback:
    """What went over the wire.

    exchanges         one for each request, in the same order.
    cpu_s             spent by this process from the first to the last of them.
    outstanding_peak  most requests that were unanswered at once.
    event_loop        which one it was.
    began_s           instant 0 of the trace, by ``time.perf_counter``.
    """

    exchanges: list[Exchange]
    cpu_s: float
    outstanding_peak: int
    event_loop: str
    began_s: float = 0.0


def play(url: str, posts: Sequence[Post], limits: Limits) -> Playback:
    """Send every request at its instant and wait for all answers, in an event loop of its own.

    It ends at the latest ``limits.request_s`` after the last instant. Raises ValueError without a request, and
    when this process may not open as many connections.
    """
    return play_all([(url, posts)], limits)[0]


def play_all(loads: Sequence[tuple[str, Sequence[Post]]], limits: Limits) -> list[Playback]:
    """``play`` of several loads at once, each to its URL and within the limits by itself."""
    if not all(posts for _, posts in loads):
        raise ValueError("the trace has no request; allowed: 1 or more")
    _allow_connections(limits.outstanding * len(loads))

    async def together() -> list[Playback]:
        return await asyncio.gather(*(replay(url, posts, limits) for url, posts in loads))

    with asyncio.Runner(loop_factory=_loop_factory()) as runner, _steady():
        return runner.run(together())


async def replay(url: str, posts: Sequence[Post], limits: Limits) -> Playback:
    """``play`` in the running event loop. Raises ValueError for a header that cannot be sent."""
    async with Client(url, limits.request_s) as client:
        player = _Player(posts, limits, client)
        cpu_began_s = time.process_time()
        await player.run()
        cpu_s = time.process_time() - cpu_began_s
    loop_name = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    return Playback(player.exchanges(), cpu_s, player.outstanding_peak, loop_name, player.began_s)


class _Player:
    """One pass over the requests. Everything but ``_wake_in_time`` happens in the event loop."""

    def __init__(self, posts: Sequence[Post], limits: Limits, client: Client) -> None:
        self._posts, self._limits, self._client = posts, limits, client
        self._heads = [client.head(post.headers, len(post.body)) for post in posts]
        self._exchanges: list[Exchange | None] = [None] * len(posts)
        self._unfinished = len(posts)
        self._outstanding = self.outstanding_peak = 0
        self._all_done = asyncio.Event()
        self._stop = threading.Event()
        self._loop = asyncio.get_running_loop()
        self.began_s = 0.0

    async def run(self) -> None:
        """Start every request at its instant; returns when the last has ended."""
        self.began_s = time.perf_counter() + _HEAD_START_S
        waker = threading.Thread(target=self._wake_in_time, name="instants", daemon=True)
        waker.start()
        try:
            await self._all_done.wait()
        finally:
            self._stop.set()
            waker.join()

    def _wake_in_time(self) -> None:
        """The thread: hand the requests that are due to the event loop, sleep until the next one is, and so on."""
        at_s, place = [post.at_s for post in self._posts], 0
        while place < len(at_s):
            wait_s = self.began_s + at_s[place] - time.perf_counter()
            if wait_s > 0 and self._stop.wait(wait_s):
                return
            due = bisect_right(at_s, time.perf_counter() - self.began_s, lo=place)
            if due > place:  # a wait may end a little early
                self._loop.call_soon_threadsafe(self._start, place, due)
            place = due

    def exchanges(self) -> list[Exchange]:
        return [exchange for exchange in self._exchanges if exchange is not None]

    def _start(self, first: int, last: int) -> None:
        if self._stop.is_set():
            return
        for place in range(first, last):
            if self._outstanding >= self._limits.outstanding:
                self._finish(place, Exchange(self._posts[place].at_s, None, failure=NOT_SENT))
                continue
            self._outstanding += 1
            self.outstanding_peak = max(self.outstanding_peak, self._outstanding)
            post = self._posts[place]
            send_late_s = max(0.0, time.perf_counter() - self.began_s - post.at_s)
            self._client.send(self._heads[place] + post.body, partial(self._ended, place, send_late_s))

    def _finish(self, place: int, exchange: Exchange) -> None:
        self._exchanges[place] = exchange
        self._unfinished -= 1
        if not self._unfinished:
            self._all_done.set()

    def _ended(self, place: int, send_late_s: float, reply: Reply | Exception) -> None:
        at_s = self._posts[place].at_s
        latency_s = time.perf_counter() - self.began_s - at_s
        if isinstance(reply, Reply):
            done = Exchange(at_s, send_late_s, latency_s, reply.status, "", reply.headers, reply.body)
        else:
            done = Exchange(at_s, send_late_s, failure=type(reply).__name__)
        self._outstanding -= 1
        self._finish(place, done)


@contextlib.contextmanager
def _steady() -> Iterator[None]:
    """Inside, no garbage is collected and threads take short turns."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        sys.setswitchinterval(interval_s)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """That of uvloop where it is installed; else None, which is asyncio's own."""
    try:
        import uvloop  # here, because there is none for every platform
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


def _allow_connections(outstanding: int) -> None:
    """Raise this process's limit of open files to what so many connections need; ValueError when it may not."""
    needed = outstanding + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        allowed = hard - _SPARE_FILES
        raise ValueError(f"{outstanding} outstanding requests; allowed: up to {allowed}, by the limit of open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
