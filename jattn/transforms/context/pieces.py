"""Results of some heads at a time, put where they belong among those of all.

So that none of what a piece takes is held longer than the piece.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax import Array, lax

__all__ = ["put"]


def put(
    whole: list[Array], piece: Sequence[Array], number: Array | int, pieces: int
) -> list[Array]:
    """Arrays (B, t, heads, ...) of all heads, with those of one of so many pieces.

    whole: those with the pieces before; empty where there are none.
    """
    if not whole:
        shapes = [(*x.shape[:2], pieces * x.shape[2], *x.shape[3:]) for x in piece]
        # All of it is to be written: zeros would be a pass over memory more.
        whole = [lax.empty(shape, x.dtype) for shape, x in zip(shapes, piece, strict=True)]
    return [
        lax.dynamic_update_slice_in_dim(x, part, number * part.shape[2], axis=2)
        for x, part in zip(whole, piece, strict=True)
    ]
