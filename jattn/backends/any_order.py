"""Attention that JAX differentiates by itself, to any order and in either mode, in linear memory.

A scan over chunks of queries, each the formula on its rows and all keys, which is made again
wherever a derivative asks for it: what is kept is O(T + S), whatever the order. It visits what is
hidden too; `query_tangents` has the first and second derivatives that do not.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jattn.backends import eager
from jattn.call.band import Band
from jattn.call.sizes import is_known, smaller
from jattn.call.spec import AttentionSpec, Operands

__all__ = ["attend"]

_LOGITS = 2**21  # of a chunk, for all heads and batch rows
_LEAST = 8  # queries of a chunk


def attend(spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
    """Output (B, T, N, D) and log-sum-exp (B, T, N), natural, -inf of a row that sees no key."""
    size = _chunk(spec)
    count = -(-spec.queries // size)
    by_query = {
        name: _cut(x, axis, size, count)
        for name, axis in (("query", 1), ("query_segments", 1), ("bias", 2), ("mask", 2))
        if (x := getattr(operands, name)) is not None and x.shape[axis] == spec.queries > 1
    }

    @jax.checkpoint
    def rows(operands: Operands, start: Array, cut: dict[str, Array]) -> tuple[Array, Array]:
        part, own = _part(spec, operands._replace(**cut), start, size)
        found: tuple[Array, Array] = eager.attend(part, own)
        return found

    def step(_: None, xs: tuple[Array, dict[str, Array]]) -> tuple[None, tuple[Array, Array]]:
        return None, rows(operands, *xs)

    starts = jnp.arange(count, dtype=jnp.int32) * size
    _, (out, lse) = lax.scan(step, None, (starts, by_query))
    return _joined(out, spec.queries), _joined(lse, spec.queries)


def _chunk(spec: AttentionSpec) -> int:
    """How many queries a chunk has."""
    sizes = (spec.batch, spec.keys)
    logits = math.prod(sizes) * spec.heads if is_known(*sizes) else _LOGITS
    size: int = smaller(max(_LEAST, _LOGITS // max(logits, 1)), spec.queries)
    return size


def _cut(x: Array, axis: int, size: int, count: int) -> Array:
    """x with its axis of queries in chunks, (count, ..., size, ...); zeros fill the last one."""
    width = [(0, 0)] * x.ndim
    width[axis] = (0, count * size - x.shape[axis])
    x = jnp.pad(x, width)
    x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _joined(x: Array, queries: int) -> Array:
    """(count, B, size, ...) as (B, T, ...)."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :queries]


def _part(
    spec: AttentionSpec, operands: Operands, start: Array, size: int
) -> tuple[AttentionSpec, Operands]:
    """The call of `size` queries from `start` on."""
    own: dict[str, Any] = {name: _of_batch(spec, operands, name) for name in ("bias", "mask")}
    if operands.query_lengths is not None:
        own["query_lengths"] = operands.query_lengths - start
    if spec.band != Band():
        offset = operands.query_offset
        own["query_offset"] = (
            jnp.broadcast_to(start, (spec.batch,)) if offset is None else offset + start
        )
    if operands.dropout_seeds is not None:
        first = jnp.stack([start, jnp.zeros_like(start)])
        before = operands.dropout_start
        own["dropout_start"] = first if before is None else before + first
    shapes: dict[str, Any] = {
        f"{name}_shape": own[name].shape for name in ("bias", "mask") if own[name] is not None
    }
    part = replace(
        spec, queries=size, mapped_rows=(), wants_residual=True,
        has_query_offset="query_offset" in own or spec.has_query_offset, **shapes,
    )  # fmt: skip
    return part, operands._replace(**own)


def _of_batch(spec: AttentionSpec, operands: Operands, name: str) -> Array | None:
    """A bias or mask with one row, or with a row for each of the batch."""
    x: Array | None = getattr(operands, name)
    if x is None or not spec.rows(name).is_mixed:
        return x
    rows = spec.rows(name).row(jnp.arange(spec.batch, dtype=jnp.int32))
    return jnp.take(x, rows, axis=0)
