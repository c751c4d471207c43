"""Which thread block computes which tile, when: packing of heads, splits of keys, order of work.

A tile is `rows` query rows of one batch row: `pack` heads of one group (usually one), each with
`queries` queries, against one contiguous share of their visible keys (usually all of it).

    rows of a tile, pack 2:    head 0: t0, t0+1, ...    head 1: t0, t0+1, ...

Of few queries and many heads that share keys, a tile holds as many heads as it has rows, so that
keys are read once; a query's heads are then one copy:

    heads in rows:             t0: head 0, head 1, ...  t1: head 0, head 1, ...

The list of tiles goes through groups of heads whose keys and values stay in L2; in a group, longest
tiles first. Either each tile is a thread block of its own, or the blocks are as many as the
multiprocessors, and each takes the next tile that nobody has taken (`taken.py`) or has its share of
the list, made when the call is traced.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jattn.call.masking import KeyIntervals
from pallas_kernels.blocks import key_blocks, unmasked_key_blocks
from pallas_kernels.hopper import few_queries
from pallas_kernels.hopper.bias_form import FOLDED, folds, form_of, rows_share
from pallas_kernels.hopper.copies import copyable, padded_width
from pallas_kernels.hopper.indices import divided, quotient
from pallas_kernels.hopper.tiles import ROWS, Tiles, choose_tiles, cost_of, fit

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec
    from pallas_kernels.hopper.seam import Ref

__all__ = ["Plan", "Work", "make_plan"]

MULTIPROCESSORS = 132
TILE_COST = 0.7  # of a tile's start and end, in visits to a block of keys
LEAST_IN_ROWS = 8  # heads: so many are packed as well in the order of their queries
JOIN = 3  # visits that pass while parts of split keys are joined
MOST_LISTED = 1 << 17  # tiles: 0.5 MiB of list, 0.2 s to make
FEWEST_COUNTED = 3  # tiles a multiprocessor: of fewer, to set the counter to zero takes as long
MOST_LOWERED = 2  # tiles a multiprocessor: of more, lower ones would only be more
LISTED = 1.3  # of a list's start, in visits of one warpgroup
BESIDE = 0.667  # of the time of two thread blocks, where they have one multiprocessor together
FEWEST_VISITS = 4  # of a tile, else the counter may not answer in time
SHORT, LONG = 2048, 8192  # keys; queries whose tiles a list would not gain
MOST_SORTED = 2048  # tiles of all heads: compared with each other
INT32_MAX = 2**31 - 1
L2_BYTES = 32 << 20  # of 60 MB: the rest is for queries, output and what is yet to be evicted
BYTES_IN_STEP = 10 << 20  # of keys and values that short tiles side by side read


type TileRanges = tuple[tuple[tuple[int, int], tuple[int, int]], ...]


class Work(NamedTuple):
    """One tile: batch row, first head, key head, first query, share of the keys, query tile."""

    batch: Array
    head: Array
    kv_head: Array
    query: Array
    split: Array
    tile: Array


@dataclass(frozen=True)
class Plan:
    """The launch of one call.

    heads_in_rows: a tile's rows are the pack's heads of its first query, then of the next; it holds
      all queries.
    counted: a thread block's next tile is the next of all that is not yet taken (`taken.py`).
    share: of few queries, how many blocks of keys each thread block reads, whichever rows they are
      of; or 0. A tile is then split where that of a thread block ends.
    """

    spec: AttentionSpec
    tiles: Tiles
    pack: int
    splits: int
    blocks: int
    heads_in_rows: bool = False
    counted: bool = False
    share: int = 0

    @property
    def rows(self) -> int:
        """Query rows of a tile."""
        return self.tiles.warpgroups * ROWS

    @property
    def queries(self) -> int:
        """Queries of a tile; a power of two if heads are packed, but not in rows."""
        return self.spec.queries if self.heads_in_rows else self.rows // self.pack

    @property
    def query_tiles(self) -> int:
        """Tiles along T."""
        return -(-self.spec.queries // self.queries)

    @property
    def head_packs(self) -> int:
        """Packs of heads."""
        return self.spec.heads // self.pack

    @property
    def works(self) -> int:
        """Tiles in all."""
        return self.spec.batch * self.head_packs * self.query_tiles * self.splits

    @property
    def in_parts(self) -> bool:
        """Whether the kernel's float32 outputs are joined afterwards, with each other or a sink."""
        return self.splits > 1 or (self.spec.has_sinks and self.pack > 1)

    @property
    def part_bytes(self) -> int:
        """Bytes of what is joined: outputs of whole rows of shared memory, two numbers a row."""
        spec, rows = self.spec, self.query_tiles * self.queries
        outputs = copyable(spec.queries, 8) * padded_width(spec.value_dim)
        numbers = spec.batch * spec.heads * (outputs + 2 * rows)
        return self.splits * numbers * 4 if self.in_parts else 0

    @property
    def masked(self) -> bool:
        """Whether some block of keys needs an element mask."""
        from jattn.call.masking import hides_some

        return hides_some(self.spec) or self.spec.keys % self.tiles.keys != 0

    @property
    def masked_left(self) -> bool:
        """Whether blocks at the left end may need one, after those that do not."""
        spec = self.spec
        if spec.mask_shape is not None:
            return False  # they come first
        return spec.band.lower is not None or spec.has_segments or (self.splits > 1 and self.masked)

    @property
    def lengths_known(self) -> bool:
        """Whether every tile's blocks are known when the call is traced."""
        spec = self.spec
        return not (
            spec.has_segments
            or spec.has_query_lengths
            or spec.has_key_lengths
            or spec.has_query_offset
            or spec.mask_shape is not None
        )

    @property
    def masked_later(self) -> bool:
        """Whether a tile may need an element mask after the first block it visits."""
        if not self.masked:
            return False
        if not self.lengths_known or self.splits > 1:
            return True
        return any(
            stop - first > 1 and (clear_stop < stop - 1 or clear_first > first)
            for (first, stop), (clear_first, clear_stop) in self.ranges()
        )

    @cached_property
    def ends_apart(self) -> bool:
        """Whether each block that needs a mask needs that of one end of its rows' ranges.

        A block that needs none is between those at the right end and those at the left. A tile that
        has none begins, for all its rows, with the first key.
        """
        spec = self.spec
        if spec.band.lower is None or not self.lengths_known or self.splits > 1:
            return False
        intervals = KeyIntervals(spec.band, spec.queries, spec.keys)
        last = (min(n * self.queries, spec.queries) - 1 for n in range(1, self.query_tiles + 1))
        of_tiles = zip(last, self.ranges(), strict=True)
        return all(a < b or intervals.start(row) == 0 for row, (_, (a, b)) in of_tiles)

    @property
    def one_loop(self) -> bool:
        """Whether a tile's steps are one loop, in which a mask, if there is one, is a branch.

        Else masked and clear blocks have loops of their own, which is faster, but more than
        ptxas has registers for where a tile follows a tile.
        """
        return self.is_scheduled or not self.masked_later

    def holds_maxima(self, *, masked: bool) -> bool:
        """Whether a step's maxima are to be made while P V runs, whatever the compiler would do.

        masked: the step's mask is a branch. ms without and with, where there is none: 128 full 1k
        0.208, 0.206, 4k 0.778, 0.764, 16k 3.090, 3.037, causal* 4k 0.407, 0.402, 12,345 0.908,
        0.886; 192/128 causal 4k 0.498, 0.485, full 0.929, 0.909; 64 causal* 4k 0.582, 0.582. (On an
        H100, * an H200.)
        """
        return self.counted and (masked or max(self.spec.head_dim, self.spec.value_dim) > 64)

    def ranges(self) -> TileRanges:
        """Each query tile's blocks of keys, and those of them that need no mask; see `blocks`."""
        return _ranges(self.spec, self.queries, self.tiles.keys)

    @property
    def one_power(self) -> bool:
        """Whether each 2^x beside a bias is of one multiplication and addition: see `softmax.py`.

        Where it was faster, by 2 to 7%, or 1 beside columns. Beside a float32 bias, and beside
        columns in a causal call, it was slower, by up to 7: the compiler puts the rest in another
        order. float16 has no room for 2^32.
        """
        spec, form = self.spec, form_of(self.spec)
        width, two_bytes = max(spec.head_dim, spec.value_dim), np.dtype("bfloat16")
        if spec.dtype != two_bytes or width > 128:
            return False
        if form == "whole":
            return spec.bias_dtype == two_bytes and width > 32
        return width > 64 and not self.masked

    @property
    def longest_first(self) -> bool:
        """Whether counted tiles are taken in the order of their lengths."""
        spec = self.spec
        own = spec.keys * (spec.head_dim + spec.value_dim) * spec.element_bytes
        few = spec.batch * self.query_tiles <= MOST_SORTED and spec.has_segments
        return self.counted and few and own * spec.batch * spec.kv_heads <= L2_BYTES + L2_BYTES // 4

    @property
    def folds(self) -> bool:
        """Whether columns of a bias come with Q Kᵀ if they are small."""
        return folds(self.spec) and self.tiles.warpgroups > 1 and not self.in_parts

    @property
    def folded_bytes(self) -> int:
        """Bytes of such columns beside the bias: see `folded_bias.py`."""
        if not self.folds:
            return 0
        assert self.spec.bias_shape is not None
        rows, heads, _, keys = self.spec.bias_shape
        return rows * heads * -(-keys // self.tiles.keys) * self.tiles.keys * FOLDED * 2

    @property
    def is_scheduled(self) -> bool:
        """Whether thread blocks compute several tiles each, by a list."""
        return self.counted or self.share > 0 or self.works > self.blocks

    @property
    def visits_of_row(self) -> int:
        """Blocks of keys that a tile of few queries visits, where shapes tell."""
        (first, stop), _ = self.ranges()[0]
        return stop - first

    def part(self, batch: Array, split: Array) -> tuple[Array, Array]:
        """The blocks of keys of this part of a row's tiles, the first 0; none if it has fewer."""
        row = batch * np.int32(self.visits_of_row)
        of_block = (quotient(row, self.share) + split) * np.int32(self.share)
        first = jnp.maximum(of_block - row, 0)
        return first, jnp.minimum(of_block + np.int32(self.share) - row, self.visits_of_row)

    def schedule(self) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        """(blocks, 2 + most): how many tiles each block computes, and which; then some tile.

        A block begins the tile after its last, for the sake of code without a branch.

        Each tile in the order of the list goes to the block that is free first, by a count of the
        key blocks it visits where that is known.
        """
        if self.share:
            return self._schedule_of_shares()
        visits = [max(stop - first, 1) + TILE_COST for (first, stop), _ in self.ranges()]
        together = self.heads_together
        free = [(0.0, block) for block in range(self.blocks)]
        mine: list[list[int]] = [[] for _ in free]
        for work in range(self.works):
            now, block = heapq.heappop(free)
            mine[block].append(work)
            tile = work // self.splits % (self.query_tiles * together) // together
            heapq.heappush(free, (now + visits[self.query_tiles - 1 - tile], block))
        return _listed(mine)

    def _schedule_of_shares(self) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        """The same where thread blocks have equal shares: all heads of one are side by side."""
        visits, share, mine = self.visits_of_row, self.share, []
        for block in range(self.blocks):
            number, head = divmod(block, self.head_packs)
            last = -(-(number + 1) * share // visits)
            rows = range(number * share // visits, min(last, self.spec.batch))
            parts = ((row * self.head_packs + head, number - row * visits // share) for row in rows)
            mine.append([tile * self.splits + part for tile, part in parts])
        return _listed(mine)

    def listed(self, refs: Ref, turn: Array | int) -> Array:
        """The number of this thread block's turn-th tile."""
        block = lax.axis_index("block")
        return refs.schedule[block, turn + 1] if self.is_scheduled else block

    def work(self, index: Array) -> Work:
        """The tile with this number in the list."""
        index, split = divided(index, self.splits)
        together = self.heads_together
        lots, tile = divided(index, self.query_tiles * together)
        tile, inner = divided(tile, together)
        if rows_share(self.spec):  # side by side, so that what they share stays in L2
            pack, batch = divided(lots * together + inner, self.spec.batch)
        else:
            batch, pack = divided(lots * together + inner, self.head_packs)
        tile = self.query_tiles - 1 - tile  # the longest of a causal call come first
        head = pack * self.pack
        kv_head = quotient(head, self.spec.group)
        return Work(batch, head, kv_head, tile * self.queries, split, tile)

    @property
    def heads_together(self) -> int:
        """Packs of heads, a divisor of their number, whose tiles are taken side by side.

        Each half of L2 keeps a copy of what its multiprocessors read, 25 MB on an H100. In a full
        call all tiles are as long, so that those of one head run in step, and that one's keys are
        all that is kept. Where tiles differ, the longest of several heads come first.
        """
        spec = self.spec
        own = spec.keys * (spec.head_dim + spec.value_dim) * spec.element_bytes
        narrow, uneven = max(spec.head_dim, spec.value_dim) <= 64, spec.band.upper is not None
        least, size = 1, 0
        if spec.band.lower is not None or spec.has_segments or rows_share(spec):
            least, size = self.tiles.heads_together, L2_BYTES
        elif narrow and spec.keys >= SHORT:
            # ms, one head, 8, 16, all that fit: causal 4k 0.582 0.578 0.574; full 1.020 1.028 1.059
            least, size = (self.tiles.heads_together, L2_BYTES) if uneven else (1, 0)
        elif narrow:
            # 16, 32, 64: causal 1k 0.190 0.192 0.193; 1, 8, 32: full 0.299 0.296 0.295
            size = BYTES_IN_STEP if uneven else BYTES_IN_STEP // 4
        elif uneven:
            # 128, causal: 1k 8 0.135, 16 0.135, 32 0.139; 4k 4 0.415, 8 0.410, 16 0.413; 16k 1
            # 1.538, 2 1.528, 8 1.548.
            least, size = 2, BYTES_IN_STEP if spec.keys < SHORT else BYTES_IN_STEP * 3 // 2
        most = max(least, size // own) * max(1, spec.group // self.pack)
        count = spec.batch * self.head_packs
        return max(n for n in range(1, min(most, count) + 1) if count % n == 0)


@lru_cache(maxsize=64)
def _ranges(spec: AttentionSpec, queries: int, keys: int) -> TileRanges:
    """As `Plan.ranges`, of tiles of so many queries and blocks of so many keys."""
    intervals = KeyIntervals(spec.band, spec.queries, spec.keys)
    found = []
    for start in range(0, spec.queries, queries):
        stop = min(start + queries, spec.queries)
        pair = key_blocks(intervals, start, stop, keys)
        clear = unmasked_key_blocks(intervals, start, stop, keys)
        found.append(((int(pair[0]), int(pair[1])), (int(clear[0]), int(clear[1]))))
    return tuple(found)


def _listed(mine: list[list[int]]) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """Tiles of each thread block, as `schedule` has them."""
    most = max(map(len, mine))
    return np.array([[len(x), *x, *[0] * (most + 1 - len(x))] for x in mine], np.int32)


def make_plan(
    spec: AttentionSpec,
    tiles: Tiles | None = None,
    *,
    multiprocessors: int = MULTIPROCESSORS,
    halves: bool = False,
) -> Plan:
    """The plan of a call, with these tiles or the table's.

    halves: those of queries and of keys are arrays of their own.
    """
    in_rows = _heads_in_rows(spec) if tiles is None or tiles.warpgroups == 1 else 0
    packable = spec.group & -spec.group  # the largest power of two that divides it
    # With a dense mask a tile is of one head, and its blocks of keys are a list of their own.
    masked = spec.mask_shape is not None
    pack = 1 if masked else min(packable, ROWS // 8)
    if form_of(spec) == "columns" and spec.bias_shape is not None and spec.bias_shape[1] > 1:
        pack = 1  # a tile has one vector beside a block of keys
    while pack > 1 and spec.queries * pack > 2 * ROWS:
        pack //= 2
    pack = in_rows or pack
    chosen = tiles or choose_tiles(spec, rows=spec.queries * pack, halves=halves)
    plan = _with_tiles(spec, chosen, pack, heads_in_rows=in_rows > 0)
    waits = spec.queries * pack <= ROWS  # for memory
    if tiles is None and not halves and not waits:
        plan = _soonest(plan, multiprocessors)
    may_split = tiles is None and not masked
    if may_split and (waits or 2 * plan.works <= multiprocessors or plan.in_parts):
        # Too few tiles to fill the chip: the smallest, and the keys split among blocks.
        smallest = choose_tiles(spec, rows=1)
        plan = _with_tiles(spec, smallest, pack, heads_in_rows=in_rows > 0)
        blocks = max(1, -(-spec.keys // plan.tiles.keys))
        if waits:
            splits = few_queries.shares(plan, multiprocessors)
            if even := few_queries.even_shares(plan, splits, multiprocessors):
                shared = _with_even_shares(plan, *even)
                if shared.splits > 1:  # else none ends within a row: whole tiles, not tried
                    return shared
            plan = replace(plan, tiles=few_queries.tiles(plan, splits, multiprocessors))
        else:
            most = min(-(-blocks // 2), INT32_MAX // blocks)  # a share's first block is a quotient
            splits = max(1, min(multiprocessors // plan.works, most))
        saved = blocks - -(-blocks // splits)
        if saved > JOIN or waits or plan.in_parts:  # in parts: joined in any case
            plan = replace(plan, splits=splits)
    # A list made beforehand is fair only where the tiles' lengths are known beforehand.
    listed = plan.lengths_known and multiprocessors < plan.works <= MOST_LISTED
    counted = _is_counted(plan) and plan.works > multiprocessors
    if _may_count(plan):
        few = plan.works <= FEWEST_COUNTED * multiprocessors
        uneven = spec.band.upper is not None and spec.keys >= SHORT
        narrow = max(spec.head_dim, spec.value_dim) <= 64
        counted = plan.works > multiprocessors and (not few or (uneven and not narrow))
        listed &= narrow  # few tiles, that is
    else:
        plan = replace(plan, tiles=replace(plan.tiles, from_registers=False))
        listed &= spec.queries < LONG or not 64 < max(spec.head_dim, spec.value_dim) <= 128
    out_bytes = 4 if plan.in_parts else 2
    several = listed or counted
    fitted = fit(spec, plan.tiles, listed=several, noted=counted, out_bytes=out_bytes)
    several = fitted.query_slots > fitted.warpgroups or fitted.from_registers
    listed, counted = listed and several, counted and several
    blocks = multiprocessors if listed or counted else plan.works
    return replace(plan, tiles=fitted, blocks=blocks, counted=counted)


def _soonest(plan: Plan, multiprocessors: int) -> Plan:
    """The plan, or where there are few tiles the one by other tiles whose last one ends before.

    us on an H100 or an H200, causal, tiles of the table, of one warpgroup, these by blocks of 64
    keys (64 columns: two on a multiprocessor), of two in turn: 64 columns, 16 heads, 640 tokens
    9.7, 8.0; 768 11.0, 8.9, 9.4, 10.8; 1k 13.4, 11.9, 12.2, 13.2; 2k 30.5, 33.1, , 26.7; 32 heads,
    512 8.8, 8.6, 7.3, 8.4; 768 13.3, 14.2, , 12.6; 1k 18.0, 20.5, , 17.1; 8 heads, 2k 27.8, 18.7,
    21.6, 23.1; 4k 54.6, , , 45.4; full 28.2, , , 22.8; 128 columns, 32 heads of 8, 512 11.6, 10.7,
    9.9; 1k 22.0, 25.7; 16 heads, 768 12.7, 11.6, 11.4; 1k 17.0, 15.5, 15.1; 8 heads, 2k 28.1, 24.3,
    24.7.
    """
    spec, width = plan.spec, max(plan.spec.head_dim, plan.spec.value_dim)
    others = spec.bias_shape is not None or spec.dropout_rate > 0 or not plan.lengths_known
    if others or width > 128 or plan.in_parts or plan.works > MOST_LOWERED * multiprocessors:
        return plan
    one = choose_tiles(spec, rows=1)
    tiles = [plan.tiles, one]
    if width <= 64:
        tiles += [replace(one, query_slots=2), replace(one, keys=64)]
        tiles += [Tiles(2, 128, 4, query_slots=4, in_turn=spec.band.lower is None)]
    else:
        tiles += [replace(one, stages=2, query_slots=2), Tiles(1, 64, 4, query_slots=2)]
    plans = [_with_tiles(spec, x, plan.pack, heads_in_rows=False) for x in tiles]
    return min(plans, key=partial(_last_end, multiprocessors=multiprocessors))


def _last_end(plan: Plan, multiprocessors: int) -> float:
    """When the last tile ends of those taken longest first, in visits of one warpgroup."""
    spec, tiles = plan.spec, plan.tiles
    halves, listed = tiles.keys == 64, tiles.query_slots > 1
    several = plan.works > multiprocessors
    if tiles.warpgroups == 1:
        many = halves and plan.works > 2 * multiprocessors
        if many or several != (listed or halves):
            return math.inf
    visit, start = cost_of(tiles, wide=max(spec.head_dim, spec.value_dim) > 64)
    ends = [0.0] * multiprocessors
    lengths = sorted((max(stop - first, 1) for (first, stop), _ in plan.ranges()), reverse=True)
    for visits in lengths:
        for _ in range(spec.batch * plan.head_packs):
            heapq.heapreplace(ends, ends[0] + visits * visit + start)
    if halves and not listed:  # two on a multiprocessor
        return max(max(ends) * BESIDE, lengths[0] * visit + start)
    return max(ends) + LISTED * (several and listed)


def _with_even_shares(plan: Plan, tiles: Tiles, blocks: int) -> Plan:
    """The plan of few queries whose keys so many thread blocks share evenly."""
    tiles = fit(plan.spec, tiles, listed=True, out_bytes=4)
    plan = replace(plan, tiles=tiles)
    visits, packs = plan.visits_of_row, plan.head_packs
    share = -(-plan.spec.batch * visits // (blocks // packs))
    rows = np.arange(plan.spec.batch) * visits
    splits = int(((rows + visits - 1) // share - rows // share).max()) + 1
    used = -(-plan.spec.batch * visits // share)  # the last may have none
    return replace(plan, share=share, splits=splits, blocks=used * packs)


def _is_counted(plan: Plan) -> bool:
    """Whether thread blocks take tiles one by one: those of packed documents.

    ms, without and with: 16k, 16 heads, eight documents 0.288, 0.247, one 1.595, 1.552; 131k, four
    39.0, 36.8; 12,345, six 0.290, 0.250; head dim 64, B 16, 1k, three 0.132, 0.094; but tiles of
    three warpgroups, 32k, 8/2 heads, eight 0.452, 0.463.
    """
    spec = plan.spec
    others = spec.mask_shape is not None or spec.bias_shape is not None or spec.dropout_rate > 0
    others |= spec.has_key_lengths or plan.in_parts or plan.tiles.warpgroups != 2
    return spec.has_segments and not others


def _may_count(plan: Plan) -> bool:
    """Whether they may of a call whose tiles have known lengths, and more than a few visits.

    ms on an H100, by a list or the grid, what was faster, and by the counter: 128 full 1k 0.211,
    0.206, 16k 3.120, 3.037, causal 1k 0.135, 0.132, window of 255 in 16k 0.109, 0.106; but of two
    tiles a multiprocessor full 1k 0.0336, 0.0349, causal 1k 0.0228, 0.0239, 2k 0.0351, 0.0340.
    """
    spec = plan.spec
    others = spec.bias_shape is not None or spec.dropout_rate > 0 or plan.in_parts or plan.pack > 1
    others |= plan.tiles.warpgroups == 1
    timed = max(spec.head_dim, spec.value_dim) <= 128 or plan.tiles.from_registers
    long = spec.keys > FEWEST_VISITS * plan.tiles.keys or spec.band.lower is not None
    return plan.lengths_known and plan.splits == 1 and timed and long and not others


def _heads_in_rows(spec: AttentionSpec) -> int:
    """How many heads of a group fit in a tile's rows with all their queries; 0 if too few for it.

    Whole rows of tiles: a multiple of 8, a power of two if a row's query has to be worked out.
    """
    others = spec.has_segments or spec.mask_shape is not None
    if others or spec.bias_shape is not None or spec.dropout_rate > 0:
        return 0  # each has arrays of its own in the other order
    packs = (n for n in range(8, ROWS // max(spec.queries, 1) + 1, 8) if spec.group % n == 0)
    pack = max((n for n in packs if spec.queries == 1 or n & (n - 1) == 0), default=0)
    return pack if pack > LEAST_IN_ROWS else 0


def _with_tiles(spec: AttentionSpec, tiles: Tiles, pack: int, *, heads_in_rows: bool) -> Plan:
    if heads_in_rows:
        return Plan(spec, tiles, pack, splits=1, blocks=1, heads_in_rows=True)
    rows = tiles.warpgroups * ROWS
    if tiles.warpgroups == 3:
        pack = 1
    while pack > 1 and rows // pack < min(spec.queries, rows):
        pack //= 2
    return Plan(spec, tiles, pack, splits=1, blocks=1)
