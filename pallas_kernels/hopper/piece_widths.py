"""Which matrices are plain rows, and in pieces how wide (`plain.py`).

Importing this imports no kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pallas_kernels.hopper.copies import copyable, padded_width

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = [
    "has_plain_pieces",
    "has_whole_values",
    "in_pieces",
    "needs_plain_rows",
    "piece_columns",
    "value_columns",
    "whole_or_pieces",
]

WIDTH = 64  # columns of 16 bits in the widest swizzle
LONG = 1200  # keys of which the last block may be an array of its own
NARROW = (WIDTH + 16, WIDTH + 48)  # value head dims of which one piece has 16 columns
LONG_NARROW = 512  # the same of them


def needs_plain_rows(spec: AttentionSpec) -> bool:
    """Whether copies in tiles would need padded arrays, and plain rows of one piece need none."""
    return _is_ragged(spec) and spec.head_dim == spec.value_dim == WIDTH


def has_plain_pieces(spec: AttentionSpec) -> bool:
    """The same of matrices of several pieces, or of one that an array's columns need not fill."""
    dims = (spec.head_dim, spec.value_dim)
    padded = _is_ragged(spec) or any(padded_width(x) != x for x in dims)
    # dQ in fragments of 128 columns is written in whole tiles.
    return padded and not 7 * 16 < spec.head_dim < 2 * WIDTH


def _is_ragged(spec: AttentionSpec) -> bool:
    return any(copyable(rows, 8) != rows for rows in (spec.queries, spec.keys))


def in_pieces(spec: AttentionSpec) -> bool:
    """Whether forward's matrices are pieces, copied as plain rows.

    Where arrays would be padded, or be in tiles of 16 columns: at 112 442 us in place of 544, at
    176 728 in place of 833; but at 80, of which the second piece is 16, 413 in place of 392 (with
    values whole 380 in place of 341). Past 128 such a piece is worth it: causal, B 4, N 16, 4k, at
    208 0.789 ms in place of 0.977.
    """
    dims = (spec.head_dim, spec.value_dim)
    if spec.bias_shape is not None:
        return min(dims) < WIDTH
    if _is_ragged(spec) or any(x < WIDTH or x % 16 or x % WIDTH == 48 for x in dims):
        return True
    if any(x > 2 * WIDTH and x % WIDTH == 16 for x in dims):
        return True
    return is_latent(spec)


def is_latent(spec: AttentionSpec) -> bool:
    """Whether outputs leave through two of the queries' three pieces.

    That makes room for blocks of 128 keys: 0.533 ms in place of 0.577, causal, B 4, N 16, T 4k.
    """
    dims = (spec.head_dim, spec.value_dim)
    return dims == (3 * WIDTH, 2 * WIDTH) and spec.bias_shape is None


def has_whole_values(spec: AttentionSpec) -> bool:
    """Whether the values of such a call are in tiles all the same, all or all but the last columns.

    Of pieces P V is a product each, of 64 columns, which takes longer than one of all. Of keys that
    are no multiple of 8 the last block is an array of its own (`whole_values.py`): 1,537 gain 11 to
    13% all the same, 1,201 3, 1,001 nothing. A product of 16 columns costs more than its share: 80
    gains 11% at 4,097, causal, 10 at 1,001 and 6 at 577, full; 112 18% at 4,096, causal.
    """
    return _has_whole(spec) and value_columns(spec)[0] > WIDTH


def _has_whole(spec: AttentionSpec) -> bool:
    long = min(LONG, LONG_NARROW) if spec.value_dim in NARROW else LONG
    return in_pieces(spec) and (spec.keys % 8 == 0 or spec.keys >= long)


def value_columns(spec: AttentionSpec) -> tuple[int, ...]:
    """The widths of such a call's values in shared memory.

    One of all columns, if that may be; else one of all whole pieces, of which there are two at
    least, and pieces of the rest; or pieces alone.
    """
    whole, parts = spec.value_dim // WIDTH, piece_columns(spec.value_dim)
    if not _has_whole(spec) or spec.value_dim <= WIDTH:
        return parts
    if spec.value_dim % 32 == 0 or spec.value_dim in NARROW:
        return (spec.value_dim,)
    return (whole * WIDTH, *parts[whole:]) if whole > 1 else parts


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
