"""One tile of query-chunked attention: which rows it holds, which key blocks it visits, its logits.

A tile is a chunk of queries of a few batch rows, for all heads. It visits blocks of keys:

               key blocks j
      rows     0     1     2     3
    query      .     #     #     #      # visited       start(first row) .. end(last row)
    chunk      .     m     c     m      c clear         every row sees every key: no element mask
                                        m mask          computed, or read, for this block alone

The last chunk, and the last block, start early enough to end at the edge of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array, lax

from jattn.call import dropout
from jattn.call.masking import KeyIntervals, hides_some
from jattn.call.spec import AttentionSpec, Operands
from pallas_kernels import blocks

__all__ = ["Chunks", "HeadMajor", "Tile"]


@dataclass(frozen=True)
class Chunks:
    """How much one step holds: batch rows x queries x keys, for every head."""

    rows: int
    queries: int
    keys: int


class HeadMajor(NamedTuple):
    """A call's arrays with the sequence axis inside the heads, as matrix products want them.

    Shapes: query (B, K, G, T, H), key (B, K, S, H), value (B, K, S, D); bias, mask, lengths,
    offsets and query segments as in `Operands`; key_segment_ranges (B, blocks, 2), the least and
    the greatest segment id of each block of keys.
    """

    query: Array
    key: Array
    value: Array
    operands: Operands
    key_segment_ranges: Array | None

    @staticmethod
    def of(spec: AttentionSpec, chunks: Chunks, operands: Operands) -> HeadMajor:
        """The arrays of a call, transposed once."""
        return HeadMajor(
            query=split_heads(spec, operands.query),
            key=jnp.swapaxes(operands.key, 1, 2),
            value=jnp.swapaxes(operands.value, 1, 2),
            operands=operands,
            key_segment_ranges=_segment_ranges(operands.key_segments, chunks.keys),
        )


class Step[State](Protocol):
    """The work on key block j; `clear` says that every query sees every key of it."""

    def __call__(self, j: Array, state: State, /, *, clear: bool) -> State: ...


@dataclass(frozen=True)
class Tile:
    """A chunk of queries of `chunks.rows` batch rows, and what it needs of the call."""

    spec: AttentionSpec
    chunks: Chunks
    arrays: HeadMajor
    row: Array  # first batch row
    query: Array  # first query
    fresh: Array  # first query that no earlier chunk holds; differs at the edge alone

    @staticmethod
    def count(spec: AttentionSpec, chunks: Chunks) -> int:
        """How many tiles cover the call."""
        return spec.batch // chunks.rows * -(-spec.queries // chunks.queries)

    @staticmethod
    def at(spec: AttentionSpec, chunks: Chunks, arrays: HeadMajor, index: Array) -> Tile:
        """The tile with this number, 0 to `count` - 1."""
        index = _int32(index)  # in 64-bit mode a loop counts in int64
        per_row = -(-spec.queries // chunks.queries)
        fresh = index % per_row * chunks.queries
        query = jnp.minimum(fresh, spec.queries - chunks.queries)
        return Tile(spec, chunks, arrays, index // per_row * chunks.rows, query, fresh)

    @property
    def query_positions(self) -> Array:
        """(queries,)"""
        return self.query + jnp.arange(self.chunks.queries, dtype=jnp.int32)

    def key_positions(self, j: Array) -> Array:
        """(keys,)"""
        return self._key_start(j) + jnp.arange(self.chunks.keys, dtype=jnp.int32)

    def rows(self, x: Array) -> Array:
        """This tile's part of a per-query array (B, K, G, T, ...)."""
        x = lax.dynamic_slice_in_dim(x, self.row, self.chunks.rows, 0)
        return lax.dynamic_slice_in_dim(x, self.query, self.chunks.queries, 3)

    def write(self, x: Array, part: Array) -> Array:
        """x (B, K, G, T, ...) with this tile's part replaced."""
        start = _at(self.row, 0, 0, self.query, *[0] * (x.ndim - 4))
        return lax.dynamic_update_slice(x, part.astype(x.dtype), start)

    @property
    def scale(self) -> Array | float:
        """What Q Kᵀ is multiplied by: a number, or (rows or 1, 1, 1, 1, 1)."""
        if self.spec.scale is not None:
            return self.spec.scale
        assert self.arrays.operands.scale is not None
        return self.numbers(self.arrays.operands.scale)

    def numbers(self, x: Array) -> Array:
        """(rows or 1, 1, 1, 1, 1) of a number for each row of the batch (B,), or for all (1,)."""
        x = x.reshape(-1, 1, 1, 1, 1)
        return x if x.shape[0] == 1 else self._of_rows(x)

    def real_rows(self, part: Array) -> Array:
        """This tile's part of a per-query array with zeros past the query lengths."""
        lengths = self.arrays.operands.query_lengths
        if lengths is None:
            return part
        within = self.query_positions[None] < self._of_rows(lengths)[:, None]
        return jnp.where(_row_column(within, part.ndim), part, 0)

    def fresh_rows(self, part: Array) -> Array:
        """This tile's part of a per-query array with zeros where an earlier chunk has the row."""
        if self.spec.queries % self.chunks.queries == 0:
            return part
        return jnp.where(
            _row_column((self.query_positions >= self.fresh)[None], part.ndim), part, 0
        )

    def sinks(self) -> Array | None:
        """(rows or 1, K, G, 1), of sinks (N,) or with a row for each of the batch, (B, N)."""
        sinks = self.arrays.operands.sinks
        if sinks is None:
            return None
        own = sinks if sinks.ndim == 1 else self._of_rows(sinks)
        return own.reshape(-1, self.spec.kv_heads, self.spec.group, 1)

    def keys(self, x: Array, j: Array, *, clear: bool) -> Array:
        """Block j of a per-key array (B, K, S, ·), with zeros past the key lengths."""
        x = lax.dynamic_slice_in_dim(x, self.row, self.chunks.rows, 0)
        x = lax.dynamic_slice_in_dim(x, self._key_start(j), self.chunks.keys, 2)
        lengths = self.arrays.operands.key_lengths
        if clear or lengths is None:
            return x
        within = self.key_positions(j)[None] < self._of_rows(lengths)[:, None]
        return jnp.where(within[:, None, :, None], x, 0)

    def add_keys(self, x: Array, part: Array, j: Array) -> Array:
        """x (B, K, ·, S) with `part` added to block j."""
        start = _at(self.row, 0, 0, self._key_start(j))
        old = lax.dynamic_slice(x, start, part.shape)
        return lax.dynamic_update_slice(x, old + part, start)

    def block(self, name: str, x: Array, j: Array) -> Array:
        """Block j of a bias or mask, as wide as it is: (b|1, K, G, t|1, s|1), or K = G = 1."""
        start, size = self._window(name, x, j)
        return self.spec.grouped(lax.dynamic_slice(x, start, size))

    def add_block(self, x: Array, part: Array, j: Array) -> Array:
        """x, the bias's gradient, with the logits' gradient `part` summed into it at block j."""
        start, size = self._window("d_bias", x, j)
        part = part.reshape(
            self.chunks.rows, self.spec.heads, self.chunks.queries, self.chunks.keys
        )
        narrow = [axis for axis, n in enumerate(size) if n == 1]
        old = lax.dynamic_slice(x, start, size)
        return lax.dynamic_update_slice(
            x, old + part.sum(axis=narrow, keepdims=True).astype(x.dtype), start
        )

    def visit[State](self, step: Step[State], state: State) -> State:
        """Runs `step` over the key blocks that some query of the tile sees."""
        first, stop, is_clear = self._key_blocks()

        def body(j: Array, state: State) -> State:
            if is_clear is None or self.spec.mask_shape is not None:
                return step(j, state, clear=is_clear is None)
            after: State = lax.cond(
                is_clear(j),
                lambda state: step(j, state, clear=True),
                lambda state: step(j, state, clear=False),
                state,
            )
            return after

        final: State = lax.fori_loop(first, stop, body, state)
        return final

    def visible(self, j: Array) -> Array:
        """Which logits of block j count: (rows, K|1, G|1, queries, keys) or broadcastable to it."""
        operands = self.arrays.operands
        query, key = self._positions(j)
        seen = self._intervals((-1, 1, 1, 1, 1)).visible(query, key) & (key >= j * self.chunks.keys)
        if operands.query_segments is not None and operands.key_segments is not None:
            own = self._of_rows(operands.query_segments, self.query, self.chunks.queries)
            its = self._of_rows(operands.key_segments, self._key_start(j), self.chunks.keys)
            seen = seen & (own[:, None, None, :, None] == its[:, None, None, None, :])
        if operands.mask is not None:
            seen = seen & self.block("mask", operands.mask, j)
        return seen

    def kept(self, j: Array) -> Array | None:
        """The dropout mask of block j, (rows, K, G, queries, keys); None without dropout."""
        seeds = self.arrays.operands.dropout_seeds
        if seeds is None:
            return None
        row = self._of_rows(seeds).reshape(-1, 2, 1, 1, 1, 1)
        query, key = self._positions(j)
        start = self.arrays.operands.dropout_start
        if start is not None:
            query, key = query + start[0], key + start[1]
        return dropout.keep(
            (row[:, 0], row[:, 1]),
            self.spec.dropout_heads(),
            query,
            key,
            self.spec.dropout_rate,
        )

    def _positions(self, j: Array) -> tuple[Array, Array]:
        """Of the tile's queries and of block j's keys, shaped to broadcast to its logits."""
        queries, keys = self.query_positions, self.key_positions(j)
        return queries[None, None, None, :, None], keys[None, None, None, None, :]

    def _key_start(self, j: Array) -> Array:
        return jnp.minimum(j * self.chunks.keys, self.spec.keys - self.chunks.keys)

    def _of_rows(self, x: Array, start: Array | int = 0, size: int | None = None) -> Array:
        """This tile's batch rows of x (B, ·), and of its second axis the part asked for."""
        x = lax.dynamic_slice_in_dim(x, self.row, self.chunks.rows, 0)
        return x if size is None else lax.dynamic_slice_in_dim(x, start, size, 1)

    def _intervals(self, shape: tuple[int, ...]) -> KeyIntervals:
        """The key intervals of the tile's batch rows, their numbers in this shape."""

        def numbers(x: Array | None) -> Array | None:
            return None if x is None else self._of_rows(x).reshape(shape)

        operands = self.arrays.operands
        return KeyIntervals.of(
            self.spec,
            numbers(operands.query_lengths),
            numbers(operands.key_lengths),
            numbers(operands.query_offset),
        )

    def _window(self, name: str, x: Array, j: Array) -> tuple[tuple[Array, ...], tuple[int, ...]]:
        """Start and size of block j in a bias, its gradient or a mask.

        The tile's batch rows take one row of it, or as many one after another: `choose_chunks`.
        """
        spec, chunks = self.spec, self.chunks
        rows = spec.rows(name)
        first = rows.row(self.row) if rows.is_mixed else self.row
        starts: tuple[Array | int, ...] = (first, 0, self.query, self._key_start(j))
        count = chunks.rows if rows.inner.own else 1
        sizes = (count, spec.heads, chunks.queries, chunks.keys)
        narrow = [n == 1 for n in x.shape]
        start = _at(*(0 if one else at for one, at in zip(narrow, starts, strict=True)))
        return start, tuple(1 if one else n for one, n in zip(narrow, sizes, strict=True))

    def _key_blocks(self) -> tuple[Array, Array, Callable[[Array], Array] | None]:
        """First and stop of the visited blocks, and whether block j is clear (None: all are)."""
        spec, size = self.spec, self.chunks.keys
        intervals = self._intervals((-1,))
        stop_query = self.query + self.chunks.queries
        first, stop = blocks.key_blocks(intervals, self.query, stop_query, size)
        first, stop = jnp.min(_int32(first)), jnp.max(_int32(stop))
        if not hides_some(spec) and spec.keys % size == 0:
            return first, stop, None
        clear = blocks.unmasked_key_blocks(intervals, self.query, stop_query, size)
        clear_first, clear_stop = jnp.max(_int32(clear[0])), jnp.min(_int32(clear[1]))
        segments = self._segment_overlap()
        if segments is None:
            return first, stop, lambda j: (j >= clear_first) & (j < clear_stop)
        meets, one_segment = segments
        count = meets.shape[0]
        first = jnp.maximum(first, blocks.first_true(meets))
        stop = jnp.minimum(stop, jnp.where(meets.any(), count - blocks.first_true(meets[::-1]), 0))
        return first, stop, lambda j: (j >= clear_first) & (j < clear_stop) & one_segment[j]

    def _segment_overlap(self) -> tuple[Array, Array] | None:
        """Of each key block: may it hold the tile's segments; is all of both one segment?

        Ids are compared by range, which is exact for sorted ids and safe for any others.
        """
        ranges, ids = self.arrays.key_segment_ranges, self.arrays.operands.query_segments
        if ranges is None or ids is None:
            return None
        own = self._of_rows(ids, self.query, self.chunks.queries)
        least, most = own.min(axis=1, keepdims=True), own.max(axis=1, keepdims=True)
        its = self._of_rows(ranges)
        meets = (its[..., 1] >= least) & (its[..., 0] <= most)
        one = (its[..., 0] == least) & (its[..., 1] == least) & (most == least)
        return meets.any(axis=0), one.all(axis=0)


def split_heads(spec: AttentionSpec, x: Array) -> Array:
    """(B, T, N, ...) as (B, K, G, T, ...)."""
    x = x.reshape(spec.batch, spec.queries, spec.kv_heads, spec.group, *x.shape[3:])
    return jnp.moveaxis(x, 1, 3)


def merge_heads(spec: AttentionSpec, x: Array) -> Array:
    """(B, K, G, T, ...) as (B, T, N, ...)."""
    return jnp.moveaxis(x, 3, 1).reshape(spec.batch, spec.queries, spec.heads, *x.shape[4:])


def _at(*start: Array | int) -> tuple[Array, ...]:
    """Where a part of an array begins, all of one dtype, as slices want it."""
    return tuple(map(_int32, start))


def _int32(x: Array | int) -> Array:
    return jnp.asarray(x, jnp.int32)


def _row_column(within: Array, ndim: int) -> Array:
    """(rows, queries) flags against a part (rows, K, G, queries, ...) of this rank."""
    return within[:, None, None, :].reshape(
        within.shape[0], 1, 1, within.shape[1], *(1,) * (ndim - 4)
    )


def _segment_ranges(ids: Array | None, block: int) -> Array | None:
    """(B, S) ids as the least and greatest id of each block, (B, blocks, 2)."""
    if ids is None:
        return None
    batch, size = ids.shape
    count = -(-size // block)
    padded = jnp.pad(ids, ((0, 0), (0, count * block - size)), mode="edge")
    grouped = padded.reshape(batch, count, block)
    return jnp.stack([grouped.min(axis=2), grouped.max(axis=2)], axis=-1)
