"""Tile shapes of the Hopper forward kernel, by head dim."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pallas_kernels.hopper.seam import padded_width

if TYPE_CHECKING:
    from jattn.spec import AttentionSpec

__all__ = ["ROWS", "SHARED_MEMORY", "Tiles", "choose_tiles"]

ROWS = 64  # query rows of one compute warpgroup: wgmma's M
SHARED_MEMORY = 232448 - 4096  # bytes a block may use on sm_90, less barriers and alignment


@dataclass(frozen=True)
class Tiles:
    """How a thread block is cut. It never changes what is computed.

    warpgroups: compute warpgroups, each of 64 query rows; one more loads.
    keys: keys a step visits.
    stages: key and value blocks in flight.
    overlap: the softmax of a block runs while the product before it does.
    in_turn: warpgroups issue their products one after another.
    own_staging: the output waits for its copy beside the queries, not in their place, so that the
      next tile's queries can be on their way meanwhile.
    heads_together: the fewest heads whose tiles are computed side by side; more where their keys
      and values fit in L2.
    round_early: weights are rounded while the product before is in flight. With one loop of steps
      this is faster; with several ptxas then waits for every single product (C7513).
    """

    warpgroups: int
    keys: int
    stages: int
    overlap: bool = True
    in_turn: bool = False
    persistent: bool = True
    own_staging: bool = True
    heads_together: int = 8
    round_early: bool = False

    @property
    def registers(self) -> tuple[int, int] | None:
        """Registers of a compute and of the loading thread, of 64 Ki over the block's threads."""
        # 240 + 240 + 24 and 3 x 160 + 32 are 504 and 512 registers for each of 128 threads.
        return {1: None, 2: (240, 24), 3: (160, 32)}[self.warpgroups]

    def shared_memory(self, spec: AttentionSpec, out_bytes: int) -> int:
        """Bytes of shared memory, with outputs of this many bytes an element."""
        rows = self.warpgroups * ROWS
        head, value = padded_width(spec.head_dim), padded_width(spec.value_dim)
        rings = self.stages * self.keys * (head + value) * 2
        small = rows * 4 + (rows + self.stages * self.keys) * 4 * spec.has_segments
        staging = value * out_bytes if self.own_staging else 0
        return rows * (head * 2 + staging) + rings + small


def choose_tiles(spec: AttentionSpec, rows: int, out_bytes: int) -> Tiles:
    """The tiles for a call whose query tiles need hold no more than `rows` rows.

    out_bytes: bytes of an element that the kernel writes, 4 if its outputs are still to be joined.
    """
    # TFLOP/s on an H200, bf16, 16,384 tokens, heads x head dim 2048; T = 16k, 4k, 1k.
    width = max(padded_width(spec.head_dim), padded_width(spec.value_dim))
    short = spec.band.upper is not None and spec.queries < 2048
    if rows <= ROWS:
        # Few queries are bound by memory: one warpgroup, and every byte of it for keys in flight.
        tiles = Tiles(1, 128 if width <= 128 else 64, 4, persistent=False)
    elif width <= 64 and short:
        # A tile of 192 rows is mostly hidden or past the end: causal 302 at 1k, 262 with it.
        tiles = Tiles(2, 128, 4)
    elif width <= 64:
        # Causal 525, 450, 262; full 568, 523, 422. Not in turn: 523, 427, 252; 570, 509, 391.
        # Two warpgroups: causal 451, 412, 302; a list of tiles loses to none at 16k alone (530).
        tiles = Tiles(3, 128, 3, in_turn=True)
    elif width <= 128:
        # Causal 706, 645, 462; full 714, 675, 570. No list: causal 707, 630, 407.
        # In turn: causal 710, full 700 at 16k. Keys by 64: full 625 at 16k.
        tiles = Tiles(2, 128, 2)
    else:
        # Causal 775, 705, 496; full 784, 747, 620. With a list: causal 750, 689, 488.
        # There is no room for blocks of 128 keys, nor for an output beside the queries.
        tiles = Tiles(2, 64, 2, persistent=False, round_early=not _masked(spec, 64))
    return _fit(spec, tiles, out_bytes)


def _masked(spec: AttentionSpec, keys: int) -> bool:
    from jattn.masking import hides_some

    return hides_some(spec) or spec.keys % keys != 0


def _fit(spec: AttentionSpec, tiles: Tiles, out_bytes: int) -> Tiles:
    """The tiles with as many stages, and a staging of its own, as shared memory has room for."""
    if tiles.shared_memory(spec, out_bytes) <= SHARED_MEMORY:
        return tiles
    if tiles.stages > 2:
        return _fit(spec, replace(tiles, stages=tiles.stages - 1), out_bytes)
    return replace(tiles, own_staging=False)
