"""The gradient of a bias that batch rows or heads share, and that has queries and keys of its own.

    dbias = sum over batch rows, or heads, or both, of dS

A program has one tile of queries by keys and makes S and dP of each that shares it in turn, so that
the sum is in float32 registers and rounded once, in a fixed order. That is two products more than
the other gradients need; a kernel that made dQ as well would hold it of every batch row at once.
Where there are few tiles, the rows that share one are several programs', and their sums are added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from jattn.call.masking import KeyIntervals, hides_some
from pallas_kernels.portable import columns
from pallas_kernels.portable.bias_parts import part_count
from pallas_kernels.portable.elements import Place, both
from pallas_kernels.portable.ends import key_limit, past, query_limit
from pallas_kernels.portable.flash_backward import row_numbers
from pallas_kernels.portable.launch import Results, launch
from pallas_kernels.portable.spans import Span, queries_down, span
from pallas_kernels.portable.tiles import Tiles
from pallas_kernels.portable.triton import divided, load, place_in, store
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
    parts = part_count(spec, tiles)
    cut = (-(-spec.keys // tiles.keys), -(-spec.queries // tiles.queries))
    grid = (*cut, parts * rows * heads)

    def kernel(refs: SimpleNamespace, results: Results) -> None:
        _kernel(spec, tiles, parts, place_in(grid), addends, refs, results)

    whole, dtype = (parts * rows, *spec.d_bias_shape[1:]), jnp.float32
    shape = {"d_bias": jax.ShapeDtypeStruct(whole, dtype if parts > 1 else spec.bias_dtype)}
    found = launch(kernel, inputs, shape, grid=grid, tiles=tiles, name=name, interpret=interpret)
    if parts == 1:
        return found["d_bias"]
    apart = found["d_bias"].reshape(parts, *spec.d_bias_shape)
    return jnp.sum(apart, axis=0).astype(spec.bias_dtype)


def _kernel(
    spec: AttentionSpec,
    tiles: Tiles,
    parts: int,
    place: tuple[Array, ...],
    addends: Addends,
    refs: SimpleNamespace,
    results: Results,
) -> None:
    assert spec.d_bias_shape is not None
    j, i, owner = place
    place_row, own_head = divided(owner, spec.d_bias_shape[1])
    part, own_row = divided(place_row, spec.d_bias_shape[0])
    first_query, first_key = i * tiles.queries, j * tiles.keys
    shared = spec.batch // spec.d_bias_shape[0] // parts
    first_row = part * shared
    tile = _Tile(
        spec, tiles, refs, addends, own_row, own_head, first_query, first_key, first_row, shared
    )
    d_bias = tile.sum()
    # Those that exist: an element past a length is written too, as the 0 it is.
    queries = span(first_query, tiles.queries, past(spec.queries, tiles.queries))
    keys = span(first_key, tiles.keys, past(spec.keys, tiles.keys))
    inside = both(queries.exists_down, keys.exists_across)
    index = (place_row, own_head, queries.down, keys.across)
    store(results["d_bias"], index, d_bias * dropout_factor(spec), inside)


@dataclass(frozen=True)
class _Tile:
    """A tile of the gradient, and those that share it: batch rows and heads, from its own on.

    first_row, shared_rows: of the rows that share it, those that are added here.
    """

    spec: AttentionSpec
    tiles: Tiles
    refs: SimpleNamespace
    addends: Addends
    own_row: Array
    own_head: Array
    first_query: Array
    first_key: Array
    first_row: Array
    shared_rows: int

    @property
    def shared_heads(self) -> int:
        assert self.spec.d_bias_shape is not None
        return self.spec.heads // self.spec.d_bias_shape[1]

    def sum(self) -> Array:
        """What all of them add, where a query of the tile may see a key of it."""
        spec, tiles = self.spec, self.tiles
        first_query, first_key = self.first_query, self.first_key
        # Lengths and segments differ by batch row; a band says for all whether the tile is seen.
        band = KeyIntervals(spec.band, spec.queries, spec.keys)
        last_query = jnp.minimum(first_query + tiles.queries, spec.queries) - 1
        last_key = jnp.minimum(first_key + tiles.keys, spec.keys) - 1

        def is_seen(band: KeyIntervals) -> Array:
            return (band.end(last_query) > first_key) & (band.start(first_query) <= last_key)

        visited = is_seen(band)
        clear = (band.start(last_query) <= first_key) & (band.end(first_query) > last_key)
        varies = spec.has_query_lengths or spec.has_key_lengths or spec.has_segments
        d_bias = jnp.zeros((tiles.queries, tiles.keys), jnp.float32)

        def of_row(r: Array, d_bias: Array) -> Array:
            """All heads of a batch row whose offset says whether the tile is seen."""
            row = spec.rows("d_bias").member(self.own_row, self.first_row + r)
            sees = is_seen(replace(band, offset=load(self.refs.query_offset, (row,))))
            return self._plus(d_bias, self.shared_heads, sees, first=r, masked=True)

        count = self.shared_rows * self.shared_heads
        if spec.has_query_offset:
            rows = jnp.int32(self.shared_rows)
            total: Array = lax.fori_loop(jnp.int32(0), rows, of_row, d_bias)
            return total
        if varies or spec.keys % tiles.keys:
            return self._plus(d_bias, count, visited, masked=True)
        if hides_some(spec):
            d_bias = self._plus(d_bias, count, visited & ~clear, masked=True)
            return self._plus(d_bias, count, clear, masked=False)
        return self._plus(d_bias, count, visited, masked=False)

    def _plus(
        self,
        d_bias: Array,
        count: int,
        condition: Array,
        first: Array | None = None,
        *,
        masked: bool,
    ) -> Array:
        """The sum so far and that of `count` of them, from batch row `first`, on a condition."""

        def step(n: Array, d_bias: Array) -> Array:
            n = n if first is None else first * self.shared_heads + n
            return d_bias + self._addend(n, masked=masked)

        turns = condition.astype(jnp.int32) * count
        total: Array = lax.fori_loop(jnp.int32(0), turns, step, d_bias)
        return total

    def _addend(self, n: Array, *, masked: bool) -> Array:
        """That of the n-th, heads of one batch row after each other."""
        spec, tiles, refs = self.spec, self.tiles, self.refs
        next_row, next_head = divided(n, self.shared_heads)
        batch = spec.rows("d_bias").member(self.own_row, self.first_row + next_row)
        head = self.own_head + next_head
        query_end = query_limit(spec, refs, batch, tiles.queries)
        key_end = key_limit(spec, refs, batch, tiles.keys)
        queries = span(self.first_query, tiles.queries, query_end)
        keys = span(self.first_key, tiles.keys, key_end)
        at = queries_down(batch, head, queries, keys, self.first_key, masked=masked)
        return self.addends(refs, at, queries, keys)
