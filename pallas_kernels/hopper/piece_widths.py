"""Which matrices are plain rows, and in pieces how wide (`plain.py`).

Importing this imports no kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pallas_kernels.hopper.copies import backward_width, copyable, padded_width, swizzle_of

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = [
    "MOST_UNROLLED",
    "has_many_pieces",
    "has_plain_pieces",
    "in_pieces",
    "is_latent",
    "needs_plain_rows",
    "parts_in_pieces",
    "piece_columns",
    "value_pieces",
    "whole_or_pieces",
]

WIDTH = 64  # columns of 16 bits in the widest swizzle
# Pieces of a matrix that backward copies without a loop where its loading warpgroup, which has 24
# registers, claims blocks of dQ.
MOST_UNROLLED = 4
NARROW = (WIDTH + 16, WIDTH + 48)  # head dims of which one piece has 16 columns


def needs_plain_rows(spec: AttentionSpec) -> bool:
    """Whether copies in tiles would need padded arrays, and plain rows of one piece need none."""
    return _is_ragged(spec) and spec.head_dim == spec.value_dim == WIDTH


def has_plain_pieces(spec: AttentionSpec) -> bool:
    """The same of backward's of several pieces, or of one that an array's columns need not fill."""
    dims = (spec.head_dim, spec.value_dim)
    return _is_ragged(spec) or any(backward_width(x) != x for x in dims)


def has_many_pieces(spec: AttentionSpec) -> bool:
    """Whether a matrix of backward's, where they are in pieces, has more than `MOST_UNROLLED`."""
    padded = (backward_width(x) for x in (spec.head_dim, spec.value_dim))
    return any(2 * x // swizzle_of(x, 2) > MOST_UNROLLED for x in padded)


def _is_ragged(spec: AttentionSpec) -> bool:
    return any(copyable(rows, 8) != rows for rows in (spec.queries, spec.keys))


def in_pieces(spec: AttentionSpec) -> bool:
    """Whether forward's matrices are pieces, copied as plain rows.

    Where arrays would be padded, or be in tiles of 16 columns: at 112 442 us in place of 544, at
    176 728 in place of 833.
    """
    dims = (spec.head_dim, spec.value_dim)
    if spec.bias_shape is not None:
        return min(dims) < WIDTH
    if _is_ragged(spec) or any(x < WIDTH or x % 32 for x in dims):
        return True
    return is_latent(spec)


def parts_in_pieces(spec: AttentionSpec) -> bool:
    """The same where outputs are parts, which go out in tiles: where arrays would be padded."""
    padded = any(padded_width(x) != x for x in (spec.head_dim, spec.value_dim))
    return in_pieces(spec) and (_is_ragged(spec) or padded)


def is_latent(spec: AttentionSpec) -> bool:
    """Whether outputs leave through two of the queries' three pieces.

    That makes room for blocks of 128 keys: 0.533 ms in place of 0.577, causal, B 4, N 16, T 4k.
    """
    dims = (spec.head_dim, spec.value_dim)
    return dims == (3 * WIDTH, 2 * WIDTH) and spec.bias_shape is None


def value_pieces(spec: AttentionSpec) -> tuple[int, int]:
    """How many pieces such a call's values are, and the columns of each: all of one width.

    P V is one product of all of them (`wide_products.py`). Past 128 columns pieces of 32 where they
    leave less empty, as there is no room to spare.
    """
    dim = spec.value_dim
    by_32 = dim > 2 * WIDTH and 0 < dim % WIDTH <= 32
    width = 32 if by_32 else WIDTH
    return -(-dim // width), width


def piece_columns(columns: int) -> tuple[int, ...]:
    """The pieces of a matrix of this many columns: of 64, and of 32 and 16 what they leave."""
    whole, rest = divmod(columns, WIDTH)
    if (rest > 48 or (whole and rest > 32)) and columns not in NARROW:
        return (WIDTH,) * (whole + 1)
    rests = {0: (), 1: (16,), 2: (32,), 3: (32, 16)}
    return (WIDTH,) * whole + rests[-(-rest // 16)]


def whole_or_pieces(columns: int, *, pieces: bool) -> tuple[int, ...]:
    """The widths of a matrix in shared memory."""
    return piece_columns(columns) if pieces else (padded_width(columns),)
