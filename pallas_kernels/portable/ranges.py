"""Which blocks a tile visits, as the kernels read them: O(tiles) integers, made by XLA before.

A row of a table is (first, clear_first, clear_stop, stop): blocks [first, stop) are visited, and of
them [clear_first, clear_stop) need no element mask.

    block     first                                         stop-1
              mask     mask   |  clear    clear    clear  | mask
                              clear_first                 clear_stop

Where no block is clear, all count as left of the clear ones, if a call may mask on the left at all.
Segments are compared by range, block against block, which is exact for sorted ("packed") ids and
safe for any others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array

from jattn.call.masking import KeyIntervals
from pallas_kernels import blocks

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands

__all__ = ["Sides", "key_ranges", "key_sides", "query_ranges", "query_sides"]


class Sides(NamedTuple):
    """On which sides of the clear blocks a tile may visit blocks that need an element mask."""

    left: bool
    right: bool


def key_sides(spec: AttentionSpec, keys: int) -> Sides:
    """Of blocks of keys."""
    ends = spec.band.upper is not None or spec.has_key_lengths or spec.keys % keys != 0
    return Sides(spec.band.lower is not None or spec.has_segments, ends or spec.has_segments)


def query_sides(spec: AttentionSpec, queries: int) -> Sides:
    """Of blocks of queries."""
    ends = spec.band.lower is not None or spec.has_query_lengths or spec.queries % queries != 0
    return Sides(spec.band.upper is not None or spec.has_segments, ends or spec.has_segments)


def key_ranges(
    spec: AttentionSpec, operands: Operands, *, queries: int, keys: int, splits: int = 1
) -> Array:
    """(B or 1, tiles * splits, 4) int32: the blocks of `keys` keys of each tile of `queries`.

    splits: shares into which each tile's blocks are cut, as rows one after another.
    """
    intervals = KeyIntervals.of_batch(spec, operands, 1)
    start = jnp.arange(-(-spec.queries // queries), dtype=jnp.int32)[None] * queries
    stop = jnp.minimum(start + queries, spec.queries)
    visited = blocks.key_blocks(intervals, start, stop, keys)
    # Rows past the query lengths are no matter: what is computed of them is not used.
    intervals = replace(intervals, query_length=spec.queries)
    clear = blocks.unmasked_key_blocks(intervals, start, stop, keys)
    sizes = queries, keys
    ids = operands.query_segments, operands.key_segments
    left = key_sides(spec, keys).left
    return _split(_table(visited, clear, start, sizes, ids, left=left), splits, left=left)


def query_ranges(spec: AttentionSpec, operands: Operands, *, queries: int, keys: int) -> Array:
    """(B or 1, tiles, 4) int32: the blocks of `queries` queries of each tile of `keys` keys."""
    intervals = KeyIntervals.of_batch(spec, operands, 1)
    start = jnp.arange(-(-spec.keys // keys), dtype=jnp.int32)[None] * keys
    stop = jnp.minimum(start + keys, spec.keys)
    visited = blocks.query_blocks(intervals, start, stop, queries)
    # Keys past the lengths are no matter: what is computed of them is not used.
    intervals = replace(intervals, key_length=spec.keys)
    clear = blocks.unmasked_query_blocks(intervals, start, stop, queries)
    sizes = keys, queries
    ids = operands.key_segments, operands.query_segments
    left = query_sides(spec, queries).left
    return _table(visited, clear, start, sizes, ids, left=left)


def _table(
    visited: blocks.Range,
    clear: blocks.Range,
    start: Array,
    sizes: tuple[int, int],
    ids: tuple[Array | None, Array | None],
    *,
    left: bool,
) -> Array:
    """The rows of tiles whose own size and whose blocks' size, and ids, are given."""
    ends = (jnp.asarray(x, jnp.int32) for x in (*visited, *clear))
    first, stop, clear_first, clear_stop, _ = jnp.broadcast_arrays(*ends, start)
    own, its = ids
    if own is not None and its is not None:
        own_least, own_most = _extremes(own, sizes[0])
        least, most = _extremes(its, sizes[1])
        own_least, own_most = own_least[..., None], own_most[..., None]
        least, most = least[:, None], most[:, None]
        count = least.shape[2]
        meets = (most >= own_least) & (least <= own_most)
        first = jnp.maximum(first, blocks.first_true(meets))
        stop = jnp.minimum(stop, count - blocks.first_true(meets[..., ::-1]))
        stop = jnp.where(meets.any(axis=2), stop, first)
        one = (least == own_least) & (most == own_least) & (own_most == own_least)
        block = jnp.arange(count, dtype=jnp.int32)[None, None]
        one &= (block >= clear_first[..., None]) & (block < clear_stop[..., None])
        clear_first, clear_stop = blocks.first_run(one)
    return _in_order(first, clear_first, clear_stop, stop, left=left)


def _in_order(
    first: Array, clear_first: Array, clear_stop: Array, stop: Array, *, left: bool
) -> Array:
    """Rows that never decrease."""
    stop = jnp.maximum(stop, first)
    clear_first, clear_stop = (jnp.clip(x, first, stop) for x in (clear_first, clear_stop))
    none = clear_first >= clear_stop
    clear_first = jnp.where(none, stop if left else first, clear_first)
    clear_stop = jnp.where(none, clear_first, clear_stop)
    return jnp.stack([first, clear_first, clear_stop, stop], axis=-1).astype(jnp.int32)


def _split(table: Array, splits: int, *, left: bool) -> Array:
    if splits == 1:
        return table
    first, clear_first, clear_stop, stop = jnp.split(table, 4, axis=2)
    share = -(-(stop - first) // splits)
    own_first = jnp.minimum(first + jnp.arange(splits, dtype=jnp.int32)[None, None] * share, stop)
    own_stop = jnp.minimum(own_first + share, stop)
    rows = _in_order(own_first, clear_first, clear_stop, own_stop, left=left)
    return rows.reshape(table.shape[0], -1, 4)


def _extremes(ids: Array, size: int) -> tuple[Array, Array]:
    """The least and greatest id of each block."""
    grouped = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % size)), mode="edge")
    grouped = grouped.reshape(ids.shape[0], -1, size)
    return grouped.min(axis=2), grouped.max(axis=2)
