"""When the last of backward's thread blocks ends, by the order in which they are launched.

One is at work on each multiprocessor, and each starts where one is free. A long tile that starts
late, or a few after the last whole round, leave the others idle meanwhile:

    time              0        1        2        3
    multiprocessor 0  | tile 0      | tile 3   |
    multiprocessor 1  | tile 1    | tile 4       |
    multiprocessor 2  | tile 2  | idle ..

Causal tiles are the longer the earlier their keys are. So tiles of several heads are launched side
by side, the longest of all of them first, then all with the next number: of enough heads for even
ends, of few enough for what they visit to stay in L2.
"""

from __future__ import annotations

import functools
import heapq
from math import log2
from typing import TYPE_CHECKING

import numpy as np

from pallas_kernels.hopper.shares import MULTIPROCESSORS, START
from pallas_kernels.hopper.visits import known_counts

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec
    from pallas_kernels.hopper.backward_cut import BackwardTiles

__all__ = ["EVENER", "end_of", "heads_of_shares", "last_end", "rows_together"]

# Thread blocks that are followed one by one, in 3 ms; more where more are side by side. Those
# before them leave no multiprocessor idle, as there is always a next one.
MOST_FOLLOWED = 8192
MANY = 4 * MULTIPROCESSORS  # thread blocks side by side: more end no more evenly
EVENER = 1.005  # of the least time: what is simpler is taken where it is as good
# Of the time, what is lost with each doubling of the bytes that heads side by side visit, from
# where L2 does not hold them.
OUTGROWN, L2 = 0.02, 40e6
ADDED = 2.0  # of a share that adds, over its heads: of fewer heads more wait for the same sums


def heads_of_shares(spec: AttentionSpec, tiles: BackwardTiles) -> int:
    """How many thread blocks of a tile that share it are side by side, of one row or of more.

    All of a tile are, or some at a time, one after the other, before the next key head's.
    """
    shares, heads = tiles.shares.heads, spec.kv_heads * tiles.shares.heads
    some = [n for n in range(2, heads) if heads % n == 0 and (n < shares or n % shares == 0)]
    return _first_even(spec, tiles, some + _of_rows(spec, heads))


def rows_together(spec: AttentionSpec, tiles: BackwardTiles) -> int:
    """How many heads are side by side where those of one row would be few."""
    # us of backward on an H200, one row, and so: 128 causal, 32 heads of 8, 1k, B 4, 279, 241; 40
    # of 8 348, 298; 12 of 4, 2k, B 4, 356, 276; 8 of 4, 2k, B 8, 407, 369.
    return _first_even(spec, tiles, _of_rows(spec, spec.kv_heads * tiles.shares.heads))


def _of_rows(spec: AttentionSpec, heads: int) -> list[int]:
    """The heads of one row, of two, .., of all, where these divide all rows."""
    most = min(spec.batch, MANY)
    return [n * heads for n in range(1, most + 1) if spec.batch % n == 0]


def _first_even(spec: AttentionSpec, tiles: BackwardTiles, counts: list[int]) -> int:
    """The least count of heads side by side with which the launch ends about as soon as it can."""
    many = MANY // -(-spec.keys // tiles.keys)
    ends = {n: last_end(spec, tiles, n) for n in counts if n <= max(many, counts[0])}
    return next(n for n in ends if ends[n] <= EVENER * min(ends.values()))


def last_end(spec: AttentionSpec, tiles: BackwardTiles, together: int) -> float:
    """When it ends with so many heads side by side, in visits to a block of queries of one head."""
    shares = tiles.shares.heads
    own = spec.group // shares
    end = end_of(spec, tiles.queries, tiles.keys, shares, tiles.adds, together)
    of_query = 2 * (spec.head_dim + spec.value_dim) + 4 * spec.head_dim  # bytes of Q, dO and dQ
    visited = together * own * spec.queries * of_query
    return end * (1 + OUTGROWN * max(0.0, log2(visited / L2)))


@functools.lru_cache(maxsize=256)
def end_of(
    spec: AttentionSpec, queries: int, keys: int, shares: int, adds: bool, together: int
) -> float:
    """The same whatever L2 holds, of tiles of these sizes and shares."""
    own = spec.group // shares
    visits = known_counts(spec, queries=queries, keys=keys) * own
    lot = np.repeat(visits + (START + ADDED / own * adds), together)
    lots = spec.batch * spec.kv_heads * shares // together
    followed = min(lots, -(-MOST_FOLLOWED // len(lot)))
    free = [0.0] * MULTIPROCESSORS
    for duration in np.tile(lot, followed).tolist():
        heapq.heapreplace(free, free[0] + duration)
    return max(free) + float(lot.sum()) * (lots - followed) / MULTIPROCESSORS
