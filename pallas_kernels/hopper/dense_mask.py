"""A dense mask: which blocks of keys a tile visits because of it, and its elements as bits.

One pass over the mask makes words of 32 keys of a query, an eighth of its bytes. From these follows
a list for each tile: first the blocks of which some elements are hidden, then those of which none
is, each from right to left. A block that is hidden altogether is in no list.

    list      count   mixed   block block block | block block ..
                              mixed             | clear

Axes along which the mask is broadcast are of size 1 in the words too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from jattn.call.band import Band
from jattn.call.masking import KeyIntervals
from pallas_kernels import blocks
from pallas_kernels.hopper.seam import Ref, Seam
from pallas_kernels.hopper.segments import segment_ranges
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands
    from pallas_kernels.hopper.plan import Plan, Work

__all__ = ["BITS", "bounded", "by_batch", "in_order", "list_of", "mask_arrays", "seen", "words_of"]

BITS = 32  # keys of a word
MOST_COMPARED = 512  # blocks of a tile that are put in order by comparing all with all
ROW = plgpu.Layout.WGMMA.reduce(1)


def mask_arrays(plan: Plan, operands: Operands) -> dict[str, Array]:
    """mask_words (rows, heads, words, queries), mask_lists (rows or B, heads, tiles, 2 + blocks).

    Both int32. Words are of whole blocks and tiles: keys past the last are hidden, queries past the
    last are as the last.
    """
    assert operands.mask is not None
    words = _words(plan, operands.mask)
    return {"mask_words": words, "mask_lists": _lists(plan, operands, words)}


def _words(plan: Plan, mask: Array) -> Array:
    b, n, t, s = mask.shape
    if s == 1:
        words = jnp.where(mask, np.int32(-1), np.int32(0)).reshape(b, n, 1, t)
    else:
        count = -(-s // plan.tiles.keys) * plan.tiles.keys // BITS
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, count * BITS - s)))
        bit = np.uint32(1) << np.arange(BITS, dtype=np.uint32).reshape(1, 1, 1, 1, BITS)
        bits = jnp.where(mask.reshape(b, n, t, count, BITS), bit, jnp.uint32(0))
        words = lax.bitcast_convert_type(bits.sum(axis=4, dtype=jnp.uint32), jnp.int32)
        words = jnp.swapaxes(words, 2, 3)
    more = 0 if t == 1 else plan.query_tiles * plan.rows - t
    return jnp.pad(words, ((0, 0), (0, 0), (0, 0), (0, more)), mode="edge") if more else words


def _lists(plan: Plan, operands: Operands, words: Array) -> Array:
    spec, count = plan.spec, -(-plan.spec.keys // plan.tiles.keys)
    b, n, w, t = words.shape
    of_keys = (1, 1) if w == 1 else (count, w // count)
    of_queries = (1, 1) if t == 1 else (plan.query_tiles, plan.rows)
    by_block = words.reshape(b, n, *of_keys, *of_queries)
    some, every = (
        jnp.swapaxes(found, 2, 3)  # (rows, heads, tiles or 1, blocks or 1)
        for found in ((by_block != 0).any(axis=(3, 5)), (by_block == -1).all(axis=(3, 5)))
    )
    first, stop, clear_first, clear_stop = _ranges(plan, operands)
    if first.shape[0] > 1:
        rows = spec.rows("mask").row(jnp.arange(spec.batch, dtype=jnp.int32))
        rows = jnp.broadcast_to(rows, (spec.batch,))
        some, every = some[rows], every[rows]
    block = jnp.arange(count, dtype=jnp.int32).reshape(1, 1, 1, count)
    some = some & (block >= first) & (block < stop)
    every = some & every & (block >= clear_first) & (block < clear_stop)
    mixed = some & ~every

    return in_order(mixed, every, from_right=True)


def in_order(mixed: Array, clear: Array, *, from_right: bool) -> Array:
    """Flags (.., .., .., blocks) as lists (.., .., .., 2 + blocks): see above."""
    count = mixed.shape[3]
    block = jnp.arange(count, dtype=jnp.int32).reshape(1, 1, 1, count)
    some = mixed | clear

    def before(flags: Array) -> Array:
        """How many are set on the side from which the blocks come."""
        flags = flags.astype(jnp.int32)
        return lax.cumsum(flags, axis=3, reverse=from_right) - flags

    mixed_count = mixed.sum(axis=3, keepdims=True, dtype=jnp.int32)
    total = some.sum(axis=3, keepdims=True, dtype=jnp.int32)
    place = jnp.where(mixed, before(mixed), mixed_count + before(clear))
    place = jnp.where(some, place, count)
    if count <= MOST_COMPARED:
        at = place[..., None, :] == block[..., None]
        order = jnp.where(at, block[..., None, :], 0).sum(axis=4, dtype=jnp.int32)
    else:
        order = lax.sort((place, jnp.broadcast_to(block, place.shape)), num_keys=1)[1]
        order = jnp.where(block < total, order, 0)
    return jnp.concatenate([total, mixed_count, order], axis=3)


def _ranges(plan: Plan, operands: Operands) -> list[Array]:
    """First and stop of the visited and of the clear blocks by all else, (B or 1, 1, tiles, 1)."""
    spec, size = plan.spec, plan.tiles.keys
    if spec.has_segments:
        ranges = segment_ranges(plan, operands)
        return [ranges[:, None, :, i, None] for i in range(4)]
    intervals = KeyIntervals.of_batch(spec, operands, 1)
    start = jnp.arange(plan.query_tiles, dtype=jnp.int32)[None] * plan.queries
    stop = jnp.minimum(start + plan.queries, spec.queries)
    ends = (
        *blocks.key_blocks(intervals, start, stop, size),
        *blocks.unmasked_key_blocks(intervals, start, stop, size),
    )
    *found, _ = jnp.broadcast_arrays(*(jnp.asarray(x, jnp.int32) for x in ends), start)
    return [x[:, None, :, None] for x in found]


def list_of(plan: Plan, refs: Ref, work: Work) -> Ref:
    """The tile's list, (2 + blocks,)."""
    spec = plan.spec
    row = work.batch if by_batch(spec) else spec.rows("mask").row(work.batch)
    head = 0 if refs.mask_lists.shape[1] == 1 else work.head
    return refs.mask_lists.at[row, head, work.tile]


def by_batch(spec: AttentionSpec) -> bool:
    """Whether which blocks are visited depends on the batch row, whatever the mask."""
    lengths = spec.has_query_lengths or spec.has_key_lengths
    return lengths or spec.has_segments or spec.has_query_offset


def bounded(plan: Plan) -> bool:
    """Whether anything but the mask's bits hides keys."""
    spec = plan.spec
    assert spec.mask_shape is not None
    past = spec.mask_shape[3] == 1 and spec.keys % plan.tiles.keys != 0
    return past or by_batch(spec) or spec.band != Band()


def words_of(
    plan: Plan, seam: Seam, refs: Ref, work: Work, warpgroup: Array, block: Array
) -> list[Array]:
    """The words of a block of keys for a warpgroup's rows, (64,) each, or scalars.

    Read long before they are needed: while the products of the logits run.
    """
    spec, count = plan.spec, plan.tiles.keys // BITS
    words = refs.mask_words
    row = spec.rows("mask").row(work.batch)
    head = 0 if words.shape[1] == 1 else work.head
    places = [0] if words.shape[2] == 1 else [block * count + i for i in range(count)]
    if words.shape[3] == 1:
        return [words[row, head, place, 0] for place in places]
    rows = pl.ds(work.query + warpgroup * ROWS, ROWS)
    return [seam.load_gmem(words.at[row, head, place, rows], ROW) for place in places]


def seen(words: list[Array], own: Array, base: Array) -> Array:
    """Whether a row's bit of each column, own + base, is set; see `masks.hide`."""
    shape = base.shape
    matrices = [lax.broadcast_in_dim(x, shape, list(range(x.ndim))) for x in words]
    word = matrices[-1]
    for i in range(len(matrices) - 2, -1, -1):
        word = jnp.where(base < BITS * (i + 1), matrices[i], word)
    bit = jnp.int32(1) << (base & (BITS - 1))
    found: Array = (lax.shift_right_logical(word, own) & bit) != 0
    return found
