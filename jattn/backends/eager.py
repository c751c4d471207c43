"""Attention as the formula is written: the reference that all else is held to.

    out = dropout(softmax(soft_cap(Q Kᵀ * scale) + bias)) V

It holds the T x S logits, so its memory is quadratic; it runs only when named. It is plain jnp, so
it has every derivative: forward, reverse, and of any order. All is float32 (float64 for float64
inputs), rounded to the inputs' dtype once, at the end: no weight and no gradient between.

It is one jitted function, so that `jax_debug_infs` does not see the -inf of a hidden logit.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jattn.call import dropout, masking
from jattn.call.spec import AttentionSpec, Operands
from jattn.call.target import Target
from jattn.transforms.rematerialisation import named

__all__ = ["attend", "gradient_bytes"]


@partial(jax.jit, static_argnums=0)
def attend(spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
    """Output (B, T, N, D) and log-sum-exp (B, T, N), 0 where nobody asks for it."""
    query, key, value = (x.astype(spec.accumulator) for x in _without_padding(operands))
    query = query.reshape(spec.batch, spec.queries, spec.kv_heads, spec.group, spec.head_dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", query, key, precision=spec.precision)
    seen = None
    if masking.hides_some(spec):
        seen = spec.grouped(masking.visible(spec, operands))
        # Hidden twice: the scale and the cap's slope at a NaN, by a gradient of 0, would be NaN.
        logits = jnp.where(seen, logits, 0)
    logits = spec.soft_cap(logits * spec.scale_beside(logits, operands))
    if operands.bias is not None:
        logits = logits + spec.grouped(operands.bias.astype(logits.dtype))
    if seen is not None:
        logits = jnp.where(seen, logits, -jnp.inf)

    sinks = None
    if operands.sinks is not None:
        sinks = operands.sinks.astype(logits.dtype).reshape(-1, spec.kv_heads, spec.group, 1, 1)
    weights, _, lse = _softmax(logits, sinks)
    if operands.dropout_seeds is not None:
        kept = _kept(spec, operands.dropout_seeds, operands.dropout_start)
        weights = jnp.where(kept, weights / (1 - spec.dropout_rate), 0)

    out = jnp.einsum("bkgts,bskd->btkgd", weights, value, precision=spec.precision)
    out = out.astype(spec.dtype).reshape(spec.batch, spec.queries, spec.heads, spec.value_dim)
    out = _past_zeroed(out, operands.query_lengths)  # and with it what comes back there
    lse = jnp.moveaxis(lse[..., 0], -1, 1).reshape(spec.batch, spec.queries, spec.heads)
    if not spec.wants_residual:
        lse = jnp.zeros_like(lse)
    return named(out, lse)


type _Softmax = tuple[Array, Array | None, Array]


@jax.custom_jvp
def _softmax(logits: Array, sinks: Array | None) -> _Softmax:
    """Weights of the keys (..., T, S), of the sink (..., T, 1), and log-sum-exp (..., T, 1).

    Its derivative is written in the weights themselves: what a row's gradients have in common then
    cancels to the last bit, however they were rounded.
    """
    top = logits.max(axis=-1, keepdims=True)
    no_maximum = top == -jnp.inf
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    sees_none = no_maximum & (total == 0)  # a maximum may pass over NaN, a sum does not
    sink_weight = None
    if sinks is not None:
        apart = jnp.where(sinks == top, 0, sinks - top)  # also where both are infinite
        sink_weight = jnp.where(sees_none, 0, jnp.exp(apart))
        total = total + sink_weight
    total = jnp.where(sees_none, 1, total)
    lse = jnp.where(sees_none, -jnp.inf, top + jnp.log(total))
    return weights / total, None if sink_weight is None else sink_weight / total, lse


@_softmax.defjvp
def _softmax_jvp(
    primals: tuple[Array, Array | None], tangents: tuple[Array, Array | None]
) -> tuple[_Softmax, _Softmax]:
    found = weights, sink_weight, _ = _softmax(*primals)
    d_logits, d_sinks = tangents

    def weighted(x: Array) -> Array:
        # Chosen, not multiplied, where nothing is seen: a hidden value may be so large that what
        # comes back to its weight is infinite.
        return weights * jnp.where(weights == 0, 0, x)

    d_lse = weighted(d_logits).sum(axis=-1, keepdims=True)
    if sink_weight is None or d_sinks is None:
        return found, (weighted(d_logits - d_lse), None, d_lse)
    d_lse = d_lse + sink_weight * d_sinks
    return found, (weighted(d_logits - d_lse), sink_weight * (d_sinks - d_lse), d_lse)


def gradient_bytes(spec: AttentionSpec, target: Target) -> int:
    """Bytes of the gradient: about four T x S arrays, weights, logits and their gradients."""
    return 4 * spec.batch * spec.heads * spec.queries * spec.keys * spec.accumulator.itemsize


def _without_padding(operands: Operands) -> tuple[Array, Array, Array]:
    """Query, key and value with zeros past the lengths: a weight of 0 does not stop a NaN."""
    return (
        _past_zeroed(operands.query, operands.query_lengths),
        _past_zeroed(operands.key, operands.key_lengths),
        _past_zeroed(operands.value, operands.key_lengths),
    )


def _past_zeroed(x: Array, lengths: Array | None) -> Array:
    return x if lengths is None else masking.past_zeroed(x, lengths)


def _kept(spec: AttentionSpec, seeds: Array, start: Array | None) -> Array:
    """The dropout mask of the whole call, (B, K, G, T, S)."""
    queries = jnp.arange(spec.queries, dtype=jnp.int32)[None, None, None, :, None]
    keys = jnp.arange(spec.keys, dtype=jnp.int32)[None, None, None, None, :]
    if start is not None:
        queries, keys = queries + start[0], keys + start[1]
    row = seeds[:, :, None, None, None, None]
    return dropout.keep(
        (row[:, 0], row[:, 1]),
        spec.dropout_heads(),
        queries,
        keys,
        spec.dropout_rate,
    )
