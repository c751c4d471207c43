"""Tile shapes of the Hopper kernel of the output's tangent, by head dim."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.tiles import ROWS, SHARED_MEMORY, Tiles

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["TangentTiles", "choose_tangent_tiles"]


@dataclass(frozen=True)
class TangentTiles(Tiles):
    """A thread block has queries and their tangents; `stages` are of keys, values and theirs."""

    @property
    def key_slots(self) -> int:
        """Blocks of keys in shared memory."""
        return self.stages

    def shared_memory(self, spec: AttentionSpec, out_bytes: int = 2) -> int:
        """Bytes of shared memory, if all that can move does."""
        head, value = padded_width(spec.head_dim), padded_width(spec.value_dim)
        rows = self.warpgroups * ROWS
        own = rows * (2 * head + value * self.own_staging) * 2
        # Vectors, in kilobytes of their own: three for each row, mu, and ids of segments.
        small = 1024 * (2 + (self.warpgroups > 1) + 2 * spec.has_segments)
        return own + self.stages * self.keys * 2 * (head + value) * 2 + small


def choose_tangent_tiles(spec: AttentionSpec) -> TangentTiles:
    """The tiles for a call: as many in flight as shared memory has room for."""
    width = max(padded_width(spec.head_dim), padded_width(spec.value_dim))
    w = 1 if spec.queries <= ROWS else 3 if width <= 64 else 2
    tiles = TangentTiles(w, keys=64, stages=4 if width <= 64 else 2, query_slots=w)
    in_place = padded_width(spec.head_dim) == padded_width(spec.value_dim)
    for stages, own in product(range(tiles.stages, 0, -1), (True, False)):
        fitted = replace(tiles, stages=stages, own_staging=own)
        if (own or in_place) and fitted.shared_memory(spec) <= SHARED_MEMORY:
            return fitted
    raise ValueError(f"{tiles} need more than {SHARED_MEMORY} bytes for head dims up to {width}")
