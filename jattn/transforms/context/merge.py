"""Outputs of attention over parts of the keys, merged by the parts' log-sum-exp.

    lse = log(exp(lse₁) + exp(lse₂))     out = out₁ exp(lse₁ - lse) + out₂ exp(lse₂ - lse)

In float32, whatever a kernel's output is (Dao, "FlashAttention-2", 2023, section 2.3.1). A
log-sum-exp is top unit + rest (`transforms.derivatives`), and is subtracted by halves.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

__all__ = ["Merged"]


class Merged(NamedTuple):
    """What queries made of the keys so far: output (B, T, N, D), and two numbers (B, T, N)."""

    out: Array
    top: Array
    rest: Array

    @staticmethod
    def of_nothing(rows: tuple[int, ...], value_dim: int, dtype: jnp.dtype) -> Merged:
        """Of no key at all."""
        zeros = jnp.zeros(rows, dtype)
        return Merged(jnp.zeros((*rows, value_dim), dtype), zeros - jnp.inf, zeros)

    def and_of(self, other: Merged, unit: float) -> Merged:
        """That of the keys of both, which have none in common."""
        top = jnp.maximum(self.top, other.top)
        shift = jnp.where(top == -jnp.inf, 0, top)
        mine = (self.top - shift) * unit + self.rest
        its = (other.top - shift) * unit + other.rest
        rest = jnp.where(top == -jnp.inf, 0, jnp.logaddexp(mine, its))
        out = _times(self.out, jnp.exp(mine - rest)) + _times(other.out, jnp.exp(its - rest))
        return Merged(out, top, rest)

    def beside(self, above: Array) -> Array:
        """The output where a sink joins each row's softmax, `above` the row's maximum (B, T, N)."""
        faded = _times(self.out, jnp.exp(self.rest - jnp.logaddexp(self.rest, above)))
        return jnp.where((self.top == -jnp.inf)[..., None], 0, faded)


def _times(out: Array, weight: Array) -> Array:
    """A weight of 0 leaves nothing, whatever is there."""
    weight = weight[..., None]
    return jnp.where(weight == 0, 0, out.astype(weight.dtype) * weight)
