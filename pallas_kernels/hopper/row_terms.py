"""D = rowsum(O dO), where a kernel makes it of blocks in shared memory."""

from __future__ import annotations

from math import gcd

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.hopper.seam import Ref, Seam

__all__ = ["row_sums"]

WGMMA = plgpu.Layout.WGMMA
MOST_COLUMNS = 64  # of a tile of the swizzle


def row_sums(seam: Seam, out: list[Ref], d_out: list[Ref]) -> Array:
    """(64,) of a warpgroup's rows, of pieces (64, columns) of both."""
    width = gcd(out[0].shape[-1], MOST_COLUMNS)
    total: Array | None = None
    for x, y in zip(out, d_out, strict=True):
        for first in range(0, x.shape[-1], width):
            own, other = (
                seam.load(ref.at[:, pl.ds(first, width)], WGMMA).astype(jnp.float32)
                for ref in (x, y)
            )
            total = own * other if total is None else total + own * other
    assert total is not None
    return total.sum(axis=1)
