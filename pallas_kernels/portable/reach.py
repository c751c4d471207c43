"""Offsets into a mask of more than 2^31 elements.

Pallas' Triton lowering counts an array's offsets with 64 bits if it has more than 2^32 bytes, else
with 32, one of them a sign: too few for what has a byte an element and 2^31 to 2^32 of them. Such a
mask is given more queries, which nothing reads, until it is counted with 64.
"""

from __future__ import annotations

from math import prod

import jax.numpy as jnp
from jax import Array

__all__ = ["copied_bytes", "in_reach"]

SIGNED, UNSIGNED = 1 << 31, 1 << 32


def in_reach(mask: Array | None) -> Array | None:
    """The mask (rows, N or 1, T or 1, S or 1), or a copy with more queries."""
    if mask is None or (more := _missing(mask.shape)) == 0:
        return mask
    return jnp.pad(mask, ((0, 0), (0, 0), (0, more), (0, 0)))


def copied_bytes(shape: tuple[int, ...] | None) -> int:
    """Bytes of that copy; 0 if a mask of this shape is read where it is."""
    if shape is None or (more := _missing(shape)) == 0:
        return 0
    return prod(shape) // shape[2] * (shape[2] + more)


def _missing(shape: tuple[int, ...]) -> int:
    size = prod(shape)
    if not SIGNED <= size <= UNSIGNED:
        return 0
    return UNSIGNED // (size // shape[2]) + 1 - shape[2]
