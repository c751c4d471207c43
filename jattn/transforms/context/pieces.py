"""Results of some heads at a time, put where they belong among those of all.

So that none of what a piece takes is held longer than the piece.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax import Array, lax

__all__ = ["put", "put_at"]


def put(
    whole: list[Array], piece: Sequence[Array], number: Array | int, pieces: int
) -> list[Array]:
    """Arrays (B, t, heads, ...) of all heads, with those of one of so many pieces.

    whole: those with the pieces before; empty where there are none.
    """
    before: Sequence[Array | None] = whole or [None] * len(piece)
    return [
        put_at(x, part, number * part.shape[2], pieces * part.shape[2])
        for x, part in zip(before, piece, strict=True)
    ]


def put_at(whole: Array | None, part: Array, first: Array | int, heads: int) -> Array:
    """An array of so many heads, with a part's from the first of its own on; None before any."""
    if whole is None:
        # All of it is to be written: zeros would be a pass over memory more.
        whole = lax.empty((*part.shape[:2], heads, *part.shape[3:]), part.dtype)
    found: Array = lax.dynamic_update_slice_in_dim(whole, part, first, axis=2)
    return found
