"""Into which pieces a device's heads are cut, each computed by one kernel after another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

__all__ = ["Cut", "cuts_of"]


class Cut(NamedTuple):
    """Some query heads of a device's, after each other, and the key heads that they share.

    brings, ends: whether no piece before has its key heads, and none after it.
    """

    first: int
    heads: int
    first_kv: int
    kv_heads: int
    brings: bool
    ends: bool


def cuts_of(sizes: Sequence[int], group: int) -> tuple[Cut, ...]:
    """Pieces of so many query heads, each some of one key head's or all of several ones'."""
    found = []
    ends = list(accumulate(sizes))
    for end, heads in zip(ends, sizes, strict=True):
        first = end - heads
        kv_heads = max(1, heads // group)
        assert heads % group == 0 or first // group == (end - 1) // group, (sizes, group)
        found.append(
            Cut(first, heads, first // group, kv_heads, first % group == 0, end % group == 0)
        )
    return tuple(found)
