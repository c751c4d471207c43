"""Attention as the formula is written: the reference that all else is held to.

    out = dropout(softmax(soft_cap(Q Kᵀ * scale) + bias)) V

It holds the T x S logits, so its memory is quadratic; it runs only when named. It is plain jnp, so
it has every derivative: forward, reverse, and of any order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jattn.call import dropout, masking
from jattn.call.spec import AttentionSpec, Operands
from jattn.call.target import Target
from jattn.transforms.rematerialisation import named

__all__ = ["attend", "gradient_bytes"]


def attend(spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
    """Output (B, T, N, D) and log-sum-exp (B, T, N)."""
    query, key, value = _without_padding(spec, operands)
    query = query.reshape(spec.batch, spec.queries, spec.kv_heads, spec.group, spec.head_dim)
    logits = jnp.einsum(
        "btkgh,bskh->bkgts", query, key,
        preferred_element_type=spec.accumulator, precision=spec.precision,
    )  # fmt: skip
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

    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    no_maximum = top == -jnp.inf
    sinks = None
    if operands.sinks is not None:
        sinks = operands.sinks.astype(logits.dtype).reshape(1, spec.kv_heads, spec.group, 1, 1)
        top = jnp.maximum(top, jax.lax.stop_gradient(sinks))
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    sees_none = no_maximum & (total == 0)  # a maximum may pass over NaN, a sum does not
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    total = jnp.where(sees_none, 1, total)
    if operands.dropout_seeds is not None:
        kept = _kept(spec, operands.dropout_seeds)
        weights = jnp.where(kept, weights / (1 - spec.dropout_rate), 0)

    out = jnp.einsum(
        "bkgts,bskd->btkgd", weights.astype(spec.dtype), value,
        preferred_element_type=spec.accumulator, precision=spec.precision,
    )  # fmt: skip
    out = (out / jnp.moveaxis(total, 3, 1)).astype(spec.dtype)
    out = out.reshape(spec.batch, spec.queries, spec.heads, spec.value_dim)
    lse = jnp.where(sees_none, -jnp.inf, top + jnp.log(total))[..., 0]
    lse = jnp.moveaxis(lse, -1, 1).reshape(spec.batch, spec.queries, spec.heads)
    return named(out, lse)


def gradient_bytes(spec: AttentionSpec, target: Target) -> int:
    """Bytes of the gradient: about four T x S arrays, weights, logits and their gradients."""
    return 4 * spec.batch * spec.heads * spec.queries * spec.keys * spec.accumulator.itemsize


def _without_padding(spec: AttentionSpec, operands: Operands) -> tuple[Array, Array, Array]:
    """Query, key and value with zeros past the lengths: a weight of 0 does not stop a NaN."""

    def cut(x: Array, lengths: Array | None) -> Array:
        if lengths is None:
            return x
        within = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
        return jnp.where(within[:, :, None, None], x, 0)

    return (
        cut(operands.query, operands.query_lengths),
        cut(operands.key, operands.key_lengths),
        cut(operands.value, operands.key_lengths),
    )


def _kept(spec: AttentionSpec, seeds: Array) -> Array:
    """The dropout mask of the whole call, (B, K, G, T, S)."""
    queries = jnp.arange(spec.queries, dtype=jnp.int32)[None, None, None, :, None]
    keys = jnp.arange(spec.keys, dtype=jnp.int32)[None, None, None, None, :]
    row = seeds[:, :, None, None, None, None]
    return dropout.keep(
        (row[:, 0], row[:, 1]),
        spec.dropout_heads(),
        queries,
        keys,
        spec.dropout_rate,
    )
