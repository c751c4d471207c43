"""Which of backward's thread blocks run at a time, and how many share a tile, for L2's sake.

A visit reads Q and dO of a block of queries and adds to its dQ, 64 KiB at head dim 128: of heads
that run at a time these should stay in L2. Of grouped heads a tile's thread block goes through all
heads of a group, which are too many; so that each visits one or two, thread blocks share a tile,
and add their dK and dV (`backward_sums.py`): sums of some tiles, in float32. Whether they do, and
how many heads' are side by side, follows from when the launch would end (`backward_rounds.py`). In
turns (`backward_turns.py`) each visits one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.hopper.backward_rounds import (
    EVENER,
    heads_of_shares,
    last_end,
    rows_together,
)
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.shares import ENOUGH, WHOLE, Shares
from pallas_kernels.hopper.visits import MOST_KNOWN, known_counts

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec
    from pallas_kernels.hopper.backward_cut import BackwardTiles

__all__ = [
    "MOST_ADDED",
    "MOST_VISITS",
    "added_shares",
    "documents_side_by_side",
    "most_visits",
    "order",
    "places",
    "side_by_side",
]

# Tiles of keys that visit a block of queries, in the mean. What a block's first visit saves is of
# each block, what claims cost is of each visit.
MOST_VISITS = 24
MOST_VISITS_OF_FULL = 32  # where each tile begins with a block of its own
MOST_VISITS_OF_SHARES = 40  # or in windows
MOST_VISITS_OF_ONE_HEAD = 65  # of a tile or its share
# Queries of a head that a tile visits, in the mean: with fewer no share is worth its sums.
LEAST_VISITED = 1536
LEAST_OF_MANY, LEAST_MANY = 1024, 768  # where there are so many tiles of query heads
MOST_ADDED = 2**15 - 1  # shares of a tile that add: a word counts them in 15 bits
# Tiles that have sums at a time: about two rounds of the chip's thread blocks, two of a tile; and
# where the shares of a tile are not launched together.
PLACES, PLACES_APART = 128, 256
# Thread blocks of heads that are side by side: two rounds of the chip's, for the sake of even ends.
SIDE_BY_SIDE = 250
SHARES_SIDE_BY_SIDE = 112  # about one round, where shares take turns
# Where shares take turns, the most rows of heads that are side by side; and heads of a window, with
# keys of their own or not.
MOST_ROWS_OF_SHARES = 40_960
MOST_IN_WINDOW, MOST_SHARES_IN_WINDOW = 16, 8
# Of the time, what is lost with each head of a group beyond two, whose tiles are at one block at a
# time; what it takes to fill dQ; and what sharing is to gain. See docs/kernels.md, 65.
INNER, FILL, SHARED = 0.04, 0.02, 0.03
# Visits of a tile in a window, times the heads side by side: what they go on to besides what the
# chip's tiles are at.
WINDOWS_SIDE_BY_SIDE = 312


def most_visits(spec: AttentionSpec, tiles: BackwardTiles) -> int:
    """Tiles of keys that visit a block of queries up to which the first one stores its dQ."""
    # ms on an H100, filled and stored, visited 33 times: 32 heads of 8, T 8k 6.269, 6.153, window
    # 4095 5.719, 5.648. On an H200, window 4095 of 16 heads, four side by side, 2.734, 2.717; 4k
    # full of 16 heads, visited 32 times, 3.042, 3.010; 3.054, 3.022; 3.039, 3.008. 28 heads of 4,
    # 16k, a head a share, visited 64 times, 10.75 (late), 10.33. us of backward, heads with their
    # own keys: 32, 8k, 2242, 2182; 16, 10,000 1665, 1633, 16k 4239, 4157, but in pieces, on an
    # H100, 12,345 2481, 2591.
    if _is_window(spec):
        return MOST_VISITS_OF_SHARES
    one_way = _is_one_way(spec) and tiles.values_first and padded_width(spec.head_dim) == 128
    if spec.group == 1 and one_way and not tiles.pieces:
        return MOST_VISITS_OF_ONE_HEAD
    if tiles.adds:
        alone = tiles.shares.heads == spec.group
        return MOST_VISITS_OF_ONE_HEAD if alone else MOST_VISITS_OF_SHARES
    full = spec.band.lower is None and spec.band.upper is None
    return MOST_VISITS_OF_FULL if full and spec.group == 1 and tiles.values_first else MOST_VISITS


def added_shares(spec: AttentionSpec, tiles: BackwardTiles) -> dict[str, Any]:
    """The shares whose dK and dV are added, and the order of their thread blocks; or nothing."""
    # ms on an H100, forward and backward of head dim 128, before, so, FlashAttention-3: 32 heads of
    # one, B 2, T 4k 1.896, 1.667, 1.719 (one head a share 1.730, four 1.830); 32 of 4 2.010, 1.670,
    # 1.732; 16 of one 0.929, 0.851, 0.876; 32 of 8, B 4, T 4k 3.457, 3.321, 3.495, B 2, T 8k 6.481,
    # 6.153, 6.251 (one head a share 6.386), 16k 12.31, 11.97, 11.85; 8 of 2, 32k 11.77, 11.50,
    # 11.43. Window 4095, 32 of 8, 16k, 6.138, 5.648, 5.628 (two heads a share 5.726, none shared
    # but tiles first 5.853); 1023 2.096, 2.154, 2.297, none shared but tiles first 2.080.
    # Of head dim 96, 32 of one 1.633, 1.452; of 64, with four heads a share, 1.069, 1.024 (two
    # 1.044), but 32 of 8, 8k, 3.621, 3.638. Wide heads: 8 of one of 256 0.942, 0.945.
    # Full calls: 32 of one 3.010, 3.086; of 8 3.061, 3.199.
    # On an H200: 16k 12.18, 11.65, 32 of 4 12.75, 11.61. 2k, B 4, 32 of 8 0.948, 0.922, of one
    # 0.972, 0.927. A head a share: 28 of 4, 2k 0.989, 0.893, 4k 1.565, 1.469, 8k 2.803, 2.667, 16k
    # 10.80, 10.33; but 40 of 8, 4k, 1.048, 1.062, 24 of 8 1.203, 1.278. By time, us of backward:
    # 10,000, 28 of 4 3403, 2936, 40 of 8 4487, 4208, 32 of 8 3564, 3368. See docs/kernels.md, 65.
    others = spec.has_segments or spec.dropout_rate > 0
    others |= spec.mask_shape is not None or spec.bias_shape is not None
    count = -(-spec.keys // tiles.keys)
    others |= spec.group > MOST_ADDED
    if others or spec.group == 1 or tiles.apart or tiles.once or not 0 < count <= MOST_KNOWN:
        return {}
    counts = known_counts(spec, queries=tiles.queries, keys=tiles.keys)
    visits = float(counts.mean()) * tiles.queries
    if _is_window(spec):
        if visits < LEAST_VISITED:
            return {}
        visited = float(counts.sum()) / -(-spec.queries // tiles.queries)
        if not tiles.values_first or visited <= MOST_VISITS:
            return {}
        return {"shares": Shares(spec.group), "adds": True}
    if not _is_one_way(spec):
        return {}
    if not tiles.values_first and spec.batch * spec.kv_heads * count >= ENOUGH:
        return {}
    heads = (2, 1) if tiles.values_first else (4 if tiles.queries > 64 else 2,)
    if count > PLACES_APART and spec.group % 2 == 0:
        heads = heads[:1]  # a head's sums would grow with the keys
    found, least = WHOLE, _time(spec, tiles) / (1 + SHARED)
    is_many = tiles.values_first and spec.batch * spec.heads * count >= LEAST_MANY
    if visits < (LEAST_OF_MANY if is_many else LEAST_VISITED):
        return {}
    for own in heads:
        if spec.group % own or own == spec.group:
            continue
        shares = Shares(spec.group // own)
        time = _time(spec, replace(tiles, shares=shares, adds=True))
        if time < least:
            found, least = shares, time / EVENER
    return {"shares": found, "adds": True} if found != WHOLE else {}


def order(spec: AttentionSpec, tiles: BackwardTiles) -> dict[str, Any]:
    """What keeps Q, dO and dQ of the tiles that run at a time in L2.

    Only where tiles end at the last query, or their document's, wherever they begin; and in windows
    of grouped heads.
    """
    # ms on an H200, forward and backward of head dim 128, with neither, heads inner, and both:
    # 32 heads of one, B 2, T 4k, 2.00, 1.78; of 8, T 8k, 6.65, 6.18, 6.46; and of 16 heads of 16,
    # with and without heads together, the least of 20 runs: 16k 5.82, 5.72, 8k 3.06, 3.03, 4k
    # 1.680, 1.677; of head dim 64, 16k, 7.13, 7.08. With dQ apart no better: 32 heads of 8 7.01,
    # 7.24, 7.20, 16 of 16 7.04, 7.08. Documents on an H100, 8 heads of 2: 10 in 32k 3.646, 3.419, 6
    # in 131k 62.74, 58.27; 32 of 8, 16 of 1024 tokens, 1.471, 1.407.
    added = spec.mask_shape is not None or spec.bias_shape is not None
    if added or tiles.once:
        return {}
    if tiles.apart:
        return {"heads_together": _rows_side_by_side(spec, tiles)}
    if _is_window(spec):
        if spec.has_segments or not tiles.values_first or not _is_long(spec, tiles):
            return {}
        if spec.group == 1:
            return {"heads_together": _heads_of_window(spec, tiles)}
        return {"tiles_first": True}
    if not _is_one_way(spec):
        return {}
    if spec.has_segments and not (spec.group > 1 and tiles.values_first):
        return {}  # not tried
    heads = spec.kv_heads * tiles.shares.heads
    if tiles.adds:
        together = _or_all_of_a_row(heads_of_shares(spec, tiles), heads)
        return {"heads_inner": spec.group > tiles.shares.heads, "heads_together": together}
    rows = _rows_side_by_side(spec, tiles)
    if spec.group > 1:
        return {"heads_inner": spec.group > tiles.shares.heads, "heads_together": rows}
    many = -(-SIDE_BY_SIDE * tiles.keys // spec.keys)
    some = _divisor(heads, many) if tiles.shares.count == 1 else 0
    return {"heads_together": some or rows}


def places(spec: AttentionSpec, tiles: BackwardTiles) -> int:
    """Tiles that have sums at a time, where those are fewer than all; or 0."""
    count = -(-spec.keys // tiles.keys)
    # Where the shares of a tile are not launched together, all tiles of a head are between.
    apart = tiles.tiles_first or 0 < tiles.heads_together < tiles.shares.heads
    if not apart and tiles.heads_together % tiles.shares.heads:
        return 0  # key heads begin beside others that are not done
    least = max(PLACES_APART, count) if apart else PLACES
    return least if tiles.adds and least < spec.batch * spec.kv_heads * count else 0


def side_by_side(spec: AttentionSpec, tiles: BackwardTiles) -> int:
    """The heads of a tile that are side by side where tiles add in turns; 0: all of them."""
    if tiles.adds:
        return _shares_in_turns(spec, tiles)
    if tiles.shares.count > 1 or spec.has_segments:
        return 0
    if _is_window(spec):
        return _largest_divisor(spec.kv_heads, MOST_IN_WINDOW)
    many = -(-SIDE_BY_SIDE * tiles.keys // spec.keys)
    return _divisor(spec.kv_heads, many if tiles.upward else max(8, many))


def _shares_in_turns(spec: AttentionSpec, tiles: BackwardTiles) -> int:
    """The same where each thread block has a query head, and its key head's dK and dV are added.

    Fewer than of heads with their own keys, as those of a group wait for each other to add.
    """
    # Free backward's time over this one's, by heads side by side (two kernels in brackets), on an
    # H200: 32 heads of 8, B 2, 8k, 2 0.942, 4 0.925, 8 0.810 (0.818), 16k 1 0.899, 2 0.958, 4 0.867
    # (0.808), of one, B 2, 4k, 4 0.882, 8 0.828, 16 0.671 (0.815), 28 of 4, 12,345, 2 0.952, 4
    # 0.916, 7 0.761 (0.791). On an H100: 32 of 8, B 4, 4k, 4 0.915, 8 0.880 (0.874), 2k 8 0.863, 16
    # 0.845 (0.915); 8 of 2, 32k, 1 0.907, 2 0.777 (0.809); of 96, 8k, 2 0.910, 4 0.906 (0.794), of
    # 64 4 0.942, 8 0.950 (0.795); window 4095 of 16k, 2 0.898, 4 0.949, 8 0.949, 32 0.496 (0.850).
    heads = spec.kv_heads * tiles.shares.heads
    if _is_window(spec):
        return _largest_divisor(heads, MOST_SHARES_IN_WINDOW)
    rows = tiles.queries // 64  # of half as many bytes at head dim 64
    least = max(2, -(-SHARES_SIDE_BY_SIDE * rows * tiles.keys // spec.keys))
    found = _divisor(heads, least) or heads
    if found * spec.keys > MOST_ROWS_OF_SHARES * rows:
        return 1
    return found if found < heads else 0


def documents_side_by_side(spec: AttentionSpec, tiles: BackwardTiles, visits: Array) -> Array:
    """The heads of a tile that are side by side in each row of documents, (B,) int32.

    By its longest document, whose tiles have the most visits.

    visits: (B, tiles, 4), see `Visits`.
    """
    # Two kernels' time over that in turns on an H200, backward, causal, by heads side by side, of
    # 16 of 128: one of 16k 16 0.736, 4 1.067, 2 1.181; up to 4k 16 1.053, 8 1.146; 2k 16 1.132, 8
    # 1.142, 2 1.131; of 32 of 64: 16k 8 1.179, 2 1.259; up to 4k 32 1.188, 16 1.268, 8 1.221; 2k
    # 32 1.242, 16 1.239. Full, up to 4k, of 16 of 128: 16 1.189, 8 1.166.
    longest = visits[..., 1].max(axis=1).astype(jnp.float32) * tiles.queries
    many = SIDE_BY_SIDE * tiles.keys / jnp.maximum(longest, 1)
    many = many if tiles.upward else jnp.maximum(many, 8)
    found = jnp.full(spec.batch, spec.kv_heads, jnp.int32)
    for n in reversed(range(1, spec.kv_heads)):  # its divisors: the least that is as many
        if spec.kv_heads % n == 0:
            found = jnp.where(n >= many, np.int32(n), found)
    return found


def _is_long(spec: AttentionSpec, tiles: BackwardTiles) -> bool:
    """Whether no tile is shared but to add, nor has a window so few visits that it is listed."""
    count = -(-spec.keys // tiles.keys)
    if count > MOST_KNOWN or (tiles.shares.count > 1 and not tiles.adds):
        return False
    counts = known_counts(spec, queries=tiles.queries, keys=tiles.keys)
    return float(counts.mean()) * tiles.queries * spec.group >= LEAST_VISITED


def _time(spec: AttentionSpec, tiles: BackwardTiles) -> float:
    """When the last thread block of a call ends, in visits to a block of queries of one head."""
    if tiles.adds:
        return last_end(spec, tiles, heads_of_shares(spec, tiles))
    visited = float(known_counts(spec, queries=tiles.queries, keys=tiles.keys).sum())
    visited /= -(-spec.queries // tiles.queries)
    filled = visited > most_visits(spec, tiles)
    rows = _rows_side_by_side(spec, tiles)
    inner = 1 + INNER * max(0, spec.group - 2)
    return inner * (1 + FILL * filled) * last_end(spec, tiles, rows or spec.kv_heads)


def _rows_side_by_side(spec: AttentionSpec, tiles: BackwardTiles) -> int:
    """The heads of some rows, where those of one row at a time end unevenly; 0: those of one."""
    heads, count = spec.kv_heads * tiles.shares.heads, -(-spec.keys // tiles.keys)
    alone = not _is_one_way(spec) or spec.has_segments or tiles.tiles_outer
    if alone or spec.batch == 1 or not 0 < count <= MOST_KNOWN or heads * count >= SIDE_BY_SIDE:
        return 0
    return _or_all_of_a_row(rows_together(spec, tiles), heads)


def _or_all_of_a_row(together: int, heads: int) -> int:
    return 0 if together == heads else together


def _heads_of_window(spec: AttentionSpec, tiles: BackwardTiles) -> int:
    """Heads side by side in a window, so that what their tiles visit stays in L2; 0: all."""
    # ms on an H200, window 4095 of 16 heads, all, four: 2.781, 2.717, FlashAttention-3 2.707; 1023,
    # where all fit, 0.975, 0.975, 0.985.
    visits = int(known_counts(spec, queries=tiles.queries, keys=tiles.keys).max())
    return _largest_divisor(spec.kv_heads, max(1, WINDOWS_SIDE_BY_SIDE // visits))


def _largest_divisor(count: int, most: int) -> int:
    """The largest divisor of a count up to that; 0 if it is all."""
    found = max(n for n in range(1, most + 1) if count % n == 0)
    return found if found < count else 0


def _divisor(count: int, least: int) -> int:
    """The least divisor of a count that is as much, but less than all; else 0."""
    return next((n for n in range(least, count) if count % n == 0), 0)


def _is_one_way(spec: AttentionSpec) -> bool:
    """Whether tiles end at the last query."""
    return spec.band.upper is not None and spec.band.lower is None


def _is_window(spec: AttentionSpec) -> bool:
    return spec.band.lower is not None
