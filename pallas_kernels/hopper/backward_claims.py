"""Who is the first to visit a block of queries, and stores its dQ: the others add to it.

So no zeros are made before, nor read by the first. A word of global memory for each block counts
the visits that began, and says whether what the first one stored is there:

    loader's 1st warp   wait free[slot] .. fetch n       claim n, wait for the first one's dQ > full
    loader's 2nd warp   wait free[slot] > publish n - stages
    compute                                                    dQ of n, stored or added > free[slot]

Thread blocks that have lists wait for a claim where they put dQ, not before the visit: their first
warp tells them by named barriers.

A visit's claim is kept twice as long as its slot, as the second warp may be behind the first. No
thread of the second waits for another thread block, and a loader claims one block after another, so
what is waited for always comes.
"""

from __future__ import annotations

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax import Array

from pallas_kernels.hopper.backward_block import CLAIMS, Block, behind
from pallas_kernels.hopper.backward_tiles import BackwardTiles
from pallas_kernels.hopper.indices import remainder
from pallas_kernels.hopper.seam import Ref, Seam

__all__ = ["claim", "claims_none", "known_claim", "publish", "put_dq"]


def claims_none(tiles: BackwardTiles, seam: Seam, refs: Ref) -> None:
    """Before the loading warpgroup's first visit."""
    seam.claims_none(behind(refs, CLAIMS), 2 * tiles.stages)


def claim(block: Block, n: Array, head: Array, at: Array) -> None:
    """The n-th visit of all is to this block of queries of this head; arrives at `full`."""
    stages, refs, seam = block.tiles.stages, block.refs, block.seam
    word = (block.batch * block.spec.heads + head) * refs.rows.shape[2] + at
    slot, full = remainder(n, 2 * stages), refs.full.at[remainder(n, stages)]
    if _is_told(block):
        plgpu.barrier_arrive(full)
    seam.claim(refs.words_of_dq, word, behind(refs, CLAIMS), slot)
    if _is_told(block):
        seam.tell_claim(slot, block.tiles.warpgroups)
    else:
        plgpu.barrier_arrive(full)


def _is_told(block: Block) -> bool:
    """Whether a claim is told by barriers of its own, two for each warpgroup."""
    # Kernel alone, us on an H200: lists 1k causal 379, 367, 577 991, 973; no lists 4k causal 1122,
    # 1137, 5000 846, 859, 1k full 597, 600.
    told = block.tiles.listed > 0 and not block.seam.interpret
    assert not told or block.tiles.stages == 2
    return told


def publish(tiles: BackwardTiles, seam: Seam, refs: Ref, n: Array) -> None:
    """The visit that had the n-th one's slot before is done."""
    before = remainder(n + np.int32(tiles.stages), 2 * tiles.stages)
    seam.publish(refs.words_of_dq, behind(refs, CLAIMS), before)


def known_claim(block: Block, n: Array) -> Array | None:
    """The n-th visit's claim, if it is read before dQ's product."""
    return _claim_at(block, n) if block.tiles.puts_at_once and not _is_told(block) else None


def put_dq(
    block: Block,
    n: Array,
    dq: Array,
    part: Array,
    first: int = 0,
    *,
    claimed: Array | None,
    parts: int = 0,
) -> None:
    """The n-th visit's part of a block's dQ is stored, or added; from this number of a row on.

    claimed: what `known_claim` said.
    parts: in turns, of how many of a block: the claim says of which.
    """
    if _is_told(block):
        slot = remainder(n, 2 * block.tiles.stages)
        block.seam.await_claim(slot, block.tiles.warpgroups)
    if claimed is None:
        claimed = _claim_at(block, n)
    at_once = block.tiles.puts_at_once
    block.seam.put_fragment(dq, block.refs.dq, part, claimed, first, parts=parts, at_once=at_once)


def _claim_at(block: Block, n: Array) -> Array:
    slot = remainder(n, 2 * block.tiles.stages)
    return block.seam.number_at(behind(block.refs, CLAIMS), slot)
