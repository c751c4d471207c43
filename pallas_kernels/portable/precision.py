"""How products are made of float32 on tensor cores: of terms in bfloat16.

A float32 is the sum of three bfloat16s, each what the ones before leave, rounded:

    x = x0 + x1 + x2        24 bits = 8 + 8 + 8
    x y = x0 y0 + (x0 y1 + x1 y0) + (x0 y2 + x1 y1 + x2 y0) + ..

Six products keep what float32 does, as what is left out is below 2^-24 of the result. Where float32
may be rounded to TF32, with its 11 bits, two terms and three products keep 16 (Henry, Tang and
Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
Computations", 2019, section III).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array, lax

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["factor", "term_count", "terms"]

# jax's names of it, in small letters; any other lets float32 be rounded to TF32.
_FULL = ("highest", "float32", "f32_f32_f32", "bf16_bf16_f32_x6", "bf16_bf16_f32_x9")


def term_count(spec: AttentionSpec) -> int:
    """Of each operand of a product; 1 of floats of two bytes, which are their only term."""
    if spec.dtype.name != "float32":
        return 1
    return 3 if spec.precision is None or spec.precision.lower() in _FULL else 2


def factor(spec: AttentionSpec, x: Array) -> Array:
    """A whole array as products take it: its terms in a first axis, if it has several."""
    count = term_count(spec)
    return x if count == 1 else jnp.stack(terms(x, count))


def terms(x: Array, count: int, *, any_size: bool = True) -> tuple[Array, ...]:
    """Several of bfloat16 whose sum is x, float32, to the bits that they have.

    any_size: x may hold numbers next to the largest, whose terms are finite too; infinities, which
      are themselves and zeros; and NaN, which are NaN. Costs something for each number: weights
      have none of these.
    """
    found = []
    for _ in range(count - 1):
        term = _rounded(x, any_size=any_size)
        found.append(term)
        rest = x - term
        x = jnp.where(jnp.abs(term) == jnp.inf, jnp.zeros_like(x), rest) if any_size else rest
    return tuple(term.astype(jnp.bfloat16) for term in (*found, x))


def _rounded(x: Array, *, any_size: bool) -> Array:
    """To the eight bits of bfloat16, as float32: a conversion there and back XLA may leave out."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    up = bits + jnp.uint32(0x8000)
    if any_size:
        to_infinity = (bits & jnp.uint32(0x7FFF8000)) == jnp.uint32(0x7F7F8000)
        up = jnp.where(to_infinity, bits, up)
    return lax.bitcast_convert_type(up & jnp.uint32(0xFFFF0000), jnp.float32)
