"""Which key blocks a query block visits, and the reverse; which of them need an element mask.

Everything follows from `KeyIntervals`: each query sees keys [start(i), end(i)), and both ends never
decrease. So a block of queries visits the blocks from its first row's start to its last row's end,
and the blocks between its last row's start and its first row's end are wholly visible:

              key blocks
    rows      |     |     |     |     |
    q_start   | ....|#####|#####|## ..|      first                     = start(q_start) // block
              | ....|..###|#####|#####|      whole range [first, stop) = rows 2 to 4 here
    q_stop-1  | ....|....#|#####|#####|      unmasked range            = only block 2

A range is a pair (first, stop) of block indices, stop exclusive; an empty one has stop <= first.
All numbers may be Python integers or traced values; lengths and offset may hold a batch of rows,
and the ranges then do too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

if TYPE_CHECKING:
    from jattn.call.masking import KeyIntervals

__all__ = [
    "Range",
    "first_run",
    "first_true",
    "key_blocks",
    "query_blocks",
    "unmasked_key_blocks",
    "unmasked_query_blocks",
]

type Index = int | Array
type Range = tuple[Index, Index]


def key_blocks(intervals: KeyIntervals, q_start: Index, q_stop: Index, block: int) -> Range:
    """The key blocks in which some query of [q_start, q_stop) sees a key."""
    last = _low(q_stop, intervals.query_length) - 1
    first = intervals.start(q_start) // block
    stop = _ceil(intervals.end(last), block)
    return first, _where(last >= q_start, stop, first)


def unmasked_key_blocks(
    intervals: KeyIntervals, q_start: Index, q_stop: Index, block: int
) -> Range:
    """The key blocks of which every query of [q_start, q_stop) sees every key."""
    first = _ceil(intervals.start(q_stop - 1), block)
    stop = intervals.end(q_start) // block
    return first, _where(q_stop <= intervals.query_length, stop, first)


def query_blocks(intervals: KeyIntervals, k_start: Index, k_stop: Index, block: int) -> Range:
    """The query blocks in which some query sees a key of [k_start, k_stop)."""
    lower, upper = intervals.lower, intervals.upper
    last_key = _low(k_stop, intervals.key_length) - 1
    first = 0 if upper is None else _high(k_start - upper, 0)
    stop = intervals.query_length
    if lower is not None:
        stop = _low(stop, last_key - lower + 1)
    first_block, stop_block = first // block, _ceil(stop, block)
    return first_block, _where((last_key >= k_start) & (stop > first), stop_block, first_block)


def unmasked_query_blocks(
    intervals: KeyIntervals, k_start: Index, k_stop: Index, block: int
) -> Range:
    """The query blocks of which every query sees every key of [k_start, k_stop)."""
    lower, upper = intervals.lower, intervals.upper
    first = 0 if upper is None else _high(k_stop - 1 - upper, 0)
    stop = intervals.query_length
    if lower is not None:
        stop = _low(stop, k_start - lower + 1)
    first_block, stop_block = _ceil(first, block), stop // block
    return first_block, _where(k_stop <= intervals.key_length, stop_block, first_block)


def first_true(flags: Array) -> Array:
    """Where the first True stands along the last axis, int32; 0 if there is none."""
    return lax.argmax(flags, flags.ndim - 1, jnp.int32)


def first_run(flags: Array) -> tuple[Array, Array]:
    """Where the first run of True along the last axis begins and ends, int32; 0 twice if none does.

    Neither is found from the other, so that XLA makes one kernel of both.
    """
    axis = flags.ndim - 1
    after = lax.slice_in_dim(flags, 1, None, axis=axis)
    after = lax.pad(after, np.False_, [(0, int(i == axis), 0) for i in range(flags.ndim)])
    last = first_true(flags & ~after)
    return first_true(flags), jnp.where(flags.any(axis=axis), last + 1, 0)


def _ceil(x: Index, block: int) -> Index:
    return -(-x // block)


def _low(a: Index, b: Index) -> Index:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _high(a: Index, b: Index) -> Index:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _where(condition: bool | Array, a: Index, b: Index) -> Index:
    if isinstance(condition, bool):
        return a if condition else b
    return jnp.where(condition, _int32(a), _int32(b))


def _int32(x: Index) -> Any:
    return np.int32(x) if isinstance(x, int) else x
