"""Which keys a query sees: one interval of keys, narrowed by segments and by a dense mask.

Causal masks, windows and lengths are one idea. Draw the logits as a matrix, a row per query i, a
column per key k; the keys that row i sees are an interval [start(i), end(i)):

    causal, T = S = 5     window (1, 1)        causal, keys past 3    bottom_right, T = 3, S = 5
    # . . . .             # # . . .            # . . . .              # # # . .
    # # . . .             # # # . .            # # . . .              # # # # .
    # # # . .             . # # # .            # # # . .              # # # # #
    # # # # .             . . # # #            # # # . .
    # # # # #             . . . # #            # # # . .

Both ends never decrease from one row to the next, so which blocks of keys a block of queries
visits, and the reverse, follow from the ends alone: see `pallas_kernels.blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jattn.call.band import Band
from jattn.call.sizes import as_index
from jattn.call.spec import AttentionSpec, Operands

__all__ = ["KeyIntervals", "hides_some", "past_zeroed", "visible"]

type Index = int | Array


@dataclass(frozen=True)
class KeyIntervals:
    """The interval of keys of each query: the band, clipped to the lengths.

    The lengths, and the offset from which the band counts queries, are integers, scalars, or arrays
    that broadcast with the indices asked for.
    """

    band: Band
    query_length: Index
    key_length: Index
    offset: Index = 0

    @staticmethod
    def of(
        spec: AttentionSpec,
        query_lengths: Array | None,
        key_lengths: Array | None,
        query_offset: Array | None,
    ) -> KeyIntervals:
        """The intervals of a call; lengths longer than the sequence are cut to it."""
        queries, keys = as_index(spec.queries), as_index(spec.keys)
        return KeyIntervals(
            band=spec.band,
            query_length=(
                queries if query_lengths is None else jnp.minimum(query_lengths, queries)
            ),
            key_length=keys if key_lengths is None else jnp.minimum(key_lengths, keys),
            offset=0 if query_offset is None else query_offset,
        )

    @staticmethod
    def of_batch(spec: AttentionSpec, operands: Operands, axes: int) -> KeyIntervals:
        """Those of all batch rows, for indices of `axes` axes that come after the batch's."""

        def column(x: Array | None) -> Array | None:
            return None if x is None else x.reshape(-1, *(1,) * axes)

        return KeyIntervals.of(
            spec,
            column(operands.query_lengths),
            column(operands.key_lengths),
            column(operands.query_offset),
        )

    @property
    def lower(self) -> Index | None:
        """Query i may see keys from i + lower; None: from the first."""
        return None if self.band.lower is None else self.offset + self.band.lower

    @property
    def upper(self) -> Index | None:
        """Query i may see keys to i + upper; None: to the last."""
        return None if self.band.upper is None else self.offset + self.band.upper

    def start(self, query: Index) -> Index:
        """The first key that `query` sees."""
        lower = self.lower
        return 0 if lower is None else _maximum(query + lower, 0)

    def end(self, query: Index) -> Index:
        """One past the last key that `query` sees."""
        upper = self.upper
        return self.key_length if upper is None else _minimum(query + upper + 1, self.key_length)

    def visible(self, query: Array, key: Array) -> Array:
        """Whether each query sees each key; the indices broadcast against each other."""
        return (key >= self.start(query)) & (key < self.end(query)) & (query < self.query_length)


def hides_some(spec: AttentionSpec) -> bool:
    """Whether anything but the shapes limits what a query sees."""
    return (
        spec.band != Band()
        or spec.has_query_lengths
        or spec.has_key_lengths
        or spec.has_segments
        or spec.mask_shape is not None
    )


def past_zeroed(x: Array, lengths: Array) -> Array:
    """x (B, rows, ...) with zeros past each row's length, as 0 * NaN is not 0."""
    inside = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
    return jnp.where(inside.reshape(*inside.shape, *(1,) * (x.ndim - 2)), x, 0)


def visible(spec: AttentionSpec, operands: Operands) -> Array:
    """The boolean mask that all of a call's masks stand for, broadcastable to (B, N, T, S).

    O(T * S) elements: the reference, and what `eager` uses.
    """
    intervals = KeyIntervals.of_batch(spec, operands, 3)
    query = jnp.arange(spec.queries, dtype=jnp.int32)[None, None, :, None]
    key = jnp.arange(spec.keys, dtype=jnp.int32)[None, None, None, :]
    mask = intervals.visible(query, key)
    if operands.query_segments is not None and operands.key_segments is not None:
        same = operands.query_segments[:, :, None] == operands.key_segments[:, None, :]
        mask = mask & same[:, None]
    if operands.mask is not None:
        mask = mask & operands.mask
    return mask


def _maximum(a: Index, b: Index) -> Index:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _minimum(a: Index, b: Index) -> Index:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)
