"""What is done to each element of a tile of logits, alike in every kernel.

    z = Q Kᵀ scale      x = cap tanh(z / cap) + bias      -inf where the query does not see the key

A tile is a matrix, queries down and keys across or the other way round; positions come as index
arrays that broadcast to it. Each part is left out of the kernel's text where the call lacks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array

from jattn.call import dropout
from pallas_kernels.portable.triton import LOG2E, Index, Mask, load, multiply_add, zero_below

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Shape4

__all__ = [
    "Logits",
    "Place",
    "base",
    "both",
    "dropped",
    "logits",
    "matrix",
    "may_hide",
    "placed",
    "scale_of",
]


@dataclass(frozen=True)
class Place:
    """Where a tile lies: its batch row, heads, queries and keys.

    `query` and `key` are matrices of one row or one column; `head` is a scalar or shaped as
    `query`. `queries_inside` and `keys_inside` say which of them exist; None if all do. `masked`:
    whether some query may not see some key that exists.
    """

    batch: Array
    head: Array
    query: Array
    key: Array
    first_key: Array
    queries_inside: Mask = None
    keys_inside: Mask = None
    masked: bool = True


class Logits(NamedTuple):
    """x and c such that x c are the logits in base 2; and tanh(z / cap), or None without a cap."""

    x: Array
    c: float
    tanh: Array | None


def both(a: Mask, b: Mask) -> Mask:
    """a & b, where None is True."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def placed(spec: AttentionSpec, name: str, shape: Shape4, at: Place) -> tuple[Index, Mask]:
    """Where a tile's elements are in a bias, its gradient or a mask, by name; which exist."""
    indices = (spec.rows(name).row(at.batch), at.head, at.query, at.key)
    index = tuple(0 if n == 1 else i for n, i in zip(shape, indices, strict=True))
    by_row, by_key = (any(jnp.ndim(i) for i in part) for part in (index[1:3], index[3:]))
    inside = both(at.queries_inside if by_row else None, at.keys_inside if by_key else None)
    return index, inside


def scale_of(spec: AttentionSpec, refs: SimpleNamespace, batch: Array) -> Array | float:
    """What Q Kᵀ is multiplied by: a number, or read where it is an array."""
    if spec.scale is not None:
        return spec.scale
    own: Array = load(refs.scale, (batch if refs.scale.shape[0] > 1 else 0,))
    return own


def logits(spec: AttentionSpec, refs: SimpleNamespace, at: Place, s: Array) -> Logits:
    """The logits of a tile whose Q Kᵀ is s."""
    scale = scale_of(spec, refs, at.batch)
    cap = spec.logits_soft_cap
    x, c, tanh = s, base(spec), None
    seen = _seen(spec, refs, at)
    if cap is not None:
        if seen is not None:
            x = jnp.where(seen, x, 0.0)  # the slope at a NaN, times a gradient of 0, would be NaN
        x = tanh = _tanh(spec, x * (scale / cap))
    if spec.bias_shape is not None:
        index, inside = placed(spec, "bias", spec.bias_shape, at)
        bias = matrix(load(refs.bias, index, inside)).astype(jnp.float32)
        x = multiply_add(x, scale if cap is None else cap, bias)
    elif cap is None and (spec.scale is None or spec.scale <= 0):
        x = x * scale
    if seen is not None:
        x = jnp.where(seen, x, -jnp.inf)
    return Logits(x, c, tanh)


def base(spec: AttentionSpec) -> float:
    """The factor c of all `Logits` of a call, which is positive."""
    if spec.bias_shape is not None:
        return LOG2E
    if spec.logits_soft_cap is not None:
        return spec.logits_soft_cap * LOG2E
    return spec.scale * LOG2E if spec.scale is not None and spec.scale > 0 else LOG2E


def dropped(spec: AttentionSpec, refs: SimpleNamespace, at: Place, p: Array) -> Array:
    """p with zeros where dropout drops; what is kept is not scaled."""
    if spec.dropout_rate == 0:
        return p
    index = (at.batch, 0 if spec.broadcast_dropout else at.head, at.query)
    row = (
        load(refs.row_words, index, at.queries_inside),
        load(refs.more_words, index, at.queries_inside),
    )
    first = at.first_key
    if spec.dropout_from != "zero":
        first = first + load(refs.dropout_key, (0,))
    bits = dropout.element_bits(row, dropout.key_words(at.key - at.first_key + first))
    return zero_below(p, bits, dropout.limit(spec.dropout_rate))


def may_hide(spec: AttentionSpec) -> bool:
    """Whether logits may be -inf in blocks that need no element mask."""
    return spec.bias_shape is not None or spec.mask_shape is not None


def _seen(spec: AttentionSpec, refs: SimpleNamespace, at: Place) -> Mask:
    """Which queries see which keys; None if all do. Says nothing of queries that do not exist."""
    seen: Mask = None
    if at.masked:
        seen = at.keys_inside
        offset = load(refs.query_offset, (at.batch,)) if spec.has_query_offset else 0
        if spec.band.lower is not None:
            seen = both(seen, at.key >= at.query + (offset + spec.band.lower))
        if spec.band.upper is not None:
            seen = both(seen, at.key <= at.query + (offset + spec.band.upper))
        if spec.has_segments:
            query = load(refs.query_segments, (at.batch, at.query), at.queries_inside)
            key = load(refs.key_segments, (at.batch, at.key), at.keys_inside)
            seen = both(seen, query == key)
    if spec.mask_shape is not None:
        index, inside = placed(spec, "mask", spec.mask_shape, at)
        mask = load(refs.mask, index, inside, False)
        seen = both(seen, matrix(mask).astype(jnp.int32) != 0)
    return seen


def matrix(x: Array) -> Array:
    """What was loaded, a scalar as a matrix of one element."""
    return x.reshape(1, 1) if x.ndim == 0 else x


def _tanh(spec: AttentionSpec, y: Array) -> Array:
    if spec.dtype == jnp.float32:
        return jnp.tanh(y)
    # The instruction tanh.approx is off by up to 2^-11; 1 - 2 / (e + 1) would lose three times as
    # much of a small y.
    e = jnp.exp2(jnp.minimum(y * (2 * LOG2E), 64.0))
    return (e - 1) / (e + 1)
