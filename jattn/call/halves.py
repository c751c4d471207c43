"""Queries, keys and values of which one half of the positions is a device's own, among other heads.

Of two devices that share a sequence by heads the other sends its half of a piece's heads. The own
half is where it always was, in arrays of all heads, and need not be put beside what came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

if TYPE_CHECKING:
    from jattn.call.spec import Operands

__all__ = ["Halves", "joined"]


class Halves(NamedTuple):
    """Beside operands whose query, key and value (B, T / 2, heads, ...) are what came.

    query, key, value: the own half, (B, T / 2, all heads, ...).
    second: (1,) int32, 1 if the own half is the second.
    heads: (4,) int32, a constant: the first query head is second times its first number and its
      second, and the first key head likewise by the other two.
    """

    query: Array
    key: Array
    value: Array
    second: Array
    heads: Array


def joined(operands: Operands) -> Operands:
    """The operands whole, with no halves."""
    own = operands.halves
    if own is None:
        return operands
    found = {}
    second = own.second[0]
    for name, i in (("query", 0), ("key", 2), ("value", 2)):
        come = getattr(operands, name)
        x = getattr(own, name)
        mine = lax.dynamic_slice_in_dim(
            x, second * own.heads[i] + own.heads[i + 1], come.shape[2], axis=2
        )
        both = jnp.concatenate([mine, come, mine], axis=1)
        start = second * come.shape[1]
        found[name] = lax.dynamic_slice_in_dim(both, start, 2 * come.shape[1], axis=1)
    return operands._replace(**found, halves=None)
