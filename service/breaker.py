"""When to stop asking a store that does not answer, and when to try again. PURE.

Closed, every call goes out. After ``FAILURES`` failures in a row it opens, and calls fail at once instead of
waiting for their timeouts. After ``retry_s`` a single call goes out as a probe: its success closes the breaker,
its failure keeps it open for as long again.
"""

from __future__ import annotations

from dataclasses import dataclass

FAILURES = 3
"""In a row. One lost connection is no outage: after a restart of the store each pooled connection fails once."""


@dataclass(slots=True)
class Breaker:
    """The state of one store. Times are seconds on the monotonic clock.

    retry_s      from the failure that opened it to the probe.
    failures     in a row, as far as they are counted.
    opened_s     when it opened, or when its last probe was sent or failed; None while closed.
    """

    retry_s: float
    failures: int = 0
    opened_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls fail without being tried, but for probes."""
        return self.opened_s is not None

    def admits(self, now_s: float) -> bool:
        """Whether a call may go out now; one that may while the breaker is open is the probe."""
        if self.opened_s is None:
            return True
        if now_s < self.opened_s + self.retry_s:
            return False
        self.opened_s = now_s  # so that one probe goes out, not everything that waits for it
        return True

    def succeeded(self) -> bool:
        """A call came back; True when that closed the breaker."""
        was_open = self.is_open
        self.failures, self.opened_s = 0, None
        return was_open

    def failed(self, now_s: float) -> bool:
        """A call did not; True when that opened the breaker."""
        self.failures += 1
        if self.is_open:
            self.opened_s = now_s
            return False
        if self.failures < FAILURES:
            return False
        self.opened_s = now_s
        return True
