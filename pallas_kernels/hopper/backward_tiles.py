"""Tile shapes of the Hopper backward kernel, by head dim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jattn.masking import hides_some
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from jattn.spec import AttentionSpec

__all__ = ["BackwardTiles", "choose_backward_tiles"]


@dataclass(frozen=True)
class BackwardTiles:
    """How a thread block is cut. It never changes what is computed.

    queries: queries of a block, 64 or 128.
    stages: blocks of queries in flight.
    warpgroups: warpgroups with 64 keys of their own; one means the kernel for wide heads, whose two
      compute warpgroups share 64 keys.
    shared_ds: dK's product reads dS from shared memory, not from registers.
    one_loop: every visit is masked; of several loops the compiler keeps more in registers.
    tiles_first: thread blocks that start together are tiles of one head, not heads of one tile.
    """

    queries: int
    stages: int = 2
    warpgroups: int = 2
    shared_ds: bool = False
    one_loop: bool = False
    tiles_first: bool = False

    @property
    def keys(self) -> int:
        """Keys of a thread block."""
        return self.warpgroups * ROWS


def choose_backward_tiles(spec: AttentionSpec) -> BackwardTiles:
    """The tiles for a call."""
    # TFLOP/s on an H200, bf16, 16,384 tokens, heads x head dim 2048, all that backward runs
    # counted; T = 16k, 4k, 1k.
    head, value = (-(-x // 64) * 64 for x in (spec.head_dim, spec.value_dim))
    if head + value > 256 or spec.logits_soft_cap is not None:
        # 256: causal 510, 441, 291; full 494, 465, 376. 192/128: causal 481 at 16k. A soft cap's
        # derivative takes registers that the other kernel has not: 100 bytes would spill.
        return BackwardTiles(64, warpgroups=1)
    full = not hides_some(spec)
    causal = spec.band.upper is not None and spec.band.lower is None
    plain = full or (causal and not (spec.has_segments or spec.has_key_lengths))
    if head + value <= 128:
        # Causal 524, 446, 266; full 502, 504, 400. dS shared: causal 516, 432, 261.
        return BackwardTiles(128, one_loop=not plain, tiles_first=full)
    # Causal 598, 517, 320, tiles first 602, 496, 315, one loop 564, 466, 301; full 595, 582, 450,
    # heads first 584, 571, 450. Three stages: full 546 at 4k. dV's product before dS: causal 491.
    return BackwardTiles(64, shared_ds=True, one_loop=not plain, tiles_first=full)
