"""How many programs a tile of a shared bias's gradient is given to; no kernel is imported."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from pallas_kernels.portable import tiles as tables

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec
    from pallas_kernels.portable.tiles import Tiles

__all__ = ["part_count", "partial_bytes"]

PROGRAMS = 528  # of four warps, about four for each multiprocessor
LEAST_ROWS = 8  # that are worth a program
MOST_PARTIAL = 8 << 20  # bytes of sums that are yet to be added


def part_count(spec: AttentionSpec, tiles: Tiles) -> int:
    """How many programs the rows that share a tile are given out to, each the same number."""
    assert spec.d_bias_shape is not None
    rows, heads, _, _ = spec.d_bias_shape
    programs = rows * heads * -(-spec.keys // tiles.keys) * -(-spec.queries // tiles.queries)
    most = min(PROGRAMS // programs, MOST_PARTIAL // (prod(spec.d_bias_shape) * 4))
    shared = spec.batch // rows
    fitting = (n for n in range(2, most + 1) if shared % n == 0 and shared // n >= LEAST_ROWS)
    return max(fitting, default=1)


def partial_bytes(spec: AttentionSpec) -> int:
    """Bytes of the sums that are yet to be added."""
    if spec.d_bias_shape is None or 1 in spec.d_bias_shape[2:]:
        return 0
    parts = part_count(spec, tables.bias_tiles(spec))
    return parts * prod(spec.d_bias_shape) * 4 if parts > 1 else 0
