"""Query-chunked attention in XLA: the loops of `memory_efficient`, forward and backward.

For each chunk of queries, visit the blocks of keys that some query of it sees, and keep a running
softmax (Rabe and Staats, 2021, section 2; Milakov and Gimelshein, 2018):

    S = cap(Q Kᵀ * scale) + bias     m' = max(m, rowmax S)       P = exp(S - m')
    l = l exp(m - m') + rowsum P     O = O exp(m - m') + P V     out = O / l,  lse = m' + log l

Backward visits the same blocks and makes P again from the log-sum-exp (Dao et al., 2022, algorithm
4), kept as m and r = log l since a large m would swallow r; with the row term
D = rowsum(O dO) - dlse:

    P = exp(S - m - r)    dP = dO Vᵀ              dS = P (dP - D)    dZ = dS cap'(Q Kᵀ * scale)
    dQ += dZ K * scale    dKᵀ += Qᵀ dZ * scale    dVᵀ += dOᵀ P       dbias += dS

Nothing of size T x S exists unless the caller's own bias or mask is that large; those are read by
block. No size needs to be a multiple of anything, and nothing is padded (see `tiles`). Key and
value gradients are kept transposed: a product that contracts the rows of its large operand, as
Pᵀ dO would, runs at half the speed of dOᵀ P on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jattn.backends.products import against_keys, over_rows, times_keys
from jattn.backends.tiles import Chunks, HeadMajor, Tile, merge_heads, split_heads
from jattn.call.row_arrays import AnyBackwardRows
from jattn.call.spec import AttentionSpec, Operands

__all__ = ["backward", "bias_sums", "forward"]


class _Softmax(NamedTuple):
    """The running softmax of a tile's rows (rows, K, G, queries) and its output (..., D)."""

    top: Array
    total: Array
    out: Array


class _Sums(NamedTuple):
    """Gradients as they grow: query of one tile, the others of the whole call."""

    query: Array  # (rows, K, G, queries, H)
    key: Array  # (B, K, H, S)
    value: Array  # (B, K, D, S)
    bias: Array | None  # the bias's shape


def forward(spec: AttentionSpec, chunks: Chunks, operands: Operands) -> tuple[Array, Array, Array]:
    """Output (B, T, N, D) and the log-sum-exp as two (B, T, N), without sinks: the maximum and the
    logarithm of the sum beside it; -inf and 0 of a row that sees no key.
    """
    arrays = HeadMajor.of(spec, chunks, operands)

    def chunk(index: Array, written: tuple[Array, ...]) -> tuple[Array, ...]:
        tile = Tile.at(spec, chunks, arrays, index)
        query = tile.real_rows(tile.rows(arrays.query))

        def step(j: Array, state: _Softmax, *, clear: bool) -> _Softmax:
            logits, _ = _logits(tile, query, tile.keys(arrays.key, j, clear=clear), j, clear=clear)
            top = jnp.maximum(state.top, logits.max(axis=-1))
            shift = jnp.where(top == -jnp.inf, 0, top)  # a row that has seen nothing yet
            weights = jnp.exp(logits - shift[..., None])
            fade = jnp.exp(state.top - shift)
            total = state.total * fade + weights.sum(axis=-1)
            kept = tile.kept(j)
            if kept is not None:
                weights = jnp.where(kept, weights / (1 - spec.dropout_rate), 0)
            product = times_keys(spec, weights, tile.keys(arrays.value, j, clear=clear))
            return _Softmax(top, total, state.out * fade[..., None] + product)

        rows = (chunks.rows, spec.kv_heads, spec.group, chunks.queries)
        zeros = jnp.zeros(rows, spec.accumulator)
        start = _Softmax(zeros - jnp.inf, zeros, jnp.zeros((*rows, spec.value_dim), zeros.dtype))
        found = _finish(tile.visit(step, start), tile.sinks())
        return tuple(map(tile.write, written, found))

    rows = (spec.batch, spec.kv_heads, spec.group, spec.queries)
    number = jnp.zeros(rows, spec.accumulator)
    empty = jnp.zeros((*rows, spec.value_dim), spec.dtype), number, number
    out, top, rest = lax.fori_loop(0, Tile.count(spec, chunks), chunk, empty)
    return merge_heads(spec, out), merge_heads(spec, top), merge_heads(spec, rest)


def backward(
    spec: AttentionSpec,
    chunks: Chunks,
    operands: Operands,
    rows: AnyBackwardRows,
    *,
    wants_bias: bool,
    wants_scale: bool,
) -> tuple[Array, ...]:
    """Gradients of query, key and value, and of the bias if it is wanted."""
    arrays = HeadMajor.of(spec, chunks, operands)
    top, rest, row_term, d_out = (split_heads(spec, x) for x in rows)
    top = jnp.where(top == -jnp.inf, jnp.inf, top)  # exp(S - inf) = 0, whatever S is

    def chunk(index: Array, carry: tuple[Array, _Sums]) -> tuple[Array, _Sums]:
        d_query, sums = carry
        tile = Tile.at(spec, chunks, arrays, index)
        query = tile.real_rows(tile.rows(arrays.query))
        d_rows = tile.fresh_rows(tile.real_rows(tile.rows(d_out)))
        term = tile.fresh_rows(tile.real_rows(tile.rows(row_term)))[..., None]
        tile_top, tile_rest = tile.rows(top)[..., None], tile.rows(rest)[..., None]

        def step(j: Array, sums: _Sums, *, clear: bool) -> _Sums:
            key, value = (tile.keys(x, j, clear=clear) for x in (arrays.key, arrays.value))
            logits, slope = _logits(tile, query, key, j, clear=clear)
            weights = jnp.exp((logits - tile_top) - tile_rest)
            d_weights = against_keys(spec, d_rows, value)
            if not clear or spec.bias_shape is not None:  # a hidden value's dP may be infinite
                d_weights = jnp.where(weights == 0, 0, d_weights)
            kept_weights = weights
            kept = tile.kept(j)
            if kept is not None:
                scale = 1 / (1 - spec.dropout_rate)
                kept_weights = jnp.where(kept, weights * scale, 0)
                d_weights = jnp.where(kept, d_weights * scale, 0)
            d_logits = weights * (d_weights - term)
            d_products = d_logits if slope is None else d_logits * slope
            return _Sums(
                query=sums.query + times_keys(spec, d_products, key),
                key=tile.add_keys(sums.key, over_rows(spec, query, d_products), j),
                value=tile.add_keys(sums.value, over_rows(spec, d_rows, kept_weights), j),
                bias=None if sums.bias is None else tile.add_block(sums.bias, d_logits, j),
            )

        sums = tile.visit(step, sums._replace(query=jnp.zeros_like(sums.query)))
        own = sums.query if wants_scale else sums.query * tile.scale
        own = tile.rows(d_query) + own.astype(d_query.dtype)
        return tile.write(d_query, own), sums

    sums = _empty_sums(spec, chunks, operands.bias if wants_bias else None)
    d_query = arrays.query.astype(sums.query.dtype) if wants_scale else arrays.query
    empty = jnp.zeros_like(d_query), sums
    d_query, sums = lax.fori_loop(0, Tile.count(spec, chunks), chunk, empty)
    d_key = sums.key * spec.scale_beside(sums.key, operands)
    found = (
        merge_heads(spec, d_query),
        jnp.moveaxis(d_key, 3, 1).astype(spec.dtype),
        jnp.moveaxis(sums.value, 3, 1).astype(spec.dtype),
    )
    return found if sums.bias is None else (*found, sums.bias.astype(spec.bias_dtype))


def _logits(
    tile: Tile, query: Array, key: Array, j: Array, *, clear: bool
) -> tuple[Array, Array | None]:
    """The tile's logits against key block j, -inf where hidden, and the soft cap's slope there."""
    spec, bias = tile.spec, tile.arrays.operands.bias
    seen = None if clear else tile.visible(j)
    logits = against_keys(spec, query, key) * tile.scale
    slope = None
    if spec.logits_soft_cap is not None:
        logits = spec.soft_cap(logits)
        slope = 1 - (logits / spec.logits_soft_cap) ** 2
        slope = slope if seen is None else jnp.where(seen, slope, 0)
    if bias is not None:
        logits = logits + tile.block("bias", bias, j).astype(logits.dtype)
    return (logits if seen is None else jnp.where(seen, logits, -jnp.inf)), slope


def _finish(state: _Softmax, sinks: Array | None) -> tuple[Array, Array, Array]:
    """The tile's output, with the sink in each row's sum, and its numbers, without."""
    sees_none = (state.top == -jnp.inf) & (state.total == 0)  # a maximum may pass over NaN
    top = jnp.where(state.top == -jnp.inf, 0, state.top)
    total = jnp.where(sees_none, 1, state.total)
    out, whole = state.out, total
    if sinks is not None:
        sink = sinks.astype(top.dtype)
        higher = jnp.maximum(top, sink)
        fade = jnp.exp(top - higher)
        apart = jnp.where(sink == higher, 0, sink - higher)  # also where both are infinite
        out, whole = out * fade[..., None], total * fade + jnp.exp(apart)
    out = jnp.where(sees_none[..., None], 0, out / whole[..., None])
    return out, jnp.where(sees_none, -jnp.inf, top), jnp.log(total)


def _empty_sums(spec: AttentionSpec, chunks: Chunks, bias: Array | None) -> _Sums:
    tile = (chunks.rows, spec.kv_heads, spec.group, chunks.queries, spec.head_dim)
    keys = (spec.batch, spec.kv_heads)
    d_bias = None if bias is None else jnp.zeros(*bias_sums(spec, chunks))
    return _Sums(
        query=jnp.zeros(tile, spec.accumulator),
        key=jnp.zeros((*keys, spec.head_dim, spec.keys), spec.accumulator),
        value=jnp.zeros((*keys, spec.value_dim, spec.keys), spec.accumulator),
        bias=d_bias,
    )


def bias_sums(spec: AttentionSpec, chunks: Chunks) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    """Shape and dtype in which a bias's gradient grows.

    Its own dtype where one tile writes each element, so that no sum is rounded twice.
    """
    assert spec.d_bias_shape is not None
    assert spec.bias_dtype is not None
    b, _, t, s = spec.d_bias_shape
    one_writer = (t, s) == (spec.queries, spec.keys) and spec.batch in (b, chunks.rows)
    return spec.d_bias_shape, spec.bias_dtype if one_writer else spec.accumulator
