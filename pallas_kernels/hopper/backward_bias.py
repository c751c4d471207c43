"""A bias in the Hopper backward kernel of dK and dV, where keys are rows and queries columns.

    x = scale K Qᵀ + biasᵀ      Pᵀ = exp(x - lse)

As in forward (`bias.py`) logits are natural, and what comes of the bias depends on what it has
along queries and keys: beside each block of queries a tile of it, read as it lies and turned on its
way to registers; a number for each key of one head; or one more number for each query, beside its
log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.hopper.backward_block import ROW, ROW_BIAS, WGMMA, Block
from pallas_kernels.hopper.backward_tiles import BackwardTiles
from pallas_kernels.hopper.bias import vectors, whole
from pallas_kernels.hopper.bias_form import form_of, has_ring
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.seam import Ref, transforms
from pallas_kernels.hopper.softmax import LN2, across
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands

__all__ = ["added", "arrays", "copies", "row_vector", "scratch"]


def arrays(spec: AttentionSpec, operands: Operands, tiles: BackwardTiles) -> dict[str, Array]:
    """What comes beside blocks of queries: whole, or of columns (rows, N or 1, tiles * keys)."""
    form, bias = form_of(spec), operands.bias
    if bias is None or form == "rows":
        return {}
    return {"bias": whole(spec, bias) if form == "whole" else vectors(bias, tiles.keys)}


def row_vector(spec: AttentionSpec, operands: Operands) -> Array | None:
    """(B, N, T) float32, the bias of each query where all its keys have the same."""
    if form_of(spec) != "rows":
        return None
    assert operands.bias is not None
    row = spec.rows("bias").row(jnp.arange(spec.batch, dtype=jnp.int32))
    own = operands.bias[..., 0].astype(jnp.float32)[row]
    return jnp.broadcast_to(own, (spec.batch, spec.heads, spec.queries))


def scratch(spec: AttentionSpec, tiles: BackwardTiles) -> dict[str, Any]:
    """Shared memory, in the ring of queries."""
    form = form_of(spec)
    if form == "whole":
        assert spec.bias_dtype is not None
        how = transforms(padded_width(spec.keys), spec.bias_dtype)
        shape = (tiles.stages, tiles.queries, tiles.keys)
        return {"b_smem": plgpu.SMEM(shape, spec.bias_dtype, transforms=how)}
    if form == "columns":
        return {"b_smem": plgpu.SMEM((tiles.stages, tiles.keys), jnp.float32)}
    return {}


def copies(block: Block, copy: Callable[[Ref, Ref], None], head: Array, at: Array) -> None:
    """What the block of queries `at` of a head needs."""
    spec, tiles, refs = block.spec, block.tiles, block.refs
    if not has_ring(spec):
        return
    row = spec.rows("bias").row(block.batch)
    own_head = head if refs.bias.shape[1] > 1 else 0
    keys = pl.ds(block.tile * tiles.keys, tiles.keys)
    if form_of(spec) == "columns":
        copy(refs.bias.at[row, own_head, keys], refs.b_smem)
        return
    queries = pl.ds(at * tiles.queries, tiles.queries)
    copy(refs.bias.at[row, own_head, queries, keys], refs.b_smem)


def added(block: Block, warpgroup: Array | int, slot: Array, x: Array, c: float) -> Array:
    """The natural logits (64, queries); x c are those in base 2, without the bias."""
    form, seam, refs = form_of(block.spec), block.seam, block.refs
    factor = c * LN2
    x = x if factor == 1.0 else x * factor
    if form == "rows":
        return x + block.row(refs.rows_smem.at[slot, ROW_BIAS])
    mine = pl.ds(warpgroup * ROWS, ROWS)
    if form == "columns":
        return x + across(seam.load(refs.b_smem.at[slot, mine], ROW), x.shape[1])
    return x + seam.widened(seam.load(refs.b_smem.at[slot, :, mine].T, WGMMA))
