"""Contiguous arrays as zigzag ones and back, by two exchanges of half a device's positions.

Of 2 n parts device i has 2 i and 2 i + 1, and is to have i and 2 n - 1 - i. Of these one is even
and one odd, so that the even parts change places among devices, and the odd ones do:

    part         0 1   2 3   4 5         0 5   1 4   2 3
    device        0     1     2           0     1     2
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jattn.call.context import Axes

__all__ = ["contiguous", "zigzagged"]


def zigzagged(axes: Axes, devices: int, x: Array) -> Array:
    """A device's part of a contiguous (B, T, ...), as that of a zigzag one."""
    even, odd = (
        _sent(axes, part, list(enumerate(_homes(devices, first))))
        for first, part in enumerate(jnp.split(x, 2, axis=1))
    )
    return _chosen(axes, even, odd)


def contiguous(axes: Axes, devices: int, x: Array) -> Array:
    """The reverse."""
    low, high = jnp.split(x, 2, axis=1)
    swapped = jnp.split(_chosen(axes, low, high), 2, axis=1)
    parts = (
        _sent(axes, part, [(to, i) for i, to in enumerate(_homes(devices, first))])
        for first, part in enumerate(swapped)
    )
    return jnp.concatenate(list(parts), axis=1)


def _sent(axes: Axes, x: Array, pairs: list[tuple[int, int]]) -> Array:
    if all(i == to for i, to in pairs):
        return x
    sent: Array = lax.ppermute(x, axes, pairs)
    return sent


def _homes(devices: int, first: int) -> list[int]:
    """Where parts 0, 2, .. or 1, 3, .. are in a zigzag layout."""
    return [min(part, 2 * devices - 1 - part) for part in range(first, 2 * devices, 2)]


def _chosen(axes: Axes, even: Array, odd: Array) -> Array:
    """Both, the first of them first on even devices."""
    is_odd = lax.axis_index(axes) % 2 == 1
    return jnp.concatenate([jnp.where(is_odd, odd, even), jnp.where(is_odd, even, odd)], axis=1)
