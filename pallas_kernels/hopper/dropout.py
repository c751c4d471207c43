"""Dropout in the kernels: the mask of `jattn.call.dropout`, made again in registers by each.

A thread of wgmma's accumulator holds the keys of a pair, 8 apart, whether keys lie across or down
the tile, and makes their hash once: see `jattn.call.dropout`. Where queries lie down, their two
words are made by the thread block; where they lie across, as backward's, a thread would make those
of many queries, and XLA makes them before (`words_by_block`).

    out    O   = (P M) V f          f = 1 / (1 - rate), M the mask
    back   dV  = (P M)ᵀ dO f        dS = f (P M dO Vᵀ - P D / f)

The factor f is applied where a gradient or an output is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jattn.call import dropout
from pallas_kernels.hopper.masks import WGMMA, Warpgroup
from pallas_kernels.hopper.seam import Ref, Seam

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands
    from pallas_kernels.hopper.plan import Plan, Work

__all__ = [
    "Words",
    "dropout_inputs",
    "dropped",
    "kept",
    "kept_factor",
    "marked",
    "words_by_block",
    "words_head",
    "words_of_rows",
]


class Words(NamedTuple):
    """What the mask needs of a query, uint32: (64,) where queries lie down, else (64, queries)."""

    first: Array
    second: Array

    def matrix(self, shape: tuple[int, ...]) -> Words:
        """The same, repeated along the keys."""
        if self.first.ndim == 2:
            return self
        return Words(*(lax.broadcast_in_dim(x, shape, [0]) for x in self))


def kept_factor(spec: AttentionSpec) -> float:
    """What is kept counts for what is dropped."""
    return 1 / (1 - spec.dropout_rate)


def dropout_inputs(spec: AttentionSpec, operands: Operands) -> dict[str, Array]:
    """The arrays that kernels whose queries lie down need: seeds (B, 2), and where counts start."""
    if spec.dropout_rate == 0:
        return {}
    assert operands.dropout_seeds is not None
    inputs = {"dropout_seeds": operands.dropout_seeds}
    if operands.dropout_start is not None:
        inputs["dropout_start"] = operands.dropout_start
    return inputs


def words_by_block(spec: AttentionSpec, operands: Operands, *, blocks: int, queries: int) -> Array:
    """(B, N or 1, blocks, 2, queries) uint32: the words of blocks of queries, copied together."""
    assert operands.dropout_seeds is not None
    seeds = operands.dropout_seeds[:, :, None, None, None, None]
    head = jnp.arange(1 if spec.broadcast_dropout else spec.heads, dtype=jnp.int32)
    query = jnp.arange(blocks * queries, dtype=jnp.int32).reshape(blocks, 1, queries)
    if operands.dropout_start is not None:
        query = query + operands.dropout_start[0]
    first, second = dropout.row_words(
        (seeds[:, 0], seeds[:, 1]), head[None, :, None, None, None], query[None, None]
    )
    which = lax.broadcasted_iota(jnp.int32, (1, 1, 1, 2, queries), 3)
    return jnp.where(which == 0, first, second)


def words_of_rows(
    plan: Plan, seam: Seam, refs: Ref, work: Work, warpgroup: Warpgroup
) -> Words | None:
    """Those of the 64 queries of a warpgroup's rows, where the call has dropout."""
    spec = plan.spec
    if spec.dropout_rate == 0:
        return None
    row = warpgroup.rows(seam)
    query, head = work.query + row, work.head
    if plan.pack > 1:
        query = work.query + (row & (plan.queries - 1))
        shift = plan.queries.bit_length() - 1
        head = work.head + lax.shift_right_logical(row, jnp.full_like(row, shift))
    if spec.broadcast_dropout:
        head = jnp.zeros_like(head)
    if spec.dropout_from != "zero":
        query = query + refs.dropout_start[0]
    seeds = refs.dropout_seeds[work.batch, 0], refs.dropout_seeds[work.batch, 1]
    return Words(*dropout.row_words(seeds, head, query))


def words_head(spec: AttentionSpec, head: Array) -> Array | int:
    """Where a head's words are in `words_by_block`."""
    return 0 if spec.broadcast_dropout else head


def dropped(
    spec: AttentionSpec, seam: Seam, refs: Ref, words: Words, first_key: Array, p: Array
) -> Array:
    """p, a tile (64, keys), with zeros where dropout drops; what is kept is not scaled.

    first_key: the tile's first, a multiple of 16.
    """
    bits = _bits(spec, refs, words, first_key, p.shape, axis=1)
    return seam.zero_below(p, bits, dropout.limit(spec.dropout_rate))


def marked(
    spec: AttentionSpec, refs: Ref, words: Words, first_key: Array, p: Array, *, axis: int
) -> Array:
    """p, no element of it negative, with a negative sign where dropout drops.

    A tile (64, keys), or (64, queries) if keys lie along axis 0.
    """
    bits = _bits(spec, refs, words, first_key, p.shape, axis=axis)
    return jnp.where(bits < jnp.uint32(dropout.limit(spec.dropout_rate)), -p, p)


def _bits(
    spec: AttentionSpec,
    refs: Ref,
    words: Words,
    first_key: Array,
    shape: tuple[int, ...],
    *,
    axis: int,
) -> Array:
    key = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA)
    if spec.dropout_from != "zero":
        first_key = first_key + refs.dropout_start[1]
    if spec.dropout_from == "anywhere":
        pair, is_second = dropout.pairs(key + first_key)
    else:
        # Within the tile, so that the compiler sees which elements of a thread share a hash.
        pair, is_second = dropout.pairs(key)
        pair = pair + first_key
    return dropout.element_bits(words.matrix(shape), pair, is_second)


def kept(p: Array) -> Array:
    """What `marked` leaves as it is, and zeros."""
    return jnp.maximum(p, 0.0)
