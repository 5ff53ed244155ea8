"""A client's compute quota: a token bucket of MAdds. PURE.

A bucket holds up to ``capacity_madds`` tokens and gains ``madds_per_s``. A request enters while there is a token;
what it really spent is taken afterwards, when it is known, so a bucket can fall below zero. It is then paid back
before the next request enters: the debt is bounded by what one client can have in work at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_MADDS = 10**15 - 1
"""Largest capacity: an integer of a structured header field has 15 digits (RFC 9651), and doubles are exact there."""
POLICY = "madds"
"""Name of the one policy in RateLimit and RateLimit-Policy, and its unit."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What one client may spend. Raises ValueError outside 1..MOST_MADDS MAdds.

    madds_per_s  in the long run.
    burst_s      seconds of it that may be saved up, at least 1.
    """

    madds_per_s: int
    burst_s: int

    def __post_init__(self) -> None:
        if self.madds_per_s < 1 or self.burst_s < 1 or self.capacity_madds > MOST_MADDS:
            raise ValueError(
                f"quota of {self.madds_per_s} MAdds per second over {self.burst_s} s; allowed: at least 1 of each, "
                f"at most {MOST_MADDS} MAdds together"
            )

    @property
    def capacity_madds(self) -> int:
        """Tokens of a full bucket."""
        return self.madds_per_s * self.burst_s


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tokens in MAdds, below zero when more was spent than there was, as of ``at_s``."""

    tokens_madds: float
    at_s: float


def full(limit: Limit, now_s: float) -> Bucket:
    """The bucket of a client who has not been seen."""
    return Bucket(float(limit.capacity_madds), now_s)


def after(bucket: Bucket, limit: Limit, now_s: float, spent_madds: int = 0) -> Bucket:
    """The bucket at ``now_s``, refilled and then charged. A clock that went back refills nothing."""
    gained = max(0.0, now_s - bucket.at_s) * limit.madds_per_s
    tokens = min(float(limit.capacity_madds), bucket.tokens_madds + gained) - spent_madds
    return Bucket(tokens, max(bucket.at_s, now_s))


def admits(tokens_madds: float) -> bool:
    """Whether a request enters: there is a whole token."""
    return tokens_madds >= 1


def retry_after_s(tokens_madds: float, limit: Limit) -> float:
    """Seconds until a request enters again, if nothing else is spent; 0 when it would now."""
    return max(0.0, 1 - tokens_madds) / limit.madds_per_s


def policy_field(limit: Limit) -> str:
    """RateLimit-Policy: so many MAdds in a window of so many seconds.

    draft-ietf-httpapi-ratelimit-headers-10, section 3.
    """
    return f'"{POLICY}";q={limit.capacity_madds};qu="{POLICY}";w={limit.burst_s}'


def limit_field(tokens_madds: float, limit: Limit) -> str:
    """RateLimit: MAdds that are left, and seconds until the bucket is full again.

    draft-ietf-httpapi-ratelimit-headers-10, section 4.
    """
    left = max(0, min(limit.capacity_madds, math.floor(tokens_madds)))
    full_in_s = math.ceil(max(0.0, limit.capacity_madds - tokens_madds) / limit.madds_per_s)
    return f'"{POLICY}";r={left};t={full_in_s}'


REDIS_SCRIPT = """
local rate, capacity, spent = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local kept = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens, at = tonumber(kept[1]) or capacity, tonumber(kept[2]) or now
tokens = math.min(capacity, tokens + math.max(0, now - at) * rate) - spent
if spent > 0 then
  redis.call('HSET', KEYS[1], 'tokens', string.format('%.17g', tokens), 'at', string.format('%.17g', math.max(at, now)))
  redis.call('EXPIRE', KEYS[1], math.ceil((capacity - tokens) / rate) + 1)
end
return string.format('%.17g', tokens)
"""
"""``after`` for replicas that share their buckets: one step of the store, by the store's clock.

KEYS: the client's bucket. ARGV: MAdds per second, capacity, MAdds spent, 0 to look only. Returns the tokens as text.
A bucket expires when it is full, because an absent one is.
"""
