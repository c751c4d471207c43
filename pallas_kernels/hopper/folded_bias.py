"""A bias's columns (.., 1, S) in the Hopper forward kernel, where their numbers are small.

    Q Kᵀ + 1 (hi, mid, lo, 0, ..)ᵀ = Q Kᵀ + bias / scale      hi + mid + lo = bias / scale

They are 16 more columns of the keys, in bfloat16, for which all queries have ones, so that the
softmax is that of a call without a bias. Matrix units cut sums and do not round them, by 2^-23 of
the largest number or so. Where that is too much, or one is no number, they are added after Q Kᵀ by
another copy of the code (`bias.py`): keys that -1e9 hides are all alike there.

    f_smem  (stages, keys, 16)      k_full[slot], k_free[slot]
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper import bias
from pallas_kernels.hopper.bias_form import FOLDED
from pallas_kernels.hopper.indices import remainder
from pallas_kernels.hopper.seam import Ref, Seam, matrix
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from pallas_kernels.hopper.plan import Plan, Work

__all__ = ["arrays", "drain", "is_folded", "load_block", "multiply", "scratch"]

LARGEST = 8192.0  # three cuts of it are 0.003


def arrays(plan: Plan, columns: Array) -> dict[str, Array]:
    """Columns (rows, N or 1, S) as keys', (rows, N or 1, S, 16); and whether one is too large."""
    scale = plan.spec.scale
    assert scale is not None
    parts, rest = [], columns / scale
    for _ in range(3):
        # XLA would leave out a rounding to fewer bits and back.
        parts.append(lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest = rest - parts[-1]
    parts += [jnp.zeros_like(columns)] * (FOLDED - len(parts))
    small = jnp.all(jnp.abs(columns) <= LARGEST)  # not if one is NaN
    return {
        "folded": jnp.stack(parts, axis=-1).astype(jnp.bfloat16),
        "too_large": jnp.where(small, 0, 1).astype(jnp.int32).reshape(1),
    }


def scratch(plan: Plan) -> dict[str, Any]:
    """Shared memory."""
    return {"f_smem": matrix(jnp.bfloat16, plan.tiles.stages, plan.tiles.keys, FOLDED)}


def is_folded(refs: Ref) -> Array:
    """Whether the numbers are small."""
    found: Array = refs.too_large[0] == 0
    return found


def load_block(plan: Plan, refs: Ref, work: Work, block: Array | int, count: Array) -> None:
    """What a block of keys has of them, on its way to the keys' slot; if large, to the bias's."""
    slot = remainder(count, plan.tiles.stages)
    row, heads = plan.spec.rows("bias").row(work.batch), refs.folded.shape[1]
    own = refs.folded.at[
        row, work.head if heads > 1 else 0, pl.ds(block * plan.tiles.keys, plan.tiles.keys)
    ]
    plgpu.copy_gmem_to_smem(own, refs.f_smem.at[slot], refs.k_full.at[slot])
    after = partial(bias.load_block, plan, refs, work, block, count)
    pl.when(jnp.logical_not(is_folded(refs)))(after)


def drain(plan: Plan, refs: Ref) -> None:
    """The loader's: all readers are done."""
    pl.when(jnp.logical_not(is_folded(refs)))(partial(bias.drain, plan, refs))


def multiply(seam: Seam, refs: Ref, s_acc: Ref, slot: Array) -> None:
    """S += bias / scale, started. After Q Kᵀ, that what the sum cuts is least."""
    ones = seam.layout(jnp.ones((ROWS, FOLDED), jnp.bfloat16), plgpu.Layout.WGMMA)
    seam.matmul_into(s_acc, ones, refs.f_smem.at[slot].T)
