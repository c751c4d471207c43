"""Positions of tokens: counted in each document, and as the angles by which heads are turned."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["RotaryTable", "document_positions", "rotate", "table_of"]

type RotaryTable = tuple[jax.Array, jax.Array]
"""(cos, cos) and (-sin, sin), each float32 (B or 1, T, 1, 2, H / 2)."""


def document_positions(segment_ids: jax.Array) -> jax.Array:
    """Position of each token inside its document, counted from 0.

    Args:
        segment_ids: int32 (B, T); a document is a run of equal ids.

    Returns:
        int32 (B, T).
    """
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.pad(
        segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def table_of(cosine: jax.Array, sine: jax.Array) -> RotaryTable:
    """The table that `rotate` takes, of a cosine and a sine for each pair.

    Args:
        cosine: float32 (B or 1, T, H / 2).
        sine: float32 of the same shape.
    """
    return (
        jnp.stack((cosine, cosine), axis=-2)[:, :, None],
        jnp.stack((-sine, sine), axis=-2)[:, :, None],
    )


def rotate(x: jax.Array, table: RotaryTable) -> jax.Array:
    """Turns each pair (x[i], x[i + H / 2]) of (B, T, heads, H) by its position's angle."""
    straight, crossed = table
    # The halves swapped by reversal: XLA then makes one pass of it, both ways.
    halves = x.reshape(*x.shape[:-1], 2, -1).astype(jnp.float32)
    turned = halves * straight + jnp.flip(halves, axis=-2) * crossed
    return turned.astype(x.dtype).reshape(x.shape)
