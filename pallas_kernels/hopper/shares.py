"""How many thread blocks share the work of one tile of keys in backward.

A tile visits the blocks of queries of every head of its group. Where a group is large or keys are
few (one key head for all, text that images look at) there are fewer tiles than the chip has
multiprocessors, or so few that the longest of them outlast the rest: then the heads of a group are
shared out, and if that does not do, the blocks of queries. Each share's dK and dV are arrays of
their own, in float32, and summed afterwards in one order: results stay the same each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["ENOUGH", "MULTIPROCESSORS", "START", "WHOLE", "Shares", "choose_shares"]

MULTIPROCESSORS = 132
ENOUGH = 4 * MULTIPROCESSORS  # tiles, whose uneven lengths then even out
MOST = 16 * MULTIPROCESSORS  # thread blocks: more would only start and end more often
START = 2.0  # of a thread block, in visits to a block of queries
WRITE = 1.0  # of a share's float32, in visits
SUM = 4e-6  # seconds that the kernel which sums shares takes beside its bytes
BYTES = 2.5e12  # a second, of that kernel
OPERATIONS = 4e12  # a second, of one multiprocessor in a visit


@dataclass(frozen=True)
class Shares:
    """The shares of each tile: parts of its group's heads, times parts of its visits in each."""

    heads: int = 1
    queries: int = 1

    @property
    def count(self) -> int:
        """Shares of a tile."""
        return self.heads * self.queries


WHOLE = Shares()


def choose_shares(
    visits: np.ndarray[Any, np.dtype[Any]],
    copies: int,
    group: int,
    *,
    visit_operations: float,
    output_bytes: float,
    splits_queries: bool,
    beside: float = 0.0,
) -> Shares:
    """The shares with which a call is expected to end first.

    Args:
      visits: (tiles,) each tile's visits to blocks of queries, in one head.
      copies: batch rows times key heads, which all have these tiles.
      group: query heads of a key head.
      visit_operations: floating-point operations of one visit.
      output_bytes: bytes of dK and dV of one share of all tiles, in float32.
      splits_queries: visits in one head can be shared out too.
      beside: visits' worth of other thread blocks of the launch.
    """
    tiles = copies * len(visits)
    if tiles >= ENOUGH or tiles == 0:
        return WHOLE
    candidates = [Shares(heads) for heads in range(1, group + 1) if group % heads == 0]
    if splits_queries:
        most = min(int(visits.max()) // 2, MOST // (tiles * group))
        candidates += [Shares(group, parts) for parts in range(2, most + 1)]
    visit = visit_operations / OPERATIONS  # seconds
    costs = {}
    for shares in candidates:
        if shares.count > 1 and tiles * shares.count > MOST:
            continue
        each = np.ceil(visits / shares.queries) * (group // shares.heads) + START
        together = 0.0
        if shares.count > 1:
            each = each + WRITE
            together = (SUM + 2 * shares.count * output_bytes / BYTES) / visit
        costs[shares] = _makespan(np.repeat(each, copies * shares.count), beside) + together
    least = min(costs.values())
    return next(shares for shares, cost in costs.items() if cost <= 1.03 * least)


def _makespan(durations: np.ndarray[Any, np.dtype[Any]], beside: float) -> float:
    """When the last of these ends, the longest of them started first: a bound that is about met.

    beside: the sum of others, which come last.
    """
    longest_first = np.sort(durations)[::-1]
    every = longest_first[::MULTIPROCESSORS]
    rounds = every * np.arange(1, len(every) + 1)
    return float(max((durations.sum() + beside) / MULTIPROCESSORS, rounds.max()))
