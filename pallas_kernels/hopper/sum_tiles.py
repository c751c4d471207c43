"""How the gradient of a bias that is shared is cut. Importing this imports no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jattn.call.masking import hides_some
from pallas_kernels.hopper.bias_form import d_bias_sharers
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.tiles import ROWS, SHARED_MEMORY

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["CHUNK", "QUERIES", "WARPGROUPS", "SumTiles", "choose_sum_tiles", "partial_bytes"]

MULTIPROCESSORS = 132
CHUNK = 64  # keys of a product
WARPGROUPS = 2
QUERIES = WARPGROUPS * ROWS
ENOUGH = MULTIPROCESSORS * 9 // 10  # tiles that are worth their size though some have none
MOST_PARTIAL = 8 << 20  # bytes of sums that are yet to be added


@dataclass(frozen=True)
class SumTiles:
    """How the gradient is cut.

    keys: of a tile, a multiple of 64.
    sharers: of those that share the bias, how many are in shared memory with their queries.
    stages: chunks of keys and values in flight.
    parts: thread blocks that a tile's sharers are shared out to.
    """

    keys: int
    sharers: int
    stages: int
    parts: int = 1

    @property
    def chunks(self) -> int:
        """Chunks of a tile."""
        return self.keys // CHUNK

    def shared_memory(self, spec: AttentionSpec) -> int:
        """Bytes."""
        assert spec.bias_dtype is not None
        columns = padded_width(spec.head_dim) + padded_width(spec.value_dim)
        matrices = (self.sharers * QUERIES + self.stages * CHUNK) * columns * 2
        vectors = 2048 * self.sharers + 1024 * (self.sharers + self.stages) * spec.has_segments
        return matrices + vectors + QUERIES * self.keys * spec.bias_dtype.itemsize


def choose_sum_tiles(spec: AttentionSpec) -> SumTiles:
    """The tiles for a call."""
    assert spec.bias_dtype is not None
    _, _, sharers = d_bias_sharers(spec)
    # As many registers of sums as the products leave, or shared memory has of a float32 bias.
    keys = 256 if spec.bias_dtype.itemsize == 2 else 128
    if keys > 128 and hides_some(spec) and max(spec.head_dim, spec.value_dim) <= 64:
        keys = 192  # 256 would spill 100 bytes
    parts = 1
    if _blocks(spec, keys) < ENOUGH:
        keys = 128
        blocks = _blocks(spec, keys)
        most = MOST_PARTIAL // (blocks * QUERIES * keys * 4)
        parts = max(1, min(MULTIPROCESSORS // blocks, most, sharers // 4))
    sizes = ((2, 4), (2, 3), (1, 4), (1, 3), (2, 2), (1, 2))
    # Of 256 keys, some of them hidden, four stages spill, see docs/kernels.md, 61.
    most = 3 if keys > 192 and hides_some(spec) else 4
    tiles = [SumTiles(keys, own, stages, parts) for own, stages in sizes if stages <= most]
    return next(x for x in tiles if x.shared_memory(spec) <= SHARED_MEMORY)


def _blocks(spec: AttentionSpec, keys: int) -> int:
    rows, heads, _ = d_bias_sharers(spec)
    return rows * heads * -(-spec.queries // QUERIES) * -(-spec.keys // keys)


def partial_bytes(spec: AttentionSpec) -> int:
    """Bytes of the sums that are yet to be added."""
    tiles = choose_sum_tiles(spec)
    if tiles.parts == 1:
        return 0
    return tiles.parts * _blocks(spec, tiles.keys) * QUERIES * tiles.keys * 4
