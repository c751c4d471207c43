"""Tangents in XLA: the loops of `query_chunks` for the call's tangent, and for its gradients'.

Forward has left the output o and the log-sum-exp, so that P is known at once and one sum of blocks
is all there is, with nothing to rescale. Along tangents tQ, tK, tV, tbias and tscale (R is what
dropout makes of a weight, 0 or 1 / (1 - rate); cap' the soft cap's slope at Z):

    Z = scale Q Kᵀ               tZ = scale (tQ Kᵀ + Q tKᵀ) + tscale Q Kᵀ
    S = cap(Z) + bias            tS = cap'(Z) tZ + tbias
    mu = rowsum(P tS)            the tangent of the log-sum-exp
    tO = (R P tS) V + (R P) tV - mu o

and, where the gradients of dO also move along tdO, with the row terms D and tD (`derivatives`):

    dP = R (dO Vᵀ)               tdP = R (tdO Vᵀ + dO tVᵀ)
    dS = P (dP - D)              tdS = P ((tS - mu) (dP - D) + tdP - tD)
    dZ = cap' dS                 tdZ = cap' tdS + cap'' tZ dS,  cap'' = -2 cap(Z) cap' / cap²
    tdQ = (scale tdZ + tscale dZ) K + scale dZ tK          tdbias = tdS
    tdK = (scale tdZ + tscale dZ)ᵀ Q + scale dZᵀ tQ        tdscale = sum(tdZ (Q Kᵀ) + dZ t(Q Kᵀ))
    tdV = (R P (tS - mu))ᵀ dO + (R P)ᵀ tdO

A sum of two products such as tQ Kᵀ + Q tKᵀ is one, [tQ Q] [K tK]ᵀ. What does not move costs
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jattn.backends.products import against_keys, over_rows, times_keys
from jattn.backends.query_chunks import bias_sums
from jattn.backends.tiles import Chunks, HeadMajor, Tile, merge_heads, split_heads
from jattn.call.row_arrays import BackwardTangentRows, TangentRows
from jattn.call.spec import AttentionSpec, Operands, Tangents

__all__ = ["backward_tangent", "tangent"]


class _Crossed(NamedTuple):
    """Arrays whose product is rows tkeysᵀ + trows keysᵀ."""

    rows: Array  # (B, K, G, T, h or 2h)
    keys: Array  # (B, K, S, h or 2h)

    @staticmethod
    def of(rows: Array, t_rows: Array | None, keys: Array, t_keys: Array | None) -> _Crossed | None:
        if t_rows is None:
            return None if t_keys is None else _Crossed(rows, t_keys)
        if t_keys is None:
            return _Crossed(t_rows, keys)
        pairs = ((t_rows, rows), (keys, t_keys))
        return _Crossed(*(jnp.concatenate(pair, axis=-1) for pair in pairs))


class _Moving(NamedTuple):
    """Tangents with the sequence axis inside the heads, as `HeadMajor` has the arrays."""

    query: Array | None
    key: Array | None
    value: Array | None
    bias: Array | None
    scale: Array | None

    @staticmethod
    def of(spec: AttentionSpec, tangents: Tangents) -> _Moving:
        query, *keys = tangents[:3]
        key, value = (None if x is None else jnp.swapaxes(x, 1, 2) for x in keys)
        rows = None if query is None else split_heads(spec, query)
        return _Moving(rows, key, value, tangents.bias, tangents.scale)


class _Block(NamedTuple):
    """A tile against one block of keys; None of what does not move, or is not asked for."""

    products: Array  # Q Kᵀ
    weights: Array  # P
    capped: Array | None  # cap(Z) and its slope, where the call has a soft cap
    slope: Array | None
    t_products: Array | None  # t(Q Kᵀ)
    t_scaled: Array | None  # tZ
    t_logits: Array | None  # tS


@dataclass(frozen=True)
class _Rows:
    """What a tile has of its rows, whichever block of keys they meet."""

    tile: Tile
    query: Array
    top: Array  # (rows, K, G, queries, 1)
    rest: Array
    moving: _Moving
    crossed: _Crossed | None
    crossed_rows: Array | None

    @staticmethod
    def of(tile: Tile, top: Array, rest: Array, moving: _Moving, crossed: _Crossed | None) -> _Rows:
        return _Rows(
            tile=tile,
            query=tile.real_rows(tile.rows(tile.arrays.query)),
            top=tile.rows(top)[..., None],
            rest=tile.rows(rest)[..., None],
            moving=moving,
            crossed=crossed,
            crossed_rows=None if crossed is None else tile.real_rows(tile.rows(crossed.rows)),
        )

    def at(self, key: Array, j: Array, *, clear: bool) -> _Block:
        tile, spec, cap = self.tile, self.tile.spec, self.tile.spec.logits_soft_cap
        seen = None if clear else tile.visible(j)
        products = against_keys(spec, self.query, key)
        logits = spec.soft_cap(products * tile.scale)
        capped = slope = None
        if cap is not None:
            capped, slope = logits, 1 - (logits / cap) ** 2
            slope = slope if seen is None else jnp.where(seen, slope, 0)
        bias = tile.arrays.operands.bias
        if bias is not None:
            logits = logits + tile.block("bias", bias, j).astype(logits.dtype)
        logits = logits if seen is None else jnp.where(seen, logits, -jnp.inf)
        weights = jnp.exp((logits - self.top) - self.rest)
        t_products, t_scaled = self._along(products, j, clear=clear)
        t_logits = t_scaled if slope is None or t_scaled is None else t_scaled * slope
        if self.moving.bias is not None:
            t_bias = tile.block("t_bias", self.moving.bias, j).astype(logits.dtype)
            t_logits = (
                jnp.broadcast_to(t_bias, logits.shape) if t_logits is None else t_logits + t_bias
            )
        if t_logits is not None:
            t_logits = self.where_seen(weights, t_logits, clear=clear)
        return _Block(products, weights, capped, slope, t_products, t_scaled, t_logits)

    def where_seen(self, weights: Array, x: Array, *, clear: bool) -> Array:
        """x, and 0 of no weight: what is hidden may be infinite."""
        return x if clear and self.tile.spec.bias_shape is None else jnp.where(weights == 0, 0, x)

    def _along(
        self, products: Array, j: Array, *, clear: bool
    ) -> tuple[Array | None, Array | None]:
        """The tangents of Q Kᵀ, and of it scaled."""
        t_products = t_scaled = None
        if self.crossed is not None and self.crossed_rows is not None:
            keys = self.tile.keys(self.crossed.keys, j, clear=clear)
            t_products = against_keys(self.tile.spec, self.crossed_rows, keys)
            t_scaled = t_products * self.tile.scale
        if self.moving.scale is not None:
            more = products * self.tile.numbers(self.moving.scale)
            t_scaled = more if t_scaled is None else t_scaled + more
        return t_products, t_scaled


class _Apart(NamedTuple):
    """What keeps P tS V and mu o, both rounded to two bytes, from cancelling.

    c, (rows, K, G, queries), is taken off tS: its mean over the first block in which a row sees a
    key. The sum of P so far tells whether that has come; o is made again, in the accumulator.
    """

    centre: Array
    total: Array
    out: Array

    def with_block(self, weights: Array, t_logits: Array) -> _Apart:
        """c and the sum with those of a block."""
        total = weights.sum(axis=-1)
        mean = (weights * t_logits).sum(axis=-1) / jnp.where(total == 0, 1, total)
        centre = jnp.where(self.total == 0, mean, self.centre)
        return self._replace(centre=centre, total=self.total + total)


class _Tangent(NamedTuple):
    """The tangent of a tile's output, (rows, K, G, queries, D), and mu, as they grow."""

    out: Array
    mean: Array
    apart: _Apart | None


def tangent(
    spec: AttentionSpec,
    chunks: Chunks,
    operands: Operands,
    rows: TangentRows,
    tangents: Tangents,
) -> tuple[Array, Array]:
    """Tangents of the output (B, T, N, D) and of the log-sum-exp (B, T, N)."""
    arrays = HeadMajor.of(spec, chunks, operands)
    moving = _Moving.of(spec, tangents)
    crossed = _Crossed.of(arrays.query, moving.query, arrays.key, moving.key)
    top, rest, out, start = jax.tree.map(partial(split_heads, spec), rows)
    top = _for_weights(top)
    moves_logits = any(x is not None for x in (crossed, moving.bias, moving.scale))
    is_rounded = moves_logits and spec.dtype != spec.accumulator

    def chunk(index: Array, written: tuple[Array, ...]) -> tuple[Array, ...]:
        tile = Tile.at(spec, chunks, arrays, index)
        scores = _Rows.of(tile, top, rest, moving, crossed)

        def step(j: Array, state: _Tangent, *, clear: bool) -> _Tangent:
            block = scores.at(tile.keys(arrays.key, j, clear=clear), j, clear=clear)
            kept = _kept(tile, block.weights, j)
            found = state
            if block.t_logits is not None:
                value = tile.keys(arrays.value, j, clear=clear)
                mean = found.mean + (block.weights * block.t_logits).sum(axis=-1)
                t_logits, apart = block.t_logits, found.apart
                if apart is not None:
                    apart = apart.with_block(block.weights, t_logits)
                    t_logits = t_logits - apart.centre[..., None]
                    apart = apart._replace(out=apart.out + times_keys(spec, kept, value))
                moved = found.out + times_keys(spec, kept * t_logits, value)
                found = _Tangent(moved, mean, apart)
            if moving.value is not None:
                t_value = tile.keys(moving.value, j, clear=clear)
                found = found._replace(out=found.out + times_keys(spec, kept, t_value))
            return found

        sizes = (chunks.rows, spec.kv_heads, spec.group, chunks.queries)
        mean = jnp.zeros(sizes, spec.accumulator) if start is None else tile.rows(start)
        zeros = jnp.zeros((*sizes, spec.value_dim), spec.accumulator)
        nothing = jnp.zeros(sizes, spec.accumulator)
        apart = _Apart(nothing, nothing, zeros) if is_rounded else None
        found = tile.visit(step, _Tangent(zeros, mean, apart))
        own, of_own = tile.rows(out).astype(zeros.dtype), found.mean
        if found.apart is not None:
            own, of_own = found.apart.out, found.mean - found.apart.centre
        t_out = found.out - of_own[..., None] * own
        return tile.write(written[0], t_out), tile.write(written[1], found.mean)

    sizes = (spec.batch, spec.kv_heads, spec.group, spec.queries)
    empty = jnp.zeros((*sizes, spec.value_dim), spec.dtype), jnp.zeros(sizes, spec.accumulator)
    found = lax.fori_loop(0, Tile.count(spec, chunks), chunk, empty)
    t_out, t_lse = (merge_heads(spec, x) for x in found)
    return t_out, t_lse


class _Sums(NamedTuple):
    """The gradients' tangents as they grow; None of those that are not wanted."""

    query: Array | None  # (rows, K, G, queries, H), of one tile
    scale: Array | None  # (rows, K, G, queries), of one tile
    key: Array | None  # (B, K, H, S)
    value: Array | None  # (B, K, D, S)
    bias: Array | None  # the bias's shape


def backward_tangent(
    spec: AttentionSpec,
    chunks: Chunks,
    operands: Operands,
    rows: BackwardTangentRows,
    tangents: Tangents,
    *,
    wanted: tuple[str, ...],
) -> tuple[Array, ...]:
    """Tangents of the gradients that are wanted, in that order.

    Of "scale" that is one number for each row of the logits, (B, T, N).
    """
    arrays = HeadMajor.of(spec, chunks, operands)
    moving = _Moving.of(spec, tangents)
    crossed = _Crossed.of(arrays.query, moving.query, arrays.key, moving.key)
    rows = jax.tree.map(partial(split_heads, spec), rows)
    top = _for_weights(rows.top)
    d_crossed = _Crossed.of(rows.d_out, rows.td_out, arrays.value, moving.value)

    def chunk(index: Array, carry: tuple[_Sums, _Sums]) -> tuple[_Sums, _Sums]:
        written, sums = carry
        tile = Tile.at(spec, chunks, arrays, index)
        scores = _Rows.of(tile, top, rows.rest, moving, crossed)

        def fresh(x: Array) -> Array:
            return tile.fresh_rows(tile.real_rows(tile.rows(x)))

        own = _OwnRows(
            d=fresh(rows.d_out),
            td=None if rows.td_out is None else fresh(rows.td_out),
            d_crossed=None if d_crossed is None else fresh(d_crossed.rows),
            term=fresh(rows.row_term)[..., None],
            t_term=fresh(rows.t_row_term)[..., None],
            mean=fresh(rows.t_lse)[..., None],
            t_query=None if moving.query is None else tile.real_rows(tile.rows(moving.query)),
        )
        values = None if d_crossed is None else d_crossed.keys

        def step(j: Array, sums: _Sums, *, clear: bool) -> _Sums:
            return _added(scores, own, values, sums, j, clear=clear)

        sums = tile.visit(step, _of_a_tile(sums))
        return _written(tile, written, sums, scaled=moving.scale is not None), sums

    written, sums = _empty(spec, chunks, wanted)
    written, sums = lax.fori_loop(0, Tile.count(spec, chunks), chunk, (written, sums))
    return tuple(_finished(spec, operands, name, written, sums, moving) for name in wanted)


class _OwnRows(NamedTuple):
    """What backward has of a tile's rows, 0 of those that an earlier chunk has."""

    d: Array  # dO
    td: Array | None  # tdO
    d_crossed: Array | None
    term: Array  # D, (rows, K, G, queries, 1), like tD and mu
    t_term: Array
    mean: Array
    t_query: Array | None


def _added(
    rows: _Rows, own: _OwnRows, values: Array | None, sums: _Sums, j: Array, *, clear: bool
) -> _Sums:
    """The sums with what key block j adds."""
    tile, spec, moving = rows.tile, rows.tile.spec, rows.moving
    key, value = (tile.keys(x, j, clear=clear) for x in (tile.arrays.key, tile.arrays.value))
    block = rows.at(key, j, clear=clear)
    weights = block.weights
    kept = tile.kept(j)
    grow = 1 / (1 - spec.dropout_rate)

    def dropped(x: Array) -> Array:
        return x if kept is None else jnp.where(kept, x * grow, 0)

    def against(rows_: Array, values_: Array) -> Array:
        return dropped(rows.where_seen(weights, against_keys(spec, rows_, values_), clear=clear))

    apart = -own.mean if block.t_logits is None else block.t_logits - own.mean  # tS - mu
    d_logits = weights * (against(own.d, value) - own.term)
    moved = -own.t_term
    if own.d_crossed is not None and values is not None:
        moved = against(own.d_crossed, tile.keys(values, j, clear=clear)) - own.t_term
    td_logits = apart * d_logits + weights * moved
    d_products, td_products = d_logits, td_logits
    if block.slope is not None and block.capped is not None:
        cap = spec.logits_soft_cap
        assert cap is not None
        d_products, td_products = d_logits * block.slope, td_logits * block.slope
        if block.t_scaled is not None:
            bend = (-2 / cap**2) * block.capped * block.t_scaled
            td_products = td_products + d_products * jnp.where(block.slope == 0, 0, bend)
    found = sums
    if sums.scale is not None:
        rowwise = td_products * rows.where_seen(weights, block.products, clear=clear)
        if block.t_products is not None:
            t_products = rows.where_seen(weights, block.t_products, clear=clear)
            rowwise = rowwise + d_products * t_products
        found = found._replace(scale=sums.scale + rowwise.sum(axis=-1))
    if moving.scale is not None:
        td_products = td_products * tile.scale + d_products * tile.numbers(moving.scale)
        d_products = d_products * tile.scale
    if found.query is not None:
        part = times_keys(spec, td_products, key)
        if moving.key is not None:
            part = part + times_keys(spec, d_products, tile.keys(moving.key, j, clear=clear))
        found = found._replace(query=found.query + part)
    if found.key is not None:
        part = over_rows(spec, rows.query, td_products)
        if own.t_query is not None:
            part = part + over_rows(spec, own.t_query, d_products)
        found = found._replace(key=tile.add_keys(found.key, part, j))
    if found.value is not None:
        part = over_rows(spec, own.d, dropped(weights * apart))
        if own.td is not None:
            part = part + over_rows(spec, own.td, dropped(weights))
        found = found._replace(value=tile.add_keys(found.value, part, j))
    if found.bias is not None:
        found = found._replace(bias=tile.add_block(found.bias, td_logits, j))
    return found


def _of_a_tile(sums: _Sums) -> _Sums:
    """The sums, with those of one tile begun anew."""

    def anew(x: Array | None) -> Array | None:
        return None if x is None else jnp.zeros_like(x)

    return sums._replace(query=anew(sums.query), scale=anew(sums.scale))


def _written(tile: Tile, written: _Sums, sums: _Sums, *, scaled: bool) -> _Sums:
    """What tiles have of rows, with this tile's added: rows that two have are 0 in one of them."""

    def added(x: Array | None, part: Array | None) -> Array | None:
        if x is None or part is None:
            return None
        return tile.write(x, tile.rows(x) + part.astype(x.dtype))

    query = sums.query if scaled or sums.query is None else sums.query * tile.scale
    return written._replace(
        query=added(written.query, query), scale=added(written.scale, sums.scale)
    )


def _empty(spec: AttentionSpec, chunks: Chunks, wanted: tuple[str, ...]) -> tuple[_Sums, _Sums]:
    """What tiles write of rows, and sums, of nothing yet."""
    rows = (spec.batch, spec.kv_heads, spec.group, spec.queries)
    tile = (chunks.rows, spec.kv_heads, spec.group, chunks.queries)
    keys = (spec.batch, spec.kv_heads)

    def zeros(name: str, *shape: int, of: np.dtype[np.generic] = spec.accumulator) -> Array | None:
        return jnp.zeros(shape, of) if name in wanted else None

    written = _Sums(
        query=zeros("query", *rows, spec.head_dim, of=spec.dtype),
        scale=zeros("scale", *rows),
        key=None,
        value=None,
        bias=None,
    )
    sums = _Sums(
        query=zeros("query", *tile, spec.head_dim),
        scale=zeros("scale", *tile),
        key=zeros("key", *keys, spec.head_dim, spec.keys),
        value=zeros("value", *keys, spec.value_dim, spec.keys),
        bias=None,
    )
    if "bias" in wanted:
        shape, dtype = bias_sums(spec, chunks)
        sums = sums._replace(bias=jnp.zeros(shape, dtype))
    return written, sums


def _finished(
    spec: AttentionSpec, operands: Operands, name: str, written: _Sums, sums: _Sums, moving: _Moving
) -> Array:
    """A result in its own shape and dtype."""
    rows = {"query": written.query, "scale": written.scale}.get(name)
    if rows is not None:
        return merge_heads(spec, rows)
    found = {"key": sums.key, "value": sums.value, "bias": sums.bias}[name]
    assert found is not None
    if name == "bias":
        return found.astype(spec.bias_dtype)
    if name == "key" and moving.scale is None:
        found = found * spec.scale_beside(found, operands)
    return jnp.moveaxis(found, 3, 1).astype(spec.dtype)


def _kept(tile: Tile, weights: Array, j: Array) -> Array:
    """The weights that dropout leaves, grown."""
    kept = tile.kept(j)
    rate = tile.spec.dropout_rate
    return weights if kept is None else jnp.where(kept, weights / (1 - rate), 0)


def _for_weights(top: Array) -> Array:
    """The maxima, of a row that sees no key infinite: exp(S - inf) is 0, whatever S is."""
    return jnp.where(top == -jnp.inf, jnp.inf, top)
