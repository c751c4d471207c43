"""Tile shapes of the Hopper kernel of the tangent of the query's gradient, by head dim."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jattn.call.masking import hides_some
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.tiles import ROWS, SHARED_MEMORY, Tiles

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["BackwardTangentTiles", "choose_backward_tangent_tiles"]


@dataclass(frozen=True)
class BackwardTangentTiles(Tiles):
    """A thread block has queries, output gradients and their tangents; `stages` are of values.

    key_slots: blocks of keys in shared memory; each is needed a step longer than its values.
    holds: of clear blocks no wait for dP is moved before the making of P.
    """

    key_slots: int = 2
    holds: bool = False

    def shared_memory(self, spec: AttentionSpec, out_bytes: int = 2) -> int:
        """Bytes of shared memory, if all that can move does."""
        head, value = padded_width(spec.head_dim), padded_width(spec.value_dim)
        own = self.warpgroups * ROWS * 2 * (head + value)
        blocks = self.keys * 2 * (self.key_slots * head + self.stages * value)
        # Vectors: four for each row, and ids of segments in kilobytes of their own.
        small = 1024 * (2 + 2 * spec.has_segments)
        return (own + blocks) * 2 + small


def choose_backward_tangent_tiles(spec: AttentionSpec) -> BackwardTangentTiles:
    """The tiles for a call: as many in flight as shared memory has room for."""
    w = 1 if spec.queries <= ROWS else 2
    width = max(padded_width(spec.head_dim), padded_width(spec.value_dim))
    # Above 64, where masked blocks have loops, overlap spills 4 to 20 bytes.
    overlap = width <= 64 or not hides_some(spec)
    # ms on an H100, bf16, moved and held: causal 16k 2.56, 2.42, 1k 0.136, 0.132; a window of 1k at
    # 16k 0.415, 0.412. At 128 4.50, 4.55 and causal 2.23, 2.40.
    tiles = BackwardTangentTiles(
        w, keys=64, stages=1, query_slots=w, overlap=overlap, holds=width <= 64
    )
    for key_slots, stages in ((4, 3), (3, 2), (2, 2), (2, 1)):
        tiles = replace(tiles, key_slots=key_slots, stages=stages)
        if tiles.shared_memory(spec) <= SHARED_MEMORY:
            return tiles
    raise ValueError(f"{tiles} need more than {SHARED_MEMORY} bytes for head dims up to {width}")
