"""How few queries read their keys: in how many shares, and how much of them at a time.

A tile of few queries waits for memory. What matters is that all multiprocessors read until the end,
and as fast as each other: a share is one thread block's, of which each has a multiprocessor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec
    from pallas_kernels.hopper.tiles import Tiles

__all__ = ["even_shares", "shares", "tiles"]

# In visits while all multiprocessors read: what one takes that reads alone, by how much tiles end
# apart where some have none, a round's start and end, and to join a row of a share.
ALONE, UNEVEN, ROUND, ROWS_JOINED = 0.6, 0.05, 1.2, 1e-4
WORTH = 0.95  # of the time, for several rounds
NEARLY_FULL, LONG_SHARE = 0.8, 16  # a last round; visits: with these, blocks of 64 keys
INT32_MAX = 2**31 - 1
# Where all have an even share: of multiprocessors, those that have one, a launch that joins parts,
# in visits, and the most of the time for which it is done.
NEARLY_ALL, JOINED, WORTH_EVEN = 0.9, 1.0, 0.995
LONG_EVEN = 32  # visits: with fewer, 0.95 of the time of tiles that are not split
MOST_EVEN = 2**24  # visits in all, which are counted in int32


class Plan(Protocol):
    """What is asked of a forward launch, see `plan.py`."""

    @property
    def spec(self) -> AttentionSpec: ...
    @property
    def tiles(self) -> Tiles: ...
    @property
    def pack(self) -> int: ...
    @property
    def works(self) -> int: ...
    @property
    def head_packs(self) -> int: ...
    @property
    def lengths_known(self) -> bool: ...
    def ranges(self) -> tuple[tuple[tuple[int, int], tuple[int, int]], ...]: ...


def shares(plan: Plan, multiprocessors: int) -> int:
    """In how many shares the keys of few queries are read soonest.

    As many as one round of the chip has room for, or several rounds where that leaves many
    multiprocessors idle. us on an H200, 32 heads of 8, 32,768 keys, in so many shares: B 9, 72
    tiles, 1 290, 2 369, 3 273, 5 269, 16 277; B 17, 1 637, 2 591, 4 529, 8 523, 16 516; B 24, 1
    799, 2 703, 4 707, 8 709; one row, 8 40.0, 16 33.7, 32 36.8; 1,024 keys, 4 6.2, 8 5.4. But B 5,
    3 157, 5 163, 13 158; B 6, 2 185, 5 188.
    """
    visited, rows_of_tile = _visited(plan), plan.spec.queries * plan.pack

    def cost(splits: int) -> float:
        """In visits while all read."""
        tiles = plan.works * splits
        rounds, last = _rounds(tiles, multiprocessors)
        visits = visited / splits if rounds else -(-visited // splits)
        joined = tiles * rows_of_tile * ROWS_JOINED if splits > 1 else 0.0
        return _time(visits, rounds, last) + joined

    # A share's first block is a quotient.
    most = max(1, min(visited, multiprocessors, INT32_MAX // (2 * visited)))
    in_one = max(1, min(multiprocessors // plan.works, most))
    best = min(range(in_one, most + 1), key=cost, default=in_one)
    return best if cost(best) < WORTH * cost(in_one) else in_one


def tiles(plan: Plan, splits: int, multiprocessors: int) -> Tiles:
    """Tiles for few queries that read so many shares of the keys.

    With 64 KiB in flight on each multiprocessor all read as fast, and heads that lie side by side
    at the same time; with more some are far ahead. us on an H200, 32 heads of 8, 32,768 keys,
    blocks of 128 keys in two stages (where not split, three), of 64 in two, three and four: B 1
    33.3, 32.9, 33.6; B 4 123.3, 122.5, 122.3; B 8 241.4, 239.4, 240.2; B 16 476, 472, 473, 480; B
    14 446, 421; B 24 721, 709; B 64 of 8,192 488, 474, 477. Short blocks are slower where the last
    round is of few tiles: B 17 526, 537, B 9 273, 285; and shares: 8,192 keys 9.6, 10.1. Head dim
    64, blocks of 128 in four, three and two: B 8 67.0, 64.3, 63.9; B 16 242, 237, 238.
    """
    spec, own = plan.spec, plan.tiles
    width = max(spec.head_dim, spec.value_dim)
    if spec.bias_shape is not None or spec.dropout_rate > 0 or width > 128:
        return own
    if width <= 64:
        return replace(own, stages=3)
    _, last = _rounds(plan.works * splits, multiprocessors)
    long = _visited(plan) >= LONG_SHARE * splits
    return replace(own, stages=2, keys=64 if long and last >= NEARLY_FULL else own.keys)


def even_shares(plan: Plan, splits: int, multiprocessors: int) -> tuple[Tiles, int] | None:
    """Tiles, and how many thread blocks share all keys evenly; None where `shares` do as well.

    A share is then of one row's keys, or of the end of one's and the beginning of the next one's.
    Thread blocks that have the heads of a share read the same rows at the same time.
    """
    # us on an H200, 32 heads of 8, 32,768 keys, without and with: B 6 186.9, 183.3; 9 272.8, 271.8;
    # 12 365.0, 358.8; 14 422.7, 418.3; 17 526.7, 507.1, four queries 542.4, 511.3; 20 600.4, 595.4.
    # B 17 of 8,192 141.2, 131.8, 4,096 77.4, 69.0, 2,048 43.6, 38.0, of head dim 64, 4,096 47.9,
    # 37.7; B 20 84.8, 80.4; not split, B 9 37.9, 39.1, of 8,192 72.5, 71.0. On an H100 these 99.7,
    # 102.1, B 24 of 2,048 69.1, 70.7, B 40 115.1, 114.2, B 24 of 4,096, in two, 137.1, 133.9.
    spec, own = plan.spec, plan.tiles
    others = spec.bias_shape is not None or spec.dropout_rate > 0 or spec.has_sinks
    width, packs = max(spec.head_dim, spec.value_dim), plan.head_packs
    visited = _visited(plan)
    if others or not plan.lengths_known or width > 128 or spec.batch * visited * packs >= MOST_EVEN:
        return None
    groups = multiprocessors // packs
    share = spec.batch * visited / max(groups, 1)
    if groups * packs < NEARLY_ALL * multiprocessors or share < LONG_SHARE:
        return None

    now = _time(visited / splits, *_rounds(plan.works * splits, multiprocessors))
    so = _time(share, 0, groups * packs / multiprocessors)
    so += ROUND * share / visited  # rows that it goes on to
    if splits == 1:
        so += JOINED
    short = splits == 1 and share < LONG_EVEN
    if so > (WORTH if short else WORTH_EVEN) * now:
        return None
    keys = own.keys if width <= 64 else 64
    return replace(own, stages=3 if width <= 64 else 2, keys=keys, query_slots=2), groups * packs


def _visited(plan: Plan) -> int:
    """How many blocks of keys few queries visit, as far as shapes tell."""
    spec, size = plan.spec, plan.tiles.keys
    blocks = max(1, -(-spec.keys // size))
    if plan.lengths_known:
        return max([1, *(stop - first for (first, stop), _ in plan.ranges())])
    if spec.band.lower is None or spec.band.upper is None:
        return blocks
    reach = spec.band.upper - spec.band.lower + spec.queries
    return min(blocks, -(-reach // size) + 1)


def _time(visits: float, rounds: int, last: float) -> float:
    """What shares of so many visits each take, in visits while all read; see `_rounds`."""
    return visits * (rounds + max(ALONE, last + UNEVEN * (1 - last))) + ROUND * (rounds + 1)


def _rounds(tiles: int, multiprocessors: int) -> tuple[int, float]:
    """Rounds of the chip before the last, and which part of it has a tile in the last."""
    rounds = max(-(-tiles // multiprocessors) - 1, 0)
    return rounds, tiles / multiprocessors - rounds
