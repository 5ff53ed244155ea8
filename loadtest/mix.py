"""PURE: which value of a request header how often, exactly, in an order that no server can lean on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of the values of one header: of every ``sum of shares`` requests, ``share`` carry its value."""

    header: str
    shares: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """``Slice-Width=0:10,3:3,7:2,13:1``, or ``Slice-Width=widest`` for one value always.

        Raises ValueError with this grammar.
        """
        header, equals, values = text.partition("=")
        shares = tuple(_share(part) for part in values.split(","))
        if not header or not equals or not all(value and count > 0 for value, count in shares):
            raise ValueError(f"mix is {text!r}; allowed: HEADER=VALUE[:SHARE],... with whole shares above 0")
        return cls(header, shares)

    def __str__(self) -> str:
        return f"{self.header}={','.join(f'{value}:{count}' for value, count in self.shares)}"

    def endless(self, seed: int) -> Iterator[str]:
        """Values without end. Every cycle keeps the shares exactly, and each is shuffled anew."""
        order = random.Random(seed)
        cycle = [value for value, count in self.shares for _ in range(count)]
        while True:
            order.shuffle(cycle)
            yield from cycle


def _share(text: str) -> tuple[str, int]:
    """``value:share``; the share is 1 when absent and 0, which no mix allows, when it is no whole number."""
    value, colon, count = text.strip().partition(":")
    if not colon:
        return value, 1
    return value, int(count) if count.isascii() and count.isdigit() else 0
