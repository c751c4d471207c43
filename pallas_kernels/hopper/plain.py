"""Matrices of 64 columns, copied as plain rows: sequences of any length are read in place.

wgmma wants a matrix in tiles of 8 rows by 64 columns, and a copy in tiles wants an array whose rows
are a multiple of 8. One tile wide, its tiles in a row are the same bytes as its rows in a row; so
the same shared memory has a second name under which it is rows, and copies by that name are cut at
a sequence's end by the hardware, which reads zeros past it. Narrower heads are padded all the same:
jax 0.12 takes no slice that is known to end past its axis.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.hopper.seam import Ref, copyable

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["in_both_ways", "named", "needs_plain_rows"]

WIDTH = 64  # columns of 16 bits in the widest swizzle


def needs_plain_rows(spec: AttentionSpec) -> bool:
    """Whether copies in tiles would need padded arrays, and copies of plain rows need none."""
    ragged = any(copyable(rows, 8) != rows for rows in (spec.queries, spec.keys))
    return ragged and spec.head_dim == spec.value_dim == WIDTH


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
