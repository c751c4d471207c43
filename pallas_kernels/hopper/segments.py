"""Segment ids as the kernel wants them: by query tile, and the blocks of keys each tile visits.

Ids are compared by range, block against block, which is exact for sorted ("packed") ids and safe
for any others. All of it is O(T + S + tiles x blocks) integers, made by XLA before the kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

from jattn.call.masking import KeyIntervals
from pallas_kernels import blocks
from pallas_kernels.hopper.visits import edge_padded

if TYPE_CHECKING:
    from jattn.call.spec import Operands
    from pallas_kernels.hopper.plan import Plan

__all__ = ["segment_arrays", "segment_ranges"]


def segment_arrays(plan: Plan, operands: Operands) -> dict[str, Array]:
    """query_segments (B, tiles * rows), key_segments (B, blocks * keys) and ranges (B, tiles, 4).

    A range holds the first and stop of the visited blocks of keys, and of those of them that need
    no element mask.
    """
    spec = plan.spec
    query_ids, key_ids = operands.query_segments, operands.key_segments
    assert query_ids is not None
    assert key_ids is not None
    own = _by_tile(plan, query_ids)
    rows = jnp.tile(own, (1, 1, plan.pack)).reshape(spec.batch, -1)
    return {
        "query_segments": rows,
        "key_segments": edge_padded(key_ids, -(-spec.keys // plan.tiles.keys) * plan.tiles.keys),
        "ranges": segment_ranges(plan, operands),
    }


def _by_tile(plan: Plan, query_ids: Array) -> Array:
    own = edge_padded(query_ids, plan.queries * plan.query_tiles)
    return own.reshape(plan.spec.batch, plan.query_tiles, plan.queries)


def segment_ranges(plan: Plan, operands: Operands) -> Array:
    """(B, tiles, 4) int32: see `segment_arrays`."""
    assert operands.query_segments is not None
    own = _by_tile(plan, operands.query_segments)
    spec, size = plan.spec, plan.tiles.keys
    intervals = KeyIntervals.of_batch(spec, operands, 1)
    start = jnp.arange(plan.query_tiles, dtype=jnp.int32)[None] * plan.queries
    stop = jnp.minimum(start + plan.queries, spec.queries)
    shape = (spec.batch, plan.query_tiles)
    first, stop_block = _pair(blocks.key_blocks(intervals, start, stop, size), shape)
    clear_first, clear_stop = _pair(blocks.unmasked_key_blocks(intervals, start, stop, size), shape)

    count = -(-spec.keys // size)
    its = edge_padded(operands.key_segments, count * size).reshape(spec.batch, 1, count, size)
    its_least, its_most = its.min(axis=3), its.max(axis=3)
    least, most = own.min(axis=2, keepdims=True), own.max(axis=2, keepdims=True)
    meets = (its_most >= least) & (its_least <= most)
    one = (its_least == least) & (its_most == least) & (most == least)
    first = jnp.maximum(first, blocks.first_true(meets))
    stop_block = jnp.minimum(stop_block, count - blocks.first_true(meets[..., ::-1]))
    stop_block = jnp.where(meets.any(axis=2), stop_block, first)
    block = jnp.arange(count, dtype=jnp.int32)[None, None]
    inside = one & (block >= clear_first[..., None]) & (block < clear_stop[..., None])
    run = blocks.first_run(inside)
    return jnp.stack([first, stop_block, *run], axis=2).astype(jnp.int32)


def _pair(values: tuple[Array | int, Array | int], shape: tuple[int, int]) -> tuple[Array, Array]:
    first, stop = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), shape) for x in values)
    return first, stop
