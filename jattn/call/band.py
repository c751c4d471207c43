"""The band of keys that causal masks and windows leave a query: one idea, two offsets."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Band"]


@dataclass(frozen=True)
class Band:
    """Query i may see keys i + lower to i + upper, both inclusive; None leaves that side open."""

    lower: int | None = None
    upper: int | None = None

    @staticmethod
    def of(*, is_causal: bool, window: tuple[int | None, int | None] | None, diagonal: int) -> Band:
        """The band of a causal mask and a (left, right) window around key `i + diagonal`."""
        left, right = window if window is not None else (None, None)
        if is_causal:
            right = 0 if right is None else min(right, 0)
        return Band(
            lower=None if left is None else diagonal - left,
            upper=None if right is None else diagonal + right,
        )

    def within(self, queries: int, keys: int) -> Band:
        """The same band of this many queries and keys: no bound that hides nothing, none far out.

        Of queries 0 to T - 1 and keys 0 to S - 1 a lower bound of S hides as much as any above it,
        an upper of -T as any below, so that no position plus a bound leaves the integers' range.
        """
        lower, upper = self.lower, self.upper
        return Band(
            lower=None if lower is None or lower <= 1 - queries else min(lower, keys),
            upper=None if upper is None or upper >= keys - 1 else max(upper, -queries),
        )

    def moved(self, distance: int) -> Band:
        """The same band of queries that stand so far from the first key."""
        lower, upper = self.lower, self.upper
        return Band(
            lower=None if lower is None else lower + distance,
            upper=None if upper is None else upper + distance,
        )

    def hides_all(self, queries: int, keys: int) -> bool:
        """Whether no query of this many sees any of this many keys."""
        first = 1 - queries if self.lower is None else max(self.lower, 1 - queries)
        last = keys - 1 if self.upper is None else min(self.upper, keys - 1)
        return first > last

    @property
    def width(self) -> int | None:
        """How many keys a query may see, at least 0; None if a side is open."""
        if self.lower is None or self.upper is None:
            return None
        return max(self.upper - self.lower + 1, 0)

    def describe(self) -> str:
        """The band in words, with the offsets that make it."""
        if self.lower is None and self.upper is None:
            return "no band"
        low = "" if self.lower is None else f"i{self.lower:+d} <= "
        high = "" if self.upper is None else f" <= i{self.upper:+d}"
        return f"{low}key{high}"
