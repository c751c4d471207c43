"""What a call has of each row of its logits, one number each, and what is made of them in `jnp`.

The log-sum-exp is kept as two numbers, top unit + rest: the row's maximum in the kernels' unit, and
the logarithm of the sum of exponentials beside it. A float32 beside 1e9 has steps of 64: in one
number the sum would be lost, and all weights of a row be wrong by one factor.

Outside `jax.jit` the results of what is jitted are what `jax_debug_infs` looks at. They are finite,
but for the log-sum-exp of a row that sees no key where the caller asks for it: such a row's -inf
and 0 are kept as 0 and a number that no sum has.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jattn.call.spec import AttentionSpec

__all__ = [
    "kept",
    "log_sum_exp",
    "of_heads",
    "row_term",
    "sink_weights",
    "unkept",
    "with_sinks",
]


def kept(top: Array, rest: Array) -> tuple[Array, Array]:
    """The two numbers as they are handed on and saved: finite."""
    sees_none = top == -jnp.inf
    return jnp.where(sees_none, 0, top), jnp.where(sees_none, _none(rest), rest)


def unkept(top: Array, rest: Array) -> tuple[Array, Array]:
    """What `kept` was given."""
    sees_none = rest == _none(rest)
    return jnp.where(sees_none, -jnp.inf, top), jnp.where(sees_none, 0, rest)


def _none(rest: Array) -> float:
    """The logarithm of no sum."""
    return float(np.finfo(rest.dtype).min)


@partial(jax.jit, static_argnums=(0, 1))
def log_sum_exp(unit: float, spec: AttentionSpec, top: Array, rest: Array) -> Array:
    """Natural; of a row that sees no key -inf, or where nobody asks for it 0."""
    lse = top * unit + rest
    return jnp.where(rest == _none(rest), -jnp.inf if spec.wants_residual else 0, lse)


def with_sinks(sinks: Array, top: Array, rest: Array, unit: float) -> tuple[Array, Array]:
    """The two numbers of keys, joined by the sinks; those of a row that sees no key as they are.

    The maximum is then that of both: beside keys that a finite bias hides, a sink would be lost in
    a sum of -1e9 and 1e9. One that is infinite, or would be in the kernels' unit, is the sum alone.
    """
    sink = of_heads(sinks, top) / unit
    joined = (top > -jnp.inf) & (sink < jnp.inf)
    higher = jnp.where(joined, jnp.maximum(top, sink), top)
    faded = rest + jnp.where(joined, top - higher, 0) * unit
    return higher, jnp.logaddexp(faded, above(sinks, higher, unit))


def above(sinks: Array, top: Array, unit: float) -> Array:
    """The sinks, (N,) or of each batch row (B, N), less the rows' maxima (B, T, N)."""
    return of_heads(sinks, top) - _finite(top) * unit


def of_heads(sinks: Array, rows: Array) -> Array:
    """Sinks or their tangents, (N,) or (B, N), beside rows (B, T, N)."""
    return sinks.astype(rows.dtype).reshape(-1, 1, rows.shape[2])


def sink_weights(sinks: Array, top: Array, rest: Array, unit: float) -> Array:
    """The sinks' shares of each row's sum, (B, T, N), and 0 of a row that sees no key."""
    own = above(sinks, top, unit)
    # An infinite sink is all of its rows' sums.
    weights = jnp.exp(jnp.where(own == rest, 0, jnp.minimum(own - rest, 0)))
    return jnp.where(top == -jnp.inf, 0, weights)


def _finite(top: Array) -> Array:
    """The maxima with 0 for a row that sees no key; NaN stays NaN."""
    return jnp.where(top == -jnp.inf, 0, top)


def row_term(top: Array, out: Array, d_out: Array, d_lse: ArrayLike = 0) -> Array:
    """D = rowsum(O dO) - dlse, (B, T, N), and 0 of a row that sees no key."""
    products = out.astype(top.dtype) * d_out.astype(top.dtype)
    # A kernel of its own: XLA would make the sums within a transposition that comes after, an
    # element at a time.
    sums = lax.optimization_barrier(products.sum(axis=-1))
    return jnp.where(top == -jnp.inf, 0, sums - d_lse)
