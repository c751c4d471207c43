"""Matrices of up to 64 columns, copied as plain rows: arrays of any size are read in place.

wgmma wants a matrix in tiles of 8 rows by 64, 32 or 16 columns, and a copy in tiles wants an array
whose rows are a multiple of 8, and columns of a tile's. One tile wide, a matrix's tiles in a row
are the same bytes as its rows in a row; so the same shared memory has a second name under which it
is rows, and copies by that name are cut at the array's ends by the hardware, which reads zeros past
them. Matrices of more columns are pieces that are each one tile wide, next to each other:

    72 columns    q_smem 64    q1_smem 16, of which 8 are zero      S = Q Kᵀ + Q1 K1ᵀ

Forward's values and all of backward's are of one width, an axis of one matrix (.., pieces, rows,
columns), and a product is of all of them (`Seam.values_into`, `Seam.matmul_into`): 72 columns are
two pieces of 64 there, five of 16 here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.copies import swizzle_of
from pallas_kernels.hopper.seam import Ref, transforms

__all__ = [
    "columns_of",
    "cut",
    "fetch_pieces",
    "in_both_ways",
    "named",
    "parts_in",
    "parts_of",
    "piece_matrices",
    "piece_shape",
    "pieces",
    "places",
]


def piece_matrices(
    name: str, shape: tuple[int, ...], widths: tuple[int, ...], dtype: Any
) -> dict[str, Any]:
    """Shared memory of each piece, by name."""
    size = jnp.dtype(dtype).itemsize
    return {
        f"{name}{i or ''}_smem": plgpu.SMEM(
            (*shape, width), dtype, transforms=transforms(width, dtype, min(128, width * size))
        )
        for i, width in enumerate(widths)
    }


def in_both_ways(
    scratch: dict[str, Any], names: Iterable[str], *, interpret: bool
) -> dict[str, Any]:
    """The scratch memory, of which these have both names; the interpreter needs but one."""
    if interpret:
        return scratch
    made = dict(scratch)
    for name in scratch.keys() & set(names):
        tiles = scratch[name]
        rows = plgpu.SMEM(tiles.shape, tiles.dtype, transforms=tiles.transforms[1:])
        made[name] = plgpu.RefUnion(rows, tiles)
    return made


def named(scratch: dict[str, Any], names: Iterable[str], refs: Iterable[Ref]) -> SimpleNamespace:
    """The kernel's references by name; `x_rows` is what copies name `x_smem`."""
    found = {}
    for name, ref in zip(names, refs, strict=True):
        both = isinstance(scratch.get(name), plgpu.RefUnion)
        rows, tiles = ref if both else (ref, ref)
        found[name] = tiles
        if name.endswith("_smem"):
            found[name.removesuffix("smem") + "rows"] = rows
    return SimpleNamespace(**found)


def pieces(refs: Ref, name: str) -> tuple[Ref, ...]:
    """A matrix's pieces in shared memory, `name` being that of the first, like "q_smem"."""
    first, kind = name.split("_")
    found = [getattr(refs, name)]
    while (more := f"{first}{len(found)}_{kind}") in vars(refs):
        found.append(getattr(refs, more))
    return tuple(found)


def piece_shape(rows: int, columns: int, *, swizzle: int | None = None) -> tuple[int, int, int]:
    """Of a 16-bit matrix in pieces of one width: (pieces, rows, columns of each).

    swizzle: its bytes, where they are not to be the most that there can be.
    """
    width = (swizzle or swizzle_of(columns, 2)) // 2
    return columns // width, rows, width


def parts_of(ref: Ref, *slot: Any) -> list[Ref]:
    """The pieces (.., pieces, rows, columns) of a matrix in this slot of shared memory."""
    return [ref.at[(*slot, i)] for i in range(ref.shape[-3])]


def parts_in(matrix: Ref, slot: Any) -> list[Ref]:
    """The same of one that may be in tiles: (slots, rows, columns), one part."""
    return parts_of(matrix, slot) if len(matrix.shape) == 4 else [matrix.at[slot]]


def cut(x: Array, width: int) -> list[Array]:
    """An array's columns, so many at a time."""
    return [x[:, first : first + width] for first in range(0, x.shape[1], width)]


def places(
    array: Ref, place: tuple[Any, ...], parts: list[Ref], zero: Array
) -> list[tuple[Ref, Ref]]:
    """What of an array's rows is in which part of a matrix: (array, part), for each.

    zero: as `columns_of` wants it.
    """
    if len(parts) == 1 and parts[0].shape[-1] == array.shape[-1]:
        return [(array.at[place], parts[0])]
    columns = columns_of(tuple(parts), array.shape[-1], zero)
    return [(array.at[(*place, own)], part) for own, part in zip(columns, parts, strict=True)]


def fetch_pieces(
    array: Ref, place: tuple[Any, ...], part_at: Callable[[Any], Ref], count: int, full: Ref
) -> None:
    """Starts the copies of an array's rows to a matrix in pieces, one after another in a loop.

    part_at: given i, the i-th piece.
    full: the barrier at which they arrive.
    """
    width = part_at(0).shape[-1]

    def one(i: Array) -> Array:
        columns = pl.ds(i * np.int32(width), width)
        plgpu.copy_gmem_to_smem(array.at[(*place, columns)], part_at(i), full)
        return i + 1

    lax.while_loop(lambda i: i < count, one, place[0] * 0)


def columns_of(parts: tuple[Ref, ...], size: int, zero: Array) -> list[Any]:
    """Which columns of an array of `size` each of a matrix's pieces holds.

    zero: an index that is 0, unknown to jax, which would refuse what is known to end past the axis.
    """
    found, start = [], 0
    for part in parts:
        width = part.shape[-1]
        found.append(pl.ds(start if start + width <= size else start + zero, width))
        start += width
    return found
