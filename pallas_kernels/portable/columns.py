"""A head dim as blocks of power-of-two widths: 128; 96 = 64 + 32; 72 = 64 + 16, half of it empty.

    S = sum over parts of Q_p K_pᵀ          O_p = P V_p

Two parts at most: what the second wastes is less than its padding to one block would.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.portable.elements import both
from pallas_kernels.portable.precision import terms
from pallas_kernels.portable.triton import Factor, Mask, Ref, load, product, store

__all__ = ["Matrix", "Part", "Sums", "against", "parts", "plus", "read", "times", "write", "zeros"]

LEAST = 16  # columns of a product's operand

type Matrix = tuple[Factor, ...]  # (rows, width) of each part
type Sums = tuple[Array, ...]  # the same in float32


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

    ref: the array, or its terms, (terms, B, rows, heads, size); row: (rows, 1); head: a scalar, or
      shaped as `row`; inside: shaped as `row`.
    """

    def one(part: Part) -> Factor:
        column, exists = _columns(part)
        index, mask = (batch, row, head, column), both(inside, exists)
        if len(ref.shape) == len(index):
            return (load(ref, index, mask),)
        return tuple(load(ref, (term, *index), mask) for term in range(ref.shape[0]))

    return tuple(map(one, parts(size)))


def write(
    ref: Ref,
    size: int,
    before: tuple[Array, ...],
    row: Array,
    head: Array,
    x: Sums,
    inside: Mask,
) -> None:
    """Writes rows of an array (..., rows, heads, size), as `read` reads them."""
    for part, value in zip(parts(size), x, strict=True):
        column, exists = _columns(part)
        store(ref, (*before, row, head, column), value, both(inside, exists))


def zeros(rows: int, size: int) -> Sums:
    """Sums before anything is added, in float32."""
    return tuple(jnp.zeros((rows, part.width), jnp.float32) for part in parts(size))


def plus(a: Sums, b: Sums) -> Sums:
    """A + B, part by part."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def against(a: Matrix, b: Matrix) -> Array:
    """A Bᵀ, summed over the parts of both."""
    total = None
    for x, y in zip(a, b, strict=True):
        one = product(x, tuple(term.T for term in y))
        total = one if total is None else total + one
    assert total is not None
    return total


def times(p: Array, b: Matrix) -> Sums:
    """P B, part by part, P as B is: rounded to its dtype, or in terms."""
    count = len(b[0])
    factor = terms(p, count, any_size=False) if count > 1 else (p.astype(b[0][0].dtype),)
    return tuple(product(factor, y) for y in b)


def _columns(part: Part) -> tuple[Array, Mask]:
    column = jnp.arange(part.width, dtype=jnp.int32)[None, :]
    exists = None if part.used == part.width else column < part.used
    return part.start + column, exists


def _power(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()
