"""A dense mask in the Hopper backward kernel of dK and dV, where keys are rows and queries columns.

As in forward (`dense_mask.py`), the other way round: words of 32 queries of a key, and for each
tile of keys of a key head a list of its visits. A visit is a block of queries of a head of the
group, head * blocks + block; a block that sees none of the tile's keys is in no list.

    list      count   mixed   visit visit visit | visit visit ..
                              mixed             | clear

A query that is hidden from all keys has an infinite log-sum-exp, so that a mask without an axis of
keys needs no words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.backward_tiles import BackwardTiles
from pallas_kernels.hopper.dense_mask import BITS, by_batch, in_order, seen
from pallas_kernels.hopper.seam import Ref, Seam
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands

__all__ = ["arrays", "list_of", "scratch", "seen_by", "words_at"]

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # one value a key


def arrays(
    spec: AttentionSpec, operands: Operands, tiles: BackwardTiles, ranges: Array, *, blocks: int
) -> dict[str, Array]:
    """turned_words (rows, heads, words, keys), key_lists (rows or B, K or 1, tiles, 2 + visits).

    Both int32. Words are of whole blocks and tiles; what is past the last query or key is hidden.

    ranges: (B or 1, tiles, 4), the visits by all but the mask; see `visits`.
    blocks: of queries.
    """
    assert operands.mask is not None
    words = _turned(operands.mask, tiles, blocks)
    lists = _lists(spec, tiles, words, ranges, blocks)
    return {"key_lists": lists} | ({} if _by_query(spec) else {"turned_words": words})


def _by_query(spec: AttentionSpec) -> bool:
    """Whether a query sees all keys or none, by the mask."""
    assert spec.mask_shape is not None
    return spec.mask_shape[3] == 1


def _turned(mask: Array, tiles: BackwardTiles, blocks: int) -> Array:
    b, n, t, s = mask.shape
    more_keys = 0 if s == 1 else -s % tiles.keys
    if t == 1:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, more_keys)))
        return jnp.where(mask, np.int32(-1), np.int32(0))
    count = blocks * tiles.queries // BITS
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, count * BITS - t), (0, more_keys)))
    bit = np.uint32(1) << np.arange(BITS, dtype=np.uint32).reshape(1, 1, 1, BITS, 1)
    bits = jnp.where(mask.reshape(b, n, count, BITS, s + more_keys), bit, jnp.uint32(0))
    return lax.bitcast_convert_type(bits.sum(axis=3, dtype=jnp.uint32), jnp.int32)


def _lists(
    spec: AttentionSpec, tiles: BackwardTiles, words: Array, ranges: Array, blocks: int
) -> Array:
    b, n, w, s = words.shape
    of_queries = (1, 1) if w == 1 else (blocks, w // blocks)
    of_keys = (1, 1) if s == 1 else (s // tiles.keys, tiles.keys)
    by_block = words.reshape(b, n, *of_queries, *of_keys)
    some, every = (
        jnp.swapaxes(found, 2, 3)  # (rows, heads, tiles or 1, blocks or 1)
        for found in ((by_block != 0).any(axis=(3, 5)), (by_block == -1).all(axis=(3, 5)))
    )
    if _by_query(spec):
        every = some  # queries that it hides are hidden without it
    first, count, clear_from, clear_to = (ranges[:, None, :, i, None] for i in range(4))
    if by_batch(spec):
        rows = spec.rows("mask").row(jnp.arange(spec.batch, dtype=jnp.int32))
        rows = jnp.broadcast_to(rows, (spec.batch,))
        some, every = some[rows], every[rows]
    block = jnp.arange(blocks, dtype=jnp.int32).reshape(1, 1, 1, blocks)
    visit = block - first
    inside = (visit >= 0) & (visit < count)
    clear = inside & some & every & (visit >= clear_from) & (visit < clear_to)
    mixed = inside & ~clear & (True if tiles.once else some)
    flags = [_of_group(spec, jnp.broadcast_to(x, clear.shape)) for x in (mixed, clear)]
    return in_order(*flags, from_right=False)


def _of_group(spec: AttentionSpec, flags: Array) -> Array:
    """(rows, N or 1, tiles, blocks) as (rows, K or 1, tiles, G blocks)."""
    rows, heads, tiles, blocks = flags.shape
    own = (1, 1) if heads == 1 else (spec.kv_heads, spec.group)
    flags = jnp.swapaxes(flags.reshape(rows, *own, tiles, blocks), 2, 3)
    flags = jnp.broadcast_to(flags, (rows, own[0], tiles, spec.group, blocks))
    return flags.reshape(rows, own[0], tiles, -1)


def list_of(spec: AttentionSpec, refs: Ref, batch: Array, kv_head: Array, tile: Array) -> Ref:
    """A tile's list, (2 + visits,)."""
    row = batch if by_batch(spec) else spec.rows("mask").row(batch)
    return refs.key_lists.at[row, 0 if refs.key_lists.shape[1] == 1 else kv_head, tile]


def scratch(spec: AttentionSpec, tiles: BackwardTiles) -> dict[str, Any]:
    """Shared memory, in the ring of queries."""
    if spec.mask_shape is None or _by_query(spec):
        return {}
    count = 1 if spec.mask_shape[2] == 1 else tiles.queries // BITS
    return {"w_smem": plgpu.SMEM((tiles.stages, count, tiles.keys), jnp.int32)}


def words_at(
    spec: AttentionSpec,
    tiles: BackwardTiles,
    refs: Ref,
    batch: Array,
    head: Array,
    tile: Array,
    block: Array,
) -> Ref:
    """A tile's words of a block of queries of a head."""
    words, count = refs.turned_words, refs.w_smem.shape[1]
    row = spec.rows("mask").row(batch)
    own_head = 0 if words.shape[1] == 1 else head
    first = 0 if words.shape[2] == 1 else block * count
    return words.at[row, own_head, pl.ds(first, count), pl.ds(tile * tiles.keys, tiles.keys)]


def seen_by(seam: Seam, refs: Ref, own: Array | int, slot: Array, shape: tuple[int, ...]) -> Array:
    """Whether each of 64 keys, from `own` of the tile's on, is seen by a query: (64, queries)."""
    query = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
    mine = pl.ds(own, ROWS)
    count = refs.w_smem.shape[1]
    words = [seam.load(refs.w_smem.at[slot, i, mine], ROW) for i in range(count)]
    return seen(words, query & 6, query & ~6)
