"""A case's arguments as shapes, to trace and to compile a call of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tests.cases import Case

__all__ = ["Shapes", "arguments"]

Shapes = dict[str, jax.ShapeDtypeStruct]


def arguments(case: Case) -> tuple[Shapes, Shapes, dict[str, Any]]:
    """Floating arrays, other arrays, and what is static, of jattn's functions."""
    b, t, s, dtype = case.batch, case.queries, case.keys, jnp.dtype(case.dtype)
    value_dim = case.value_dim or case.head_dim
    floats = {
        "query": jax.ShapeDtypeStruct((b, t, case.heads, case.head_dim), dtype),
        "key": jax.ShapeDtypeStruct((b, s, case.kv_heads, case.head_dim), dtype),
        "value": jax.ShapeDtypeStruct((b, s, case.kv_heads, value_dim), dtype),
    }
    if case.bias:
        bias_dtype = jnp.dtype(case.bias_dtype or case.dtype)
        floats["bias"] = jax.ShapeDtypeStruct(case.shape_of(case.bias), bias_dtype)
    if case.sinks:
        floats["sinks"] = jax.ShapeDtypeStruct((case.heads,), dtype)
    rest = {}
    if case.query_lengths:
        rest["query_seq_lengths"] = jax.ShapeDtypeStruct((b,), jnp.int32)
    if case.key_lengths:
        rest["key_value_seq_lengths"] = jax.ShapeDtypeStruct((b,), jnp.int32)
    if isinstance(case.offset, tuple):
        rest["query_offset"] = jax.ShapeDtypeStruct((b,), jnp.int32)
    if case.segments:
        rest["query_segment_ids"] = jax.ShapeDtypeStruct((b, t), jnp.int32)
        rest["key_value_segment_ids"] = jax.ShapeDtypeStruct((b, s), jnp.int32)
    dropout = {"dropout_rate": case.dropout, "broadcast_dropout": case.shared_dropout}
    if case.mask:
        rest["mask"] = jax.ShapeDtypeStruct(case.shape_of(case.mask), jnp.bool_)
    if case.dropout:
        rest["dropout_rng"] = jax.ShapeDtypeStruct((2,), jnp.uint32)
    static = {
        **dropout,
        "scale": case.scale,
        "is_causal": case.causal,
        "causal_alignment": case.alignment,
        "local_window_size": case.window,
        "logits_soft_cap": case.soft_cap,
        **({"query_offset": case.offset} if isinstance(case.offset, int) else {}),
    }
    return floats, rest, static
