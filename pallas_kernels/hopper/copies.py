"""Sizes that arrays must have for the TMA unit to copy them in tiles."""

from __future__ import annotations

__all__ = ["backward_width", "copyable", "padded_width", "swizzle_of"]


def padded_width(columns: int) -> int:
    """Columns that a 16-bit matrix takes in shared memory: whole rows of some swizzle."""
    return -(-columns // 64) * 64 if columns < 64 else -(-columns // 16) * 16


def backward_width(columns: int) -> int:
    """The same of backward's: past 128 columns rows of 32, as narrower ones spill there."""
    return padded_width(columns) if columns <= 128 else -(-columns // 32) * 32


def copyable(size: int, tile: int) -> int:
    """The size at least this that an array's axis must have to be copied in tiles."""
    return size if size < tile else -(-size // tile) * tile


def swizzle_of(columns: int, size: int) -> int:
    """Bytes of the widest swizzle for rows of this many elements of `size` bytes."""
    return next(s for s in (128, 64, 32) if columns * size % s == 0)
