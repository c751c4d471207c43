"""Cross-entropy of an output layer, some positions at a time: all logits are never there at once.

    Z = cap tanh(X Wᵀ / cap)                       cap, where there is one
    loss  = sum of  log sum exp Z_i - Z_i[y_i]     over the positions i that have a target y_i
    dZ    = (softmax Z - one hot of y) (1 - (Z / cap)²)
    dX    = dZ W        dW = dZᵀ X

A vocabulary of 128,256 at 32,768 positions has 16 GiB of float32 logits. A chunk's are made once:
where slopes are wanted, they are taken while the chunk's logits are there, and kept in X's and W's
sizes; backward only scales them.

    positions    0 1 2 3 4 5 6 7 8 9       3 chunks: those that are equal modulo 3, so that
    chunk        0 1 2 0 1 2 0 1 2 0       a sequence cut over devices has a part of each on each

B rows, T positions, D width, V vocabulary, n chunks of c positions a row.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from models.decoder.layers import product

__all__ = ["mean_cross_entropy"]

_LOGITS_BYTES = 1 << 30  # of one chunk: products large enough for a GPU, and a part of its memory


def mean_cross_entropy(
    x: Array,
    head: Array,
    targets: Array,
    *,
    soft_cap: float | None = None,
    chunk: int | None = None,
) -> Array:
    """The mean over all positions that have a target, in nats; 0 if none has.

    It can be differentiated in either mode and more than once.

    Args:
        x: what the output layer is given, (B, T, D).
        head: its weight, (V, D); of another dtype than x it is cast.
        targets: integers (B, T): the token that follows each position, negative for none. One that
            the vocabulary lacks makes NaN.
        soft_cap: cap * tanh(logits / cap) of the logits.
        chunk: positions of each row whose logits are made at once; None for about a gibibyte of
            them.

    Returns:
        float32 ().
    """
    batch, length = targets.shape
    if chunk is None:
        chunk = max(1, _LOGITS_BYTES // (4 * batch * head.shape[0]))
    count = -(-length // chunk)
    size = -(-length // count)
    targets = targets.astype(jnp.int32)
    if count * size > length:
        padding = ((0, 0), (0, count * size - length))
        x = jnp.pad(x, (*padding, (0, 0)))
        targets = jnp.pad(targets, padding, constant_values=-1)

    def dealt(whole: Array) -> Array:
        parts = whole.reshape(batch, size, count, *whole.shape[2:])
        return jnp.moveaxis(parts, 2, 0)

    total = _summed(dealt(x), head, dealt(targets), soft_cap)
    return total / jnp.maximum((targets >= 0).sum(), 1).astype(jnp.float32)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _summed(x: Array, head: Array, targets: Array, soft_cap: float | None) -> Array:
    """float32 (), of chunks (n, B, c, D) and (n, B, c)."""
    head = head.astype(x.dtype)

    def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _losses(_logits(chunk[0], head, soft_cap), chunk[1]), None

    total: Array = _over_chunks(add, jnp.float32(0), (x, targets))[0]
    return total


@partial(_summed.defjvp, symbolic_zeros=True)
def _summed_tangent(
    soft_cap: float | None, primals: tuple[Array, Array, Array], tangents: tuple[Any, Any, Any]
) -> tuple[Array, Array]:
    x, head, targets = primals
    moves = [not isinstance(t, jax.custom_derivatives.SymbolicZero) for t in tangents[:2]]
    total, slopes = _with_slopes(x, head, targets, soft_cap, (moves[0], moves[1]))
    tangent = jnp.float32(0)
    for slope, along in zip(slopes, tangents[:2], strict=True):
        if slope is not None:
            # No `vdot`: what it makes flat is gathered from all devices.
            tangent += (slope.astype(jnp.float32) * along.astype(jnp.float32)).sum()
    return total, tangent


def _with_slopes(
    x: Array, head: Array, targets: Array, soft_cap: float | None, wanted: tuple[bool, bool]
) -> tuple[Array, tuple[Array | None, Array | None]]:
    """The sum, and its slopes by x, (n, B, c, D) in its dtype, and by the head, float32 (V, D)."""
    cast = head.astype(x.dtype)

    @partial(jax.checkpoint, prevent_cse=False)  # of second derivatives
    def add(
        so_far: tuple[Array, Array | None], chunk: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array | None], Array | None]:
        total, by_head = so_far
        x, targets = chunk
        logits = _logits(x, cast, soft_cap)
        total = total + _losses(logits, targets)
        slope = _slope(logits, targets, soft_cap).astype(x.dtype)
        if by_head is not None:
            rows = (((0, 1), (0, 1)), ((), ()))
            by_head = by_head + jax.lax.dot_general(
                slope, x, rows, preferred_element_type=jnp.float32
            )
        by_x = jax.lax.dot_general(slope, cast, (((2,), (0,)), ((), ()))) if wanted[0] else None
        return (total, by_head), by_x

    nothing = jnp.zeros(head.shape, jnp.float32) if wanted[1] else None
    (total, by_head), by_x = _over_chunks(add, (jnp.float32(0), nothing), (x, targets))
    return total, (by_x, by_head)


def _over_chunks(add: Any, start: Any, chunks: tuple[Array, Array]) -> Any:
    """A scan; of a single chunk without a loop."""
    return jax.lax.scan(add, start, chunks, unroll=len(chunks[0]) == 1)


def _logits(x: Array, head: Array, soft_cap: float | None) -> Array:
    logits = product(x, head, preferred_element_type=jnp.float32)
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _losses(logits: Array, targets: Array) -> Array:
    """float32 (): the sum over (B, c)."""
    place = jnp.maximum(targets, 0)[..., None]
    own = jnp.take_along_axis(logits, place, axis=-1, mode="fill")[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - own
    return jnp.where(targets >= 0, losses, 0).sum()


def _slope(logits: Array, targets: Array, soft_cap: float | None) -> Array:
    """float32 (B, c, V): by the product of x and head."""
    tokens = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None]
    slope = jax.nn.softmax(logits, axis=-1) - (tokens == targets[..., None]).astype(logits.dtype)
    if soft_cap is not None:
        slope *= 1 - jnp.square(logits / soft_cap)
    # No `where`: its zeros, as large as a chunk's logits, would be kept beside the loop.
    return slope * (targets >= 0).astype(slope.dtype)[..., None]
