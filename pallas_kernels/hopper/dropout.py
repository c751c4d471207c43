"""Dropout in the kernels: the mask of `jattn.call.dropout`, made again in registers by each.

An element's bits are a word of its query by one of its key, and another of its query: see
`jattn.call.dropout`. Where queries lie down, their two words are made by the thread block; where
they lie across, as backward's, a thread would make those of many queries, and XLA makes them before
(`words_by_block`), as it does those of keys. These come with each block of keys where keys lie
across, in a ring with slots of its own, else once for a tile.

    dropout_keys  (slots, keys)      keys_full[slot], keys_free[slot]

    out    O   = (P M) V f          f = 1 / (1 - rate), M the mask
    back   dV  = (P M)ᵀ dO f        dS = f (P M dO Vᵀ - P D / f)

The factor f is applied where a gradient or an output is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jattn.call import dropout
from pallas_kernels.hopper.indices import remainder
from pallas_kernels.hopper.masks import WGMMA, Warpgroup
from pallas_kernels.hopper.seam import Ref, Seam, ring
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands
    from pallas_kernels.hopper.plan import Plan, Work

__all__ = [
    "BESIDE",
    "SLOTS",
    "Words",
    "decides_first",
    "drain",
    "dropout_inputs",
    "dropped",
    "drops_early",
    "kept",
    "kept_across",
    "kept_down",
    "kept_factor",
    "key_words",
    "load_block",
    "marked",
    "mask",
    "scratch",
    "start",
    "words_by_block",
    "words_head",
    "words_of_rows",
]


SLOTS = 2  # blocks of keys whose words are in flight
BESIDE = 3  # where they are among the vectors of rows, in a kernel that has them there
LOWEST_HALF, SIGN = 0xFC00, 0x8000  # bits of float16: -inf, and the sign


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


def key_words(spec: AttentionSpec, operands: Operands, size: int) -> Array:
    """Those of all keys, in whole tiles of this size."""
    key = jnp.arange(-(-spec.keys // size) * size, dtype=jnp.int32)
    if operands.dropout_start is not None:
        key = key + operands.dropout_start[1]
    return dropout.key_words(key)


def dropout_inputs(
    plan: Plan, operands: Operands, *, beside_rows: bool = False
) -> dict[str, Array]:
    """What kernels whose queries lie down need: seeds (B, 2), where counts start, keys' words.

    beside_rows: as `scratch` takes it.
    """
    spec = plan.spec
    if spec.dropout_rate == 0:
        return {}
    assert operands.dropout_seeds is not None
    inputs = {"dropout_seeds": operands.dropout_seeds}
    words = key_words(spec, operands, plan.tiles.keys)
    if beside_rows:
        words = lax.bitcast_convert_type(words, jnp.float32)
    inputs["dropout_words"] = words
    if operands.dropout_start is not None:
        inputs["dropout_start"] = operands.dropout_start
    return inputs


def scratch(plan: Plan, *, beside_rows: bool = False) -> dict[str, Any]:
    """Shared memory and barriers of a kernel whose queries lie down.

    beside_rows: slots are `rows_smem[slot, BESIDE]`, float32 of the same bits, not a kilobyte more.
    """
    if plan.spec.dropout_rate == 0:
        return {}
    found = {
        "keys_full": ring(SLOTS, 1),
        "keys_free": ring(SLOTS, plan.tiles.warpgroups),
    }
    if not beside_rows:
        found["dropout_keys"] = plgpu.SMEM((SLOTS, plan.tiles.keys), jnp.uint32)
    return found


def _keys_smem(refs: Ref, slot: Array) -> Ref:
    own = vars(refs).get("dropout_keys")
    return refs.rows_smem.at[slot, BESIDE] if own is None else own.at[slot]


def start(plan: Plan, refs: Ref) -> None:
    """A reader's: all slots are free."""
    if plan.spec.dropout_rate > 0:
        for slot in range(SLOTS):
            plgpu.barrier_arrive(refs.keys_free.at[slot])


def drain(plan: Plan, refs: Ref) -> None:
    """The loader's: all readers are done."""
    if plan.spec.dropout_rate > 0:
        for slot in range(SLOTS):
            plgpu.barrier_wait(refs.keys_free.at[slot])


def load_block(plan: Plan, refs: Ref, block: Array | int, count: Array) -> None:
    """The words of a block of keys, on their way to the slot of its number."""
    if plan.spec.dropout_rate == 0:
        return
    slot = remainder(count, SLOTS)
    keys = pl.ds(block * plan.tiles.keys, plan.tiles.keys)
    plgpu.barrier_wait(refs.keys_free.at[slot])
    own = refs.dropout_words.at[keys]
    plgpu.copy_gmem_to_smem(own, _keys_smem(refs, slot), refs.keys_full.at[slot])


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


def dropped(plan: Plan, seam: Seam, refs: Ref, words: Words, count: Array, p: Array) -> Array:
    """p, a tile (64, keys), rounded, with zeros where dropout drops; what is kept is not scaled.

    count: the number of its block of keys.
    """
    first, dtype = _in_halves(plan.spec), plan.spec.dtype
    if first is None:
        bits = _across(plan, seam, refs, words, count, p.shape)
        return seam.zero_below(p, bits, dropout.limit(plan.spec.dropout_rate)).astype(dtype)
    return seam.masked(p.astype(dtype), mask(plan, seam, refs, words, count))


def decides_first(plan: Plan) -> bool:
    """Whether the mask is made while the product of a block's logits runs.

    Wide heads' products leave time for it, and what stands between S and P V is what they wait for.
    """
    return _is_wide(plan.spec) and _in_halves(plan.spec) is not None


def drops_early(plan: Plan) -> bool:
    """Whether forward drops before P V of the block before has ended, one element at a time.

    As wide heads do where two elements cannot be decided at once.
    """
    return _is_wide(plan.spec) and _in_halves(plan.spec) is None


def _is_wide(spec: AttentionSpec) -> bool:
    return max(spec.head_dim, spec.value_dim) > 128


def _in_halves(spec: AttentionSpec) -> int | None:
    """What the bits' upper halves are moved up to, so that two elements are decided at once.

    Then what is to be dropped are the lowest numbers of float16 that there are; None if these are
    too few.
    """
    count = dropout.limit(spec.dropout_rate) >> 16
    return None if count > LOWEST_HALF - SIGN else LOWEST_HALF + 1 - count


def mask(plan: Plan, seam: Seam, refs: Ref, words: Words, count: Array) -> Array:
    """For `Seam.masked`, of the block of keys with this number: what is kept, in two bytes each."""
    first = _in_halves(plan.spec)
    assert first is not None
    moved = Words(words.first, words.second + jnp.uint32(first << 16))
    bits = _across(plan, seam, refs, moved, count, (ROWS, plan.tiles.keys))
    return seam.mask_of(bits, first, plan.spec.dtype)


def kept_across(plan: Plan, seam: Seam, refs: Ref, words: Words, count: Array, p: Array) -> Array:
    """The same, float32."""
    bits = _across(plan, seam, refs, words, count, p.shape)
    return seam.zero_below(p, bits, dropout.limit(plan.spec.dropout_rate))


def kept_down(spec: AttentionSpec, seam: Seam, words: Words, key_words: Array, p: Array) -> Array:
    """p (64, queries), float32, with zeros where dropout drops.

    key_words: (64, queries), those of its keys, which lie down.
    """
    bits = dropout.element_bits(words, key_words)
    return seam.zero_below(p, bits, dropout.limit(spec.dropout_rate))


def marked(spec: AttentionSpec, words: Words, key_words: Array, p: Array) -> Array:
    """p as `kept_down` takes it, none of it negative, with a negative sign where dropout drops."""
    bits = dropout.element_bits(words, key_words)
    return jnp.where(bits < jnp.uint32(dropout.limit(spec.dropout_rate)), -p, p)


def _across(
    plan: Plan, seam: Seam, refs: Ref, words: Words, count: Array, shape: tuple[int, ...]
) -> Array:
    """The bits of a tile whose keys lie across, of the block with this number."""
    slot = remainder(count, SLOTS)
    plgpu.barrier_wait(refs.keys_full.at[slot])
    own = seam.load(_keys_smem(refs, slot), WGMMA.reduce(0))
    if own.dtype != jnp.uint32:
        own = lax.bitcast_convert_type(own, jnp.uint32)
    bits = dropout.element_bits(words.matrix(shape), lax.broadcast_in_dim(own, shape, [1]))
    plgpu.barrier_arrive(refs.keys_free.at[slot])
    return bits


def kept(p: Array) -> Array:
    """What `marked` leaves as it is, and zeros."""
    return jnp.maximum(p, 0.0)
