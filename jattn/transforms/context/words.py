"""Arrays of 16-bit numbers as words of 32 bits, while they are only moved.

XLA moves a number at a time where it cannot know how they are aligned, and there twice as fast.
Free: a view of the same bytes.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["narrow", "wide"]

WORD = jnp.dtype("uint32")


def wide(x: Array) -> Array:
    """(..., H) of 16 bits as (..., H / 2) words; of 32 bits as words; any other as it is."""
    if x.dtype.itemsize == WORD.itemsize:
        found: Array = lax.bitcast_convert_type(x, WORD)
        return found
    if not _goes_by_two(x):
        return x
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    found = lax.bitcast_convert_type(pairs, WORD)
    return found


def narrow(x: Array, like: Any) -> Array:
    """The array of the dtype of `like`, (..., H), of which `wide` made such words."""
    if x.dtype == like.dtype:
        return x
    found: Array = lax.bitcast_convert_type(x, like.dtype)
    if like.dtype.itemsize < WORD.itemsize:
        found = found.reshape(*found.shape[:-2], 2 * found.shape[-2])
    return found


def _goes_by_two(x: Array) -> bool:
    return x.dtype.itemsize == 2 and x.ndim > 3 and x.shape[-1] % 2 == 0
