"""A head dim as blocks of power-of-two widths: 128; 96 = 64 + 32; 72 = 64 + 16, half of it empty.

    S = sum over parts of Q_p K_pᵀ          O_p = P V_p

Two parts at most: what the second wastes is less than its padding to one block would.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.portable.elements import both
from pallas_kernels.portable.triton import Mask, Ref, load, product, store

__all__ = ["Matrix", "Part", "against", "parts", "read", "times", "write", "zeros"]

LEAST = 16  # columns of a product's operand

type Matrix = tuple[Array, ...]  # (rows, width) of each part


class Part(NamedTuple):
    """`width` columns from `start`, the first `used` of which exist."""

    start: int
    width: int
    used: int


def parts(size: int) -> tuple[Part, ...]:
    """The parts of a head dim."""
    whole = max(_power(size), LEAST)
    half = whole // 2
    rest = max(_power(size - half), LEAST)
    if half < LEAST or half + rest >= whole:
        return (Part(0, whole, size),)
    return Part(0, half, half), Part(half, rest, size - half)


def read(ref: Ref, size: int, batch: Array, row: Array, head: Array, inside: Mask) -> Matrix:
    """Rows of an array (B, rows, heads, size), zeros where they do not exist.

    row: (rows, 1); head: a scalar, or shaped as `row`; inside: shaped as `row`.
    """

    def one(part: Part) -> Array:
        column, exists = _columns(part)
        return load(ref, (batch, row, head, column), both(inside, exists))

    return tuple(map(one, parts(size)))


def write(
    ref: Ref,
    size: int,
    before: tuple[Array, ...],
    row: Array,
    head: Array,
    x: Matrix,
    inside: Mask,
) -> None:
    """Writes rows of an array (..., rows, heads, size), as `read` reads them."""
    for part, value in zip(parts(size), x, strict=True):
        column, exists = _columns(part)
        store(ref, (*before, row, head, column), value, both(inside, exists))


def zeros(rows: int, size: int) -> Matrix:
    """Sums before anything is added, in float32."""
    return tuple(jnp.zeros((rows, part.width), jnp.float32) for part in parts(size))


def against(a: Matrix, b: Matrix, precision: str | None) -> Array:
    """A Bᵀ, summed over the parts of both."""
    total = None
    for x, y in zip(a, b, strict=True):
        term = product(x, y.T, precision)
        total = term if total is None else total + term
    assert total is not None
    return total


def times(p: Array, b: Matrix, precision: str | None) -> Matrix:
    """P B, part by part, P rounded to B's dtype."""
    return tuple(product(p.astype(y.dtype), y, precision) for y in b)


def _columns(part: Part) -> tuple[Array, Mask]:
    column = jnp.arange(part.width, dtype=jnp.int32)[None, :]
    exists = None if part.used == part.width else column < part.used
    return part.start + column, exists


def _power(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()
