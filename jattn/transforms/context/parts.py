"""The part of a call that is a run of queries and a run of keys, as kernels take a call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jattn.call import dropout, positions
from jattn.call.context import Context
from jattn.call.spec import AttentionSpec, Operands
from jattn.transforms.context.runs import Run, Sight

__all__ = ["Keys", "Part", "context_of", "device_index", "kept_heads", "queries_of"]

Keys = dict[str, Array]  # key, value and key_segments where a call has them, of one device or all


@dataclass(frozen=True)
class Part:
    """Two runs, and what the one sees of the other."""

    queries: Run
    keys: Run
    sight: Sight

    def spec(self, spec: AttentionSpec) -> AttentionSpec:
        """Of a device's call, that of this part."""
        whole = context_of(spec)
        shapes: dict[str, Any] = {}
        for name in ("bias", "mask"):
            shape = getattr(spec, f"{name}_shape")
            if shape is not None:
                b, n, t, s = shape
                t, s = self.queries.count if t > 1 else 1, self.keys.count if s > 1 else 1
                shapes[f"{name}_shape"] = (b, n, t, s)
        if spec.dropout_rate > 0:
            shapes["dropout_from"] = "anywhere"
        return replace(
            spec,
            queries=self.queries.count,
            keys=self.keys.count,
            band=self.sight.band,
            has_query_offset=self.sight.needs_start,
            has_query_lengths=spec.has_query_lengths
            or _is_padded(spec.queries, whole.queries, whole),
            has_key_lengths=spec.has_key_lengths or self._has_padding(whole),
            has_sinks=False,
            context=None,
            **shapes,
        )

    def operands(self, spec: AttentionSpec, operands: Operands, keys: Keys) -> Operands:
        """Its arrays. `keys` has the runs' own keys, and what comes before them in their array."""
        part, device, whole = self.spec(spec), device_index(spec), context_of(spec)
        first_query, first_key = self.queries.start(device), self.keys.start(device)
        found: dict[str, Any] = {
            name: queries_of(self.queries, x)
            for name, x in operands._asdict().items()
            if name in ("query", "query_segments") and x is not None
        }
        found |= {name: queries_of(self.keys, x) for name, x in keys.items()}
        for name in ("bias", "mask"):
            x = getattr(operands, name)
            if x is not None:
                found[name] = self.columns(queries_of(self.queries, x, axis=2), first_key, whole)

        def inside(lengths: Array | None, most: int, first: Array, count: int) -> Array:
            if lengths is None:
                lengths = jnp.full(spec.batch, most, jnp.int32)
            return jnp.clip(jnp.minimum(lengths, most) - first, 0, count)

        if part.has_query_lengths:
            sizes = whole.queries, first_query, self.queries.count
            found["query_lengths"] = inside(operands.query_lengths, *sizes)
        if part.has_key_lengths:
            sizes = whole.keys, first_key, self.keys.count
            found["key_lengths"] = inside(operands.key_lengths, *sizes)
        if part.has_query_offset:
            offset = jnp.zeros(spec.batch, jnp.int32)
            offset = offset if operands.query_offset is None else operands.query_offset
            offset = offset + (first_query - first_key)
            found["query_offset"] = positions.kept_near(
                part.band, offset, self.queries.count, self.keys.count
            )
        if operands.dropout_seeds is not None:
            found["dropout_seeds"] = operands.dropout_seeds
            found["dropout_start"] = jnp.stack([first_query, first_key])
        return Operands(**found, scale=operands.scale)

    def columns(self, x: Array, first_key: Array, whole: Context) -> Array:
        """The runs' columns of a bias or mask (b, n, t, S or 1)."""
        if x.shape[3] == 1 or self.keys.count == x.shape[3]:
            return x
        missing = max(self.keys.starts) + self.keys.count - whole.keys
        if missing > 0:
            x = jnp.pad(x, ((0, 0),) * 3 + ((0, missing),))
        return lax.dynamic_slice_in_dim(x, first_key, self.keys.count, axis=3)

    def _has_padding(self, whole: Context) -> bool:
        return max(self.keys.starts) + self.keys.count > whole.keys


def kept_heads(
    spec: AttentionSpec, operands: Operands, first: int, kv_heads: int
) -> tuple[AttentionSpec, Operands]:
    """The call of that many key heads from this one on, and of the query heads that share them."""
    heads = slice(first * spec.group, (first + kv_heads) * spec.group)
    found: dict[str, Any] = {"query": operands.query[:, :, heads]}
    shapes: dict[str, Any] = {}
    for name in ("bias", "mask"):
        x = getattr(operands, name)
        if x is not None:
            found[name] = x if x.shape[1] == 1 else x[:, heads]
            shapes[f"{name}_shape"] = found[name].shape
    if operands.sinks is not None:
        found["sinks"] = operands.sinks[..., heads]
    if operands.dropout_seeds is not None and not spec.broadcast_dropout:
        own = jnp.full((), heads.start, jnp.int32)
        found["dropout_seeds"] = dropout.seeds_from_head(operands.dropout_seeds, own)
    part = replace(spec, heads=kv_heads * spec.group, kv_heads=kv_heads, **shapes)
    return part, operands._replace(**found)


def queries_of(run: Run, x: Array, *, axis: int = 1) -> Array:
    """A run's positions along an axis of a device's array, which may be 1 there for all."""
    if x.shape[axis] in (1, run.count):
        return x
    return lax.slice_in_dim(x, run.first, run.first + run.count, axis=axis)


def context_of(spec: AttentionSpec) -> Context:
    """That of a call which has one."""
    assert spec.context is not None
    return spec.context


def device_index(spec: AttentionSpec) -> Array:
    """Which of the devices this is, int32."""
    index: Array = lax.axis_index(context_of(spec).axes)
    return index


def _is_padded(held: int, of: int, whole: Context) -> bool:
    return held * whole.devices > of
