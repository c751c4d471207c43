"""Outputs of attention over parts of the keys, and tangents, merged by the parts' log-sum-exp.

    lse = log(exp(lse₁) + exp(lse₂))     w = exp(lse₁ - lse), exp(lse₂ - lse)
    out = w₁ out₁ + w₂ out₂
    tlse = w₁ tlse₁ + w₂ tlse₂
    tout = w₁ tout₁ + w₂ tout₂ + w₁ w₂ (tlse₁ - tlse₂) (out₁ - out₂)

In float32, whatever a kernel's output is (Dao, "FlashAttention-2", 2023, section 2.3.1). A
log-sum-exp is top unit + rest (`transforms.derivatives`), and is subtracted by halves. What the
tangents of both parts' logits have in common is nowhere in `tout`, so that nothing cancels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

__all__ = ["Merged", "Moved"]


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
        return self._with(other, unit)[0]

    def _with(self, other: Merged, unit: float) -> tuple[Merged, Array, Array]:
        """And the weights of both."""
        top = jnp.maximum(self.top, other.top)
        shift = jnp.where(top == -jnp.inf, 0, top)
        mine = (self.top - shift) * unit + self.rest
        its = (other.top - shift) * unit + other.rest
        rest = jnp.where(top == -jnp.inf, 0, jnp.logaddexp(mine, its))
        weights = jnp.exp(mine - rest), jnp.exp(its - rest)
        out = _times(self.out, weights[0]) + _times(other.out, weights[1])
        return Merged(out, top, rest), *weights

    def beside(self, above: Array) -> Array:
        """The output where a sink joins each row's softmax, `above` the row's maximum (B, T, N)."""
        faded = _times(self.out, jnp.exp(self.rest - jnp.logaddexp(self.rest, above)))
        return jnp.where((self.top == -jnp.inf)[..., None], 0, faded)


class Moved(NamedTuple):
    """The same with tangents: of the output, (B, T, N, D), and the log-sum-exp, (B, T, N)."""

    merged: Merged
    t_out: Array
    t_lse: Array

    @staticmethod
    def of_nothing(rows: tuple[int, ...], value_dim: int, dtype: jnp.dtype) -> Moved:
        """Of no key at all."""
        merged = Merged.of_nothing(rows, value_dim, dtype)
        return Moved(merged, jnp.zeros_like(merged.out), jnp.zeros_like(merged.rest))

    def and_of(self, other: Moved, unit: float) -> Moved:
        """That of the keys of both."""
        merged, mine, its = self.merged._with(other.merged, unit)
        apart = mine * its * (self.t_lse - other.t_lse)
        between = _times(self.merged.out, apart) - _times(other.merged.out, apart)
        t_out = _times(self.t_out, mine) + _times(other.t_out, its) + between
        return Moved(merged, t_out, mine * self.t_lse + its * other.t_lse)

    def beside(self, top: Array, rest: Array, of_sinks: Array | None, unit: float) -> Moved:
        """Where a sink joins each row's softmax, whose log-sum-exp is then in `top` and `rest`.

        of_sinks: the sinks' weights by their tangents, (B, T, N); None if none moves.
        """
        out, own_top, own_rest = self.merged
        sees_none = own_top == -jnp.inf
        below = jnp.where(sees_none, 0, own_top - top) * unit + (own_rest - rest)
        weight = jnp.where(sees_none, 0, jnp.exp(below))
        moved = (1 - weight) * self.t_lse - (0 if of_sinks is None else of_sinks)
        t_out = _times(self.t_out, weight) + _times(out, weight * moved)
        t_lse = weight * self.t_lse + (0 if of_sinks is None else of_sinks)
        return Moved(Merged(_times(out, weight), top, rest), t_out, t_lse)


def _times(out: Array, weight: Array) -> Array:
    """A weight of 0 leaves nothing, whatever is there."""
    weight = weight[..., None]
    return jnp.where(weight == 0, 0, out.astype(weight.dtype) * weight)
