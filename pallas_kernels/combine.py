"""Joins the parts of a call whose keys were split between programs or thread blocks.

lse = log sum_i exp lse_i        O = sum_i exp(lse_i - lse) O_i
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["combine"]


def combine(
    spec: AttentionSpec, out: Array, lse: Array, sinks: Array | None
) -> tuple[Array, Array]:
    """Output (B, T, N, D) and log-sum-exp (B, T, N).

    Args:
      spec: the call.
      out: (splits, B, T, N, D) float32, each part's own output.
      lse: (splits, B, N, T) float32, each part's own log-sum-exp.
      sinks: (B or 1, N) float32 or None.
    """
    lse = jnp.swapaxes(lse, 2, 3)
    top = lse.max(axis=0)
    none = top == -jnp.inf
    if sinks is not None:
        top = jnp.maximum(top, sinks[:, None])
    top = jnp.where(none, 0, top)
    weights = jnp.exp(lse - top)
    total = weights.sum(axis=0)
    if sinks is not None:
        total = total + jnp.exp(sinks[:, None] - top)
    total = jnp.where(none, 1, total)
    weights = weights / total
    joined = jnp.sum(out * weights[..., None], axis=0)
    return joined.astype(spec.dtype), jnp.where(none, -jnp.inf, top + jnp.log(total))
