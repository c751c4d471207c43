"""Block sizes of the kernels of tangents: as `tiles`, by head dim, dtype and GPU.

They hold twice what the gradients' kernels do. Those of two-byte floats on Hopper up to 128 are the
fastest of those tried; elsewhere a tile is the largest tried that fits in shared memory and spills
no register (docs/kernels.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jattn.call.target import current_target
from pallas_kernels.portable.precision import term_count
from pallas_kernels.portable.tiles import BackwardTiles, Tiles

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["backward_tangent_tiles", "tangent_tiles"]


class Table(NamedTuple):
    """Of one width: the tiles of the output's tangent, and of the gradients' tangents."""

    tangent: Tiles
    backward: BackwardTiles


def _table(*rows: tuple[int, int, int, int]) -> Table:
    tangent, keys, queries, bias = (Tiles(*row) for row in rows)
    return Table(tangent, BackwardTiles(keys, queries, bias))


# By the larger head dim, up to. Of two-byte floats on Hopper, and on all others:
HOPPER = {
    64: _table((128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 3), (128, 64, 8, 2)),
    128: _table((128, 64, 8, 2), (32, 128, 8, 3), (128, 32, 8, 3), (128, 64, 8, 1)),
    256: _table((64, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2), (64, 32, 8, 1)),
    512: _table((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
OTHERS = {
    64: _table((128, 32, 8, 3), (32, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2)),
    128: _table((128, 32, 8, 2), (32, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 2)),
    256: _table((64, 16, 8, 2), (16, 16, 8, 2), (32, 16, 8, 2), (32, 16, 8, 1)),
    512: _table(*[(16, 16, 8, 1)] * 4),
}
# Of float32, in two terms as in three.
HOPPER_TERMS = {
    64: _table((64, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
    128: _table((16, 32, 4, 1), *[(16, 16, 4, 1)] * 3),
}
OTHERS_TERMS = {
    64: _table((16, 32, 4, 1), (16, 16, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    128: _table((16, 16, 4, 1), *[(16, 16, 8, 1)] * 3),
}


def tangent_tiles(spec: AttentionSpec) -> Tiles:
    """Those of the kernel of the output's tangent."""
    return _fitting(spec, _table_of(spec).tangent)


def backward_tangent_tiles(spec: AttentionSpec) -> BackwardTiles:
    """Those of the kernels of the gradients' tangents."""
    return BackwardTiles(*(_fitting(spec, tiles) for tiles in _table_of(spec).backward))


def _fitting(spec: AttentionSpec, tiles: Tiles) -> Tiles:
    """The same with fewer in flight where a bias or dense mask, and its tangent, are in memory too:
    one, or on Hopper two if there is one of them, of two bytes at most.
    """
    if spec.bias_shape is None and spec.mask_shape is None:
        return tiles
    are_both = spec.bias_shape is not None and spec.mask_shape is not None
    is_wide = spec.bias_dtype is not None and spec.bias_dtype.itemsize > 2
    is_one = are_both or is_wide or not _is_hopper()
    return tiles._replace(stages=1 if is_one else min(tiles.stages, 2))


def _is_hopper() -> bool:
    return current_target().compute_capability in (None, (9, 0))


def _table_of(spec: AttentionSpec) -> Table:
    halves, terms = OTHERS, OTHERS_TERMS
    if _is_hopper():
        halves, terms = HOPPER, HOPPER_TERMS
    found = halves if term_count(spec) == 1 else terms
    size = max(spec.head_dim, spec.value_dim)
    return found[min(width for width in found if width >= size)]
