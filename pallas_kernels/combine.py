"""Joins the parts of a call whose keys were split between programs or thread blocks.

lse_i = m_i + r_i        m = max_i m_i        l = sum_i exp(m_i - m + r_i)        lse = m + log l
O = sum_i exp(m_i - m + r_i) O_i / (l + exp(sink - m))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["combine"]


def combine(
    spec: AttentionSpec,
    out: Array,
    top: Array,
    rest: Array,
    *,
    unit: float,
    sinks: Array | None,
) -> tuple[Array, Array, Array]:
    """Output (B, T, N, D), and `top` and `rest` (B, T, N) of all parts together, the sink left out.

    Args:
      spec: the call.
      out: (splits, B, T, N, D) float32, each part's own output.
      top: (splits, B, T, N) float32, -inf of a part that sees no key.
      rest: (splits, B, T, N) float32: each part's log-sum-exp is top unit + rest, natural.
      unit: see rest.
      sinks: (B or 1, N) float32 or None.
    """
    highest = top.max(axis=0)
    none = highest == -jnp.inf
    base = jnp.where(none, 0, highest)
    sums = jnp.exp((top - base[None]) * unit + rest)
    keys = jnp.where(none, 1, sums.sum(axis=0))
    total = keys
    if sinks is not None:  # infinite if a sink is far above all keys: what is divided by it is 0
        total = keys + jnp.exp(sinks[:, None] - base * unit)
    joined = jnp.sum(out * (sums / total[None])[..., None], axis=0)
    return joined.astype(spec.dtype), highest, jnp.log(keys)
