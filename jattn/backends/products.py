"""The matrix products of a tile: rows of all heads of a group against their one key head.

Letters: r batch rows, K key heads, G heads of a group, q queries, s keys, h a head dim.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jattn.call.spec import AttentionSpec

__all__ = ["against_keys", "over_rows", "times_keys"]


def against_keys(spec: AttentionSpec, rows: Array, key: Array) -> Array:
    """(r, K, G, q, h) x (r, K, s, h) -> (r, K, G, q, s): Q Kᵀ and dO Vᵀ."""
    return _product("rkmh,rksh->rkms", spec, rows, key)


def times_keys(spec: AttentionSpec, weights: Array, key: Array) -> Array:
    """(r, K, G, q, s) x (r, K, s, h) -> (r, K, G, q, h): P V and dS K."""
    return _product("rkms,rksh->rkmh", spec, weights, key)


def over_rows(spec: AttentionSpec, rows: Array, weights: Array) -> Array:
    """(r, K, G, q, h) x (r, K, G, q, s) -> (r, K, h, s): Qᵀ dS and dOᵀ P, summed over the group."""
    r, k, g, q, s = weights.shape
    rows, weights = rows.reshape(r, k, g * q, -1), weights.reshape(r, k, g * q, s)
    return _einsum("rkmh,rkms->rkhs", spec, rows, weights)


def _product(equation: str, spec: AttentionSpec, rows: Array, key: Array) -> Array:
    """A product over the rows of a tile, all heads of a group against their one key head."""
    r, k, g, q, last = rows.shape
    out = _einsum(equation, spec, rows.reshape(r, k, g * q, last), key)
    return out.reshape(r, k, g, q, out.shape[-1])


def _einsum(equation: str, spec: AttentionSpec, a: Array, b: Array) -> Array:
    """A product summed in the accumulator, of operands in the call's dtype.

    On a CPU, which has no units for floats of two bytes, of operands in the accumulator: XLA there
    converts them, or refuses (it depends on their strides and batch axes); and nothing is rounded.
    """

    def of(dtype: np.dtype[np.generic], a: Array, b: Array) -> Array:
        return jnp.einsum(
            equation, a.astype(dtype), b.astype(dtype),
            preferred_element_type=spec.accumulator, precision=spec.precision,
        )  # fmt: skip

    if spec.dtype == spec.accumulator:
        return of(spec.dtype, a, b)
    product: Array = lax.platform_dependent(
        a, b, cpu=partial(of, spec.accumulator), default=partial(of, spec.dtype)
    )
    return product
