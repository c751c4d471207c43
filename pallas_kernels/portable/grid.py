"""Which program computes what: the order in which a grid's programs start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jax import Array

from pallas_kernels.portable.triton import place_in

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["Grid", "grid_of", "key_grid", "query_grid"]


@dataclass(frozen=True)
class Grid:
    """Programs by (tile, head, batch row), the first axis of `order` changing fastest.

    A head's tiles start together, as they read the same keys and values; but batch rows do where
    they share a bias, which is then read from memory once.
    """

    order: tuple[str, str, str]
    sizes: tuple[int, int, int]
    backwards: bool

    def place(self) -> tuple[Array, Array, Array]:
        """Tile, head and batch row of the program that asks."""
        ids = dict(zip(self.order, place_in(self.sizes), strict=True))
        tile = ids["tile"]
        if self.backwards:
            tile = self.sizes[self.order.index("tile")] - 1 - tile
        return tile, ids["head"], ids["batch"]


def grid_of(spec: AttentionSpec, *, tiles: int, heads: int, last_first: bool) -> Grid:
    """The grid of a kernel; last_first: the last tile has the most to do, so it starts first."""
    shared_bias = spec.bias_shape is not None and spec.bias_shape[0] < spec.batch
    sizes = {"tile": tiles, "head": heads, "batch": spec.batch}
    order = ("batch", "tile", "head") if shared_bias else ("tile", "head", "batch")
    a, b, c = order
    return Grid((a, b, c), (sizes[a], sizes[b], sizes[c]), last_first)


def query_grid(spec: AttentionSpec, queries: int) -> Grid:
    """A program for each tile of so many queries of a head; causal, the last sees most keys."""
    tiles = -(-spec.queries // queries)
    return grid_of(spec, tiles=tiles, heads=spec.heads, last_first=spec.band.upper is not None)


def key_grid(spec: AttentionSpec, keys: int) -> Grid:
    """A program for each tile of so many keys of a key head; causal, the first sees most."""
    return grid_of(spec, tiles=-(-spec.keys // keys), heads=spec.kv_heads, last_first=False)
