"""An additive bias in the Hopper forward kernel: how it is laid out, fetched and added.

    x = scale Q Kᵀ + bias      with a soft cap, x = cap tanh(scale Q Kᵀ / cap) + bias

What it has along queries and keys decides how it comes; it is never expanded over an axis that it
is broadcast along:

    (.., T, S)  whole     a tile of queries by keys beside each block of keys
    (.., 1, S)  columns   a vector beside each block of keys
    (.., T, 1)  rows      a vector beside the queries (and (.., 1, 1) as one of equal numbers)

Shared memory, with the barriers that guard it, of a ring with slots of its own:

    b_smem  (slots, W 64, keys), or (slots, keys)      b_full[slot], b_free[slot]
    q_bias  (W, 64)                                    q_full, as the queries

Logits are natural here, not multiplied by the scale afterwards: `finfo.min` has no room for a
factor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.bias_form import form_of, has_ring, padding
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.indices import quotient, remainder
from pallas_kernels.hopper.seam import Ref, Seam, transforms
from pallas_kernels.hopper.softmax import LN2, across
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands
    from pallas_kernels.hopper.plan import Plan, Work

__all__ = [
    "added",
    "bias_arrays",
    "drain",
    "load_block",
    "load_rows",
    "scratch",
    "start",
    "vectors",
    "whole",
]

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)
COLUMN = WGMMA.reduce(0)


def bias_arrays(plan: Plan, operands: Operands) -> dict[str, Array]:
    """The bias in sizes that can be copied: as it is, or padded where it ends within a tile.

    Whole (rows, N or 1, T, S); columns float32 (rows, N or 1, blocks * keys); rows float32
    (rows, packs or 1, tiles * rows).
    """
    spec, bias, form = plan.spec, operands.bias, form_of(plan.spec)
    if bias is None:
        return {}
    if form == "whole":
        return {"bias": whole(spec, bias)}
    if form == "columns":
        return {"bias": vectors(bias, plan.tiles.keys)}
    rows, heads, _, _ = bias.shape
    vector = jnp.broadcast_to(bias[..., 0].astype(jnp.float32), (rows, heads, spec.queries))
    vector = jnp.pad(vector, ((0, 0), (0, 0), (0, plan.queries * plan.query_tiles - spec.queries)))
    packs = max(1, heads // plan.pack)
    vector = vector.reshape(rows, packs, heads // packs, plan.query_tiles, plan.queries)
    shape = (rows, packs, plan.pack, plan.query_tiles, plan.queries)
    vector = jnp.swapaxes(jnp.broadcast_to(vector, shape), 2, 3)
    return {"bias": vector.reshape(rows, packs, -1)}


def whole(spec: AttentionSpec, bias: Array) -> Array:
    """A bias (rows, N or 1, T, S) in sizes that can be copied in tiles."""
    more_t, more_s = padding(spec)
    if (more_t, more_s) == (0, 0):
        return bias
    return jnp.pad(bias, ((0, 0), (0, 0), (0, more_t), (0, more_s)))


def vectors(bias: Array, size: int) -> Array:
    """A bias (rows, N or 1, 1, S) as float32 (rows, N or 1, blocks of this size)."""
    rows, heads, _, s = bias.shape
    vector = bias.reshape(rows, heads, s).astype(jnp.float32)
    return jnp.pad(vector, ((0, 0), (0, 0), (0, -s % size)))


def scratch(plan: Plan) -> dict[str, Any]:
    """Shared memory and barriers."""
    spec, tiles, form = plan.spec, plan.tiles, form_of(plan.spec)
    if form is None:
        return {}
    if form == "rows":
        return {"q_bias": plgpu.SMEM((tiles.warpgroups, ROWS), jnp.float32)}
    stages = tiles.bias_stages
    if form == "columns":
        ring = plgpu.SMEM((stages, tiles.keys), jnp.float32)
    else:
        assert spec.bias_dtype is not None
        columns = padded_width(spec.keys)
        ring = plgpu.SMEM(
            (stages, tiles.warpgroups * ROWS, tiles.keys),
            spec.bias_dtype,
            transforms=transforms(columns, spec.bias_dtype),
        )
    return {
        "b_smem": ring,
        "b_full": plgpu.Barrier(num_arrivals=len(_parts(plan, 0)), num_barriers=stages),
        "b_free": plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=stages),
    }


def _parts(plan: Plan, query: Any) -> list[tuple[Any, Any, int]]:
    """(rows of a tile, queries, head of the pack) of each copy of a block."""
    if plan.pack == 1:
        return [(pl.ds(0, plan.rows), pl.ds(query, plan.rows), 0)]
    # At most a warpgroup's rows, as a copy has at most 256.
    size = min(ROWS, plan.queries)
    return [
        (pl.ds(first, size), pl.ds(query + first % plan.queries, size), first // plan.queries)
        for first in range(0, plan.rows, size)
    ]


def load_block(plan: Plan, refs: Ref, work: Work, block: Array | int, count: Array) -> None:
    """What a block of keys needs of the bias, on its way to the slot of its number."""
    spec, tiles = plan.spec, plan.tiles
    if not has_ring(spec):
        return
    slot = remainder(count, tiles.bias_stages)
    keys = pl.ds(block * tiles.keys, tiles.keys)
    row, full = spec.rows("bias").row(work.batch), refs.b_full.at[slot]
    plgpu.barrier_wait(refs.b_free.at[slot])
    if form_of(spec) == "columns":
        vector = refs.bias.at[row, work.head if refs.bias.shape[1] > 1 else 0, keys]
        plgpu.copy_gmem_to_smem(vector, refs.b_smem.at[slot], full)
        return
    for rows, queries, of_pack in _parts(plan, work.query):
        head = work.head + of_pack if refs.bias.shape[1] > 1 else 0
        plgpu.copy_gmem_to_smem(
            refs.bias.at[row, head, queries, keys], refs.b_smem.at[slot, rows], full
        )


def load_rows(plan: Plan, refs: Ref, work: Work, w: int, full: Ref) -> None:
    """What a warpgroup's queries need of a bias that all keys share."""
    if form_of(plan.spec) != "rows":
        return
    row = plan.spec.rows("bias").row(work.batch)
    pack = quotient(work.head, plan.pack) if refs.bias.shape[1] > 1 else 0
    start = work.tile * plan.rows + w * ROWS
    plgpu.copy_gmem_to_smem(refs.bias.at[row, pack, pl.ds(start, ROWS)], refs.q_bias.at[w], full)


def start(plan: Plan, refs: Ref) -> None:
    """A reader's: all slots are free."""
    if has_ring(plan.spec):
        for slot in range(plan.tiles.bias_stages):
            plgpu.barrier_arrive(refs.b_free.at[slot])


def drain(plan: Plan, refs: Ref) -> None:
    """The loader's: all readers are done."""
    if has_ring(plan.spec):
        for slot in range(plan.tiles.bias_stages):
            plgpu.barrier_wait(refs.b_free.at[slot])


def added(
    plan: Plan,
    seam: Seam,
    refs: Ref,
    number: Array,
    count: Array,
    x: Array,
    c: float,
    *,
    keeps: bool = False,
    widens: bool = False,
) -> Array:
    """The natural logits, x c in base 2 without the bias, of the block with this number.

    keeps: the bias's slot stays the reader's.
    widens: a whole bias becomes float32 as `Seam.widened` does it.
    """
    form, shape = form_of(plan.spec), x.shape
    factor = c * LN2
    x = x if factor == 1.0 else x * factor
    if form == "rows":
        return x + across(seam.layout(refs.q_bias[number], ROW), shape[1])
    slot = remainder(count, plan.tiles.bias_stages)
    plgpu.barrier_wait(refs.b_full.at[slot])
    if form == "columns":
        bias = lax.broadcast_in_dim(seam.load(refs.b_smem.at[slot], COLUMN), shape, [1])
    else:
        own = refs.b_smem.at[slot, pl.ds(number * ROWS, ROWS)]
        bias = seam.load(own, WGMMA)
        bias = seam.widened(bias) if widens else bias.astype(jnp.float32)
    x = x + bias
    if not keeps:
        plgpu.barrier_arrive(refs.b_free.at[slot])
    return x
