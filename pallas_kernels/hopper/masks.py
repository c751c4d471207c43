"""Which keys a query tile visits, and the element mask of one block of them.

Blocks are visited from the right: step i visits block `stop - 1 - i`. Those at either end may need
an element mask; those between do not, and their loop has none.

    step        0      1      2      3      4
    block     stop-1                      first
              mask   mask |  clear  clear | mask
                          clear_from      clear_to
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jattn.call.masking import KeyIntervals
from pallas_kernels import blocks
from pallas_kernels.hopper.dense_mask import bounded, list_of
from pallas_kernels.hopper.dense_mask import seen as dense_seen
from pallas_kernels.hopper.indices import quotient
from pallas_kernels.hopper.seam import Ref, Seam
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from pallas_kernels.hopper.plan import Plan, Work

__all__ = ["End", "Steps", "Warpgroup", "hide", "steps_of"]

type End = Literal["left", "right"]

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # one value a row
COLUMN = WGMMA.reduce(0)  # one value a column


class Warpgroup(NamedTuple):
    """A compute warpgroup, by its number."""

    number: Array

    def rows(self, seam: Seam) -> Array:
        """Which rows of the tile it holds, (64,).

        Made where they are used, and from a matrix: kept, they take registers from the products; of
        a vector's iota the compiler searches for the layout for long.
        """
        rows = plgpu.broadcasted_iota(jnp.int32, (ROWS, 8), 0, layout=WGMMA).max(axis=1)
        return seam.layout(rows, ROW) + self.number * ROWS


class Steps(NamedTuple):
    """The visits of one tile; `empty` if it sees no key, and `visits` is then 1 all the same.

    listed: with a dense mask, the list of its blocks; `stop` is then not used.
    """

    stop: Array | int
    visits: Array | int
    clear_from: Array | int
    clear_to: Array | int
    empty: Array | bool
    listed: Ref = None

    def block(self, i: Array | int) -> Array:
        """The i-th block visited."""
        if self.listed is None:
            return self.stop - 1 - i  # type: ignore[return-value]
        own: Array = self.listed[i + 2]
        return own


def intervals_of(plan: Plan, refs: Ref, batch: Array) -> KeyIntervals:
    """The key intervals of one batch row."""
    spec = plan.spec
    return KeyIntervals.of(
        spec,
        refs.query_lengths[batch] if spec.has_query_lengths else None,
        refs.key_lengths[batch] if spec.has_key_lengths else None,
        refs.query_offset[batch] if spec.has_query_offset else None,
    )


def steps_of(plan: Plan, refs: Ref, work: Work, ranges: list[Array] | None = None) -> Steps:
    """The blocks of keys that a tile visits; ranges: those of segments, if they are known."""
    spec, size = plan.spec, plan.tiles.keys
    if spec.mask_shape is not None:
        listed = list_of(plan, refs, work)
        total, mixed = listed[0], listed[1]
        count = jnp.maximum(total, 1)
        return Steps(0, count, jnp.clip(mixed, 1, count), count, total == 0, listed)
    if spec.has_segments or ranges is not None:
        ends: Any = ranges or [refs.ranges[work.batch, work.tile, i] for i in range(4)]
        first, stop, clear_first, clear_stop = ends
    else:
        intervals = intervals_of(plan, refs, work.batch)
        last = work.query + plan.queries
        stop_query = last if spec.queries % plan.queries == 0 else jnp.minimum(last, spec.queries)
        first, stop = blocks.key_blocks(intervals, work.query, stop_query, size)
        clear_first, clear_stop = blocks.unmasked_key_blocks(
            intervals, work.query, stop_query, size
        )
    if plan.share:
        start, stop = plan.part(work.batch, work.split)
        first, stop = first + start, first + stop
    elif plan.splits > 1:
        count = jnp.maximum(stop - first, 0)
        first, stop = (first + quotient(count * (work.split + k), plan.splits) for k in range(2))
    if not plan.masked:
        return Steps(stop, stop - first, 1, stop - first, False)
    count = jnp.maximum(stop - first, 1)
    some = clear_first < clear_stop
    clear_from = jnp.where(some, jnp.clip(stop - clear_stop, 1, count), count)
    clear_to = jnp.where(some, jnp.clip(stop - clear_first, clear_from, count), count)
    # A tile that sees no key visits one block all the same, of which every element is hidden.
    return Steps(jnp.maximum(stop, 1), count, clear_from, clear_to, stop <= first)


def hide(
    plan: Plan,
    seam: Seam,
    refs: Ref,
    work: Work,
    steps: Steps,
    warpgroup: Warpgroup,
    s: Array,
    i: Array | int,
    slot: Array,
    words: list[Array] | None = None,
    q_slot: Array | None = None,
    end: End | None = None,
) -> Array:
    """s (64, keys) of the i-th block visited, with -inf where a row does not see a key.

    slot: where the keys' segments are.
    words: of a dense mask, from `words_of`.
    q_slot: where the queries' segments are, if not by the warpgroup's number.
    end: at which end of the blocks visited this one is, if `Plan.ends_apart`.
    """
    spec, shape = plan.spec, s.shape
    # Of a power of two of columns: of others a thread's would be found by divisions.
    wide = 1 << (shape[1] - 1).bit_length()
    key = plgpu.broadcasted_iota(jnp.int32, (ROWS, wide), 1, layout=WGMMA)[:, : shape[1]]
    # A thread's columns are 0, 1, 8, 9, 16, .. past an even one of 0 to 6: apart from that one they
    # are immediate operands, together they would be kept in as many registers.
    own, key = key & 6, key & ~6
    if words is not None and not bounded(plan):
        return jnp.where(dense_seen(words, own, key), s, -jnp.inf)
    row = warpgroup.rows(seam)
    if plan.heads_in_rows:  # a power of two of them, or one query
        row >>= (plan.pack if plan.queries > 1 else ROWS).bit_length() - 1
    elif plan.pack > 1:
        row &= plan.queries - 1
    query = work.query + row
    intervals = intervals_of(plan, refs, work.batch)

    def of_rows(x: Array | int) -> Array:
        """One value a row, from one a row or one for all."""
        x = jnp.asarray(x, jnp.int32)
        return seam.layout(jnp.full((ROWS,), x), ROW) if x.ndim == 0 else x

    start = steps.block(i) * plan.tiles.keys
    if end == "left":
        low = of_rows(intervals.start(query)) - start
        return jnp.where(key >= lax.broadcast_in_dim(low, shape, [0]) - own, s, -jnp.inf)
    high = of_rows(intervals.end(query))
    if spec.has_query_lengths:
        high = jnp.where(query < of_rows(intervals.query_length), high, of_rows(0))
    if plan.splits > 1 or spec.has_segments or spec.has_query_lengths or spec.has_key_lengths:
        high = jnp.minimum(high, of_rows(jnp.where(steps.empty, np.int32(0), np.int32(spec.keys))))
    seen = key < lax.broadcast_in_dim(high - start, shape, [0]) - own
    if spec.band.lower is not None and end is None:
        low = of_rows(intervals.start(query)) - start
        seen &= key >= lax.broadcast_in_dim(low, shape, [0]) - own
    if spec.has_segments:
        mine = seam.layout(refs.q_segments[warpgroup.number if q_slot is None else q_slot], ROW)
        its = seam.layout(refs.k_segments[slot], COLUMN)
        seen &= lax.broadcast_in_dim(mine, shape, [0]) == lax.broadcast_in_dim(its, shape, [1])
    if words is not None:
        seen &= dense_seen(words, own, key)
    return jnp.where(seen, s, -jnp.inf)
