"""Sizes that `jax.export` leaves free: expressions where others are ints, of no known order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["as_index", "is_known", "smaller"]


def is_known(*sizes: int) -> bool:
    """Whether all are numbers."""
    return all(isinstance(size, int) for size in sizes)


def smaller(a: int, b: int) -> int:
    """The smaller of two sizes, itself one that an array may have."""
    least: Any = min(a, b) if is_known(a, b) else jax.core.min_dim(a, b)
    found: int = least
    return found


def as_index(size: int) -> int | Array:
    """A size for arithmetic with positions: an array where it is not known when traced."""
    return size if is_known(size) else jnp.asarray(size)
