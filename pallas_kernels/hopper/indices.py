"""Arithmetic on the kernels' indices: int32, never negative, and so in 64-bit mode too.

There a Python integer beside a traced one is an int64 to `jax.lax`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array, lax

__all__ = ["divided", "for_each", "quotient", "remainder"]

type Index = Array | int


def quotient(x: Index, by: Index) -> Array:
    """x / by, rounded down."""
    return lax.div(_int32(x), _int32(by))


def remainder(x: Index, by: Index) -> Array:
    """What x / by leaves."""
    return lax.rem(_int32(x), _int32(by))


def divided(x: Array, by: int) -> tuple[Array, Array]:
    """Quotient and remainder."""
    return (x, x * 0) if by == 1 else (quotient(x, by), remainder(x, by))


def for_each[State](
    start: Index, stop: Index, body: Callable[[Array, State], State], state: State
) -> State:
    """`lax.fori_loop`, which counts as its bounds do."""
    final: State = lax.fori_loop(_int32(start), _int32(stop), body, state)
    return final


def _int32(x: Index) -> Any:
    return np.int32(x) if isinstance(x, int) else x
