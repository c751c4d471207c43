"""Sequences permuted so that, cut over devices, each sees as many keys under a causal mask."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

__all__ = ["unzigzag", "zigzag"]


def zigzag(x: ArrayLike, devices: int, *, axis: int = 1) -> Array:
    """The order of `jattn.context_parallel(layout="zigzag")` along an axis of a whole array.

    Of 2 n parts device i of n gets i and 2 n - 1 - i. A model that keeps its tokens so has to know
    where they stand: `zigzag(jnp.arange(length), n, axis=0)` are the positions.

    Args:
      x: an array of the whole sequence, (B, T, ...) or any other.
      devices: n, over which the axis will be cut.
      axis: the sequence's.

    Raises:
      ValueError: the axis's size is not a multiple of 2 n, or n is below 1.

    >>> import jax.numpy as jnp, jattn
    >>> jattn.zigzag(jnp.arange(8), 2, axis=0)
    Array([0, 1, 6, 7, 2, 3, 4, 5], dtype=int32)
    """
    _check_devices(devices)
    return _permuted(x, axis, [p for i in range(devices) for p in (i, 2 * devices - 1 - i)])


def unzigzag(x: ArrayLike, devices: int, *, axis: int = 1) -> Array:
    """The reverse of `zigzag`, whose arguments it takes.

    >>> import jax.numpy as jnp, jattn
    >>> jattn.unzigzag(jattn.zigzag(jnp.arange(8), 2, axis=0), 2, axis=0)
    Array([0, 1, 2, 3, 4, 5, 6, 7], dtype=int32)
    """
    _check_devices(devices)
    low, high = range(0, 2 * devices, 2), range(2 * devices - 1, 0, -2)
    return _permuted(x, axis, [*low, *high])


def _check_devices(devices: int) -> None:
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")


def _permuted(x: ArrayLike, axis: int, order: list[int]) -> Array:
    x = jnp.asarray(x)
    size = x.shape[axis]
    if size % len(order):
        raise ValueError(
            f"a zigzag over {len(order) // 2} devices needs a multiple of {len(order)} positions, "
            f"got {size} along axis {axis}"
        )
    parts = jnp.split(x, len(order), axis=axis)
    return jnp.concatenate([parts[i] for i in order], axis=axis)
