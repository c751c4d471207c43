"""The gradient of a bias that batch rows or heads share, and that has queries and keys of its own.

    dbias = sum over batch rows, or heads, or both, of dS

A program has one tile of queries by keys and makes S and dP of each that shares it in turn, so that
the sum is in float32 registers and rounded once, in a fixed order. That is two products more than
the other gradients need; a kernel that made dQ as well would hold it of every batch row at once.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from jattn.call.masking import KeyIntervals, hides_some
from pallas_kernels.portable import columns
from pallas_kernels.portable.elements import Place, both
from pallas_kernels.portable.flash_backward import row_numbers
from pallas_kernels.portable.rows import key_limit, past, query_limit
from pallas_kernels.portable.spans import Span, span
from pallas_kernels.portable.tiles import Tiles
from pallas_kernels.portable.triton import Ref, call, divided, load, place_in, store
from pallas_kernels.portable.weights import dropout_factor, gradients

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["bias_gradient", "summed", "sums_over_shares", "way_of"]


def way_of(spec: AttentionSpec) -> str | None:
    """Where the bias's gradient is summed: over keys, over queries, over what shares it, or not."""
    if spec.d_bias_shape is None:
        return None
    b, n, t, s = spec.d_bias_shape
    if s == 1:
        return "rows"
    if t == 1:
        return "columns"
    return "whole" if (b, n) == (spec.batch, spec.heads) else "shared"


def summed(spec: AttentionSpec, partial: Array) -> Array:
    """(B, N, T, 1) or (B, N, 1, S) summed to the gradient's shape, in the bias's dtype."""
    assert spec.d_bias_shape is not None
    axes = spec.rows("d_bias").axes
    partial = partial.reshape(*(axis.size for axis in axes), *partial.shape[1:])
    shared = tuple(i for i, axis in enumerate(axes) if not axis.own)
    total = jnp.sum(partial, axis=shared).reshape(-1, *partial.shape[len(axes) :])
    pairs = zip(total.shape, spec.d_bias_shape, strict=True)
    narrow = tuple(axis for axis, (whole, own) in enumerate(pairs) if own < whole)
    return jnp.sum(total, axis=narrow, keepdims=True).astype(spec.bias_dtype)


class Addends(Protocol):
    """What one of those that share the bias adds to its gradient's tile, in float32."""

    def __call__(self, refs: SimpleNamespace, at: Place, queries: Span, keys: Span) -> Array: ...


def bias_gradient(
    spec: AttentionSpec, inputs: dict[str, Array], tiles: Tiles, *, interpret: bool
) -> Array:
    """In the gradient's shape, (rows, N or 1, T, S), and the bias's dtype."""

    def addends(refs: SimpleNamespace, at: Place, queries: Span, keys: Span) -> Array:
        kv_head, _ = divided(at.head, spec.group)
        row = (at.batch, queries.down, at.head, queries.exists_down)
        q = columns.read(refs.q, spec.head_dim, *row)
        d_out = columns.read(refs.d_out, spec.value_dim, *row)
        key = (at.batch, keys.down, kv_head, keys.exists_down)
        k = columns.read(refs.k, spec.head_dim, *key)
        v = columns.read(refs.v, spec.value_dim, *key)
        numbers = row_numbers(refs, at.batch, at.head, queries.down, queries.exists_down)
        s = columns.against(q, k)
        dp = columns.against(d_out, v)
        _, dx, _ = gradients(spec, refs, at, numbers, s, dp)
        return dx

    return sums_over_shares(spec, inputs, tiles, addends, name="bias_gradient", interpret=interpret)


def sums_over_shares(
    spec: AttentionSpec,
    inputs: dict[str, Array],
    tiles: Tiles,
    addends: Addends,
    *,
    name: str,
    interpret: bool,
) -> Array:
    """The sum of `addends` over what shares the bias, as `bias_gradient` is."""
    assert spec.d_bias_shape is not None
    assert spec.bias_dtype is not None
    rows, heads, _, _ = spec.d_bias_shape
    names = [*inputs, "d_bias"]

    def kernel(*refs: Ref) -> None:
        named = SimpleNamespace(**dict(zip(names, refs, strict=True)))
        _kernel(spec, tiles, place_in(grid), named, addends)

    grid = (-(-spec.keys // tiles.keys), -(-spec.queries // tiles.queries), rows * heads)
    (d_bias,) = call(
        kernel, [jax.ShapeDtypeStruct(spec.d_bias_shape, spec.bias_dtype)], list(inputs.values()),
        grid=grid, name=name, warps=tiles.warps, stages=tiles.stages, interpret=interpret,
    )  # fmt: skip
    return d_bias


def _kernel(
    spec: AttentionSpec,
    tiles: Tiles,
    place: tuple[Array, ...],
    refs: SimpleNamespace,
    addends: Addends,
) -> None:
    assert spec.d_bias_shape is not None
    rows, heads, _, _ = spec.d_bias_shape
    j, i, owner = place
    own_row, own_head = divided(owner, heads)
    shared_rows, shared_heads = spec.batch // rows, spec.heads // heads
    first_query, first_key = i * tiles.queries, j * tiles.keys

    def step(n: Array, d_bias: Array, *, masked: bool) -> Array:
        next_row, next_head = divided(n, shared_heads)
        batch = spec.rows("d_bias").member(own_row, next_row)
        head = own_head + next_head
        limits = (
            query_limit(spec, refs, batch, tiles.queries),
            key_limit(spec, refs, batch, tiles.keys),
        )
        queries = span(first_query, tiles.queries, limits[0])
        keys = span(first_key, tiles.keys, limits[1])
        at = Place(
            batch,
            head,
            queries.down,
            keys.across,
            first_key,
            queries.exists_down,
            keys.exists_across,
            masked,
        )
        return d_bias + addends(refs, at, queries, keys)

    # Lengths and segments differ by batch row; a band says for all whether the tile is seen.
    band = KeyIntervals(spec.band, spec.queries, spec.keys)
    last_query = jnp.minimum(first_query + tiles.queries, spec.queries) - 1
    last_key = jnp.minimum(first_key + tiles.keys, spec.keys) - 1
    count = shared_rows * shared_heads

    def is_seen(band: KeyIntervals) -> Array:
        return (band.end(last_query) > first_key) & (band.start(first_query) <= last_key)

    visited = is_seen(band)
    clear = (band.start(last_query) <= first_key) & (band.end(first_query) > last_key)
    varies = spec.has_query_lengths or spec.has_key_lengths or spec.has_segments
    d_bias = jnp.zeros((tiles.queries, tiles.keys), jnp.float32)

    def run(condition: Array, d_bias: Array, *, masked: bool) -> Array:
        turns = condition.astype(jnp.int32) * count
        total: Array = lax.fori_loop(
            jnp.int32(0), turns, lambda n, x: step(n, x, masked=masked), d_bias
        )
        return total

    def of_row(r: Array, d_bias: Array) -> Array:
        """All heads of a batch row whose offset says whether the tile is seen."""
        offset = load(refs.query_offset, (spec.rows("d_bias").member(own_row, r),))
        turns = is_seen(replace(band, offset=offset)).astype(jnp.int32) * shared_heads
        total: Array = lax.fori_loop(
            jnp.int32(0), turns, lambda h, x: step(r * shared_heads + h, x, masked=True), d_bias
        )
        return total

    if spec.has_query_offset:
        d_bias = lax.fori_loop(jnp.int32(0), jnp.int32(shared_rows), of_row, d_bias)
    elif varies or spec.keys % tiles.keys:
        d_bias = run(visited, d_bias, masked=True)
    elif hides_some(spec):
        d_bias = run(visited & ~clear, d_bias, masked=True)
        d_bias = run(clear, d_bias, masked=False)
    else:
        d_bias = run(visited, d_bias, masked=False)

    # Those that exist: an element past a length is written too, as the 0 it is.
    queries = span(first_query, tiles.queries, past(spec.queries, tiles.queries))
    keys = span(first_key, tiles.keys, past(spec.keys, tiles.keys))
    inside = both(queries.exists_down, keys.exists_across)
    index = (own_row, own_head, queries.down, keys.across)
    store(refs.d_bias, index, d_bias * dropout_factor(spec), inside)
