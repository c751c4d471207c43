"""Tiles of keys add to a block's dQ one after another, so that it is the same each time.

A word of global memory for each block of queries counts the tiles whose dQ is there. A tile that
visits the block waits until these are all that come before it, in the order in which thread blocks
start; the first one stores, so that no zeros are made:

    loader's 1st warp   wait free[slot] .. fetch n         wait for the turn of n   > full
    loader's 2nd warp   wait free[slot] > ends the turn of n - stages
    compute                                                   dQ of n, stored or added  > free[slot]

A thread block waits for such alone as have lower numbers, which the GPU starts before it, so what
is waited for always comes, whatever else runs there.

Causal tiles start from the last keys on, and visits go up: then a tile is by itself as far behind
the one before it as it has to be. Else visits go down, tiles from the first keys on: so it is in
windows too; where all see all, a tile waits once, for the first visit of the one before. Tiles of
several heads run at a time, so that few wait for each other. Of grouped heads that a mask hides
keys from each has a thread block, whose dK and dV are added in the order of heads.

Of documents it is not known before which tiles visit a block, but from their visits, made so that
neither end of them falls (`visits.in_order`); nor how many heads are best at a time, which is the
more the shorter they are.
"""

from __future__ import annotations

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax import Array

from pallas_kernels.hopper.backward_block import CLAIMS, Block, behind
from pallas_kernels.hopper.backward_tiles import BackwardTiles
from pallas_kernels.hopper.indices import remainder
from pallas_kernels.hopper.seam import Ref, Seam

__all__ = ["end_turn", "ends_none", "take_turn"]


def ends_none(tiles: BackwardTiles, seam: Seam, refs: Ref) -> None:
    """Before the loading warpgroup's first visit."""
    seam.ends_none(behind(refs, CLAIMS), 2 * tiles.stages)


def take_turn(block: Block, n: Array, head: Array, at: Array) -> None:
    """The n-th visit of all is to this block of queries of this head; arrives at `full`."""
    stages, refs = block.tiles.stages, block.refs
    word = (block.batch * block.spec.heads + head) * refs.rows.shape[2] + at
    rank = block.tile
    if "tiles_before" in vars(refs):  # the tile's number in the block's order, less the rank
        of = block.batch if refs.tiles_before.shape[0] > 1 else 0
        number = refs.tiles_before[of, at]
        rank = number - rank if block.tiles.upward else rank - number
    # Claims are kept twice as long as slots. None is made before that three visits ago has ended,
    # so that the second warp stays beside the first.
    slot, before = (remainder(n + np.int32(more), 2 * stages) for more in (0, 1))
    claims = behind(refs, CLAIMS)
    block.seam.take_turn(refs.words_of_dq, word, rank, claims, slot, before)
    plgpu.barrier_arrive(refs.full.at[remainder(n, stages)])


def end_turn(tiles: BackwardTiles, seam: Seam, refs: Ref, n: Array) -> None:
    """The visit that had the n-th one's slot before is done."""
    before = remainder(n + np.int32(tiles.stages), 2 * tiles.stages)
    seam.end_turn(refs.words_of_dq, behind(refs, CLAIMS), before)
