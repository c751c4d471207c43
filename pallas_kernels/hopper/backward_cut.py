"""How a thread block of the Hopper backward kernels of dK and dV is cut."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.hopper.shares import WHOLE, Shares
from pallas_kernels.hopper.tiles import ROWS

__all__ = ["BackwardTiles"]


@dataclass(frozen=True)
class BackwardTiles:
    """How a thread block is cut. It never changes what is computed.

    queries: queries of a block, 64 or 128.
    stages: blocks of queries in flight; of wide heads, blocks of dO.
    warpgroups: warpgroups with 64 keys of their own; one means the kernel for wide heads, whose two
      compute warpgroups share 64 keys.
    apart: dQ has a kernel of its own.
    shared_ds: dK's product reads dS from shared memory, not from registers.
    tiles_first: thread blocks that start together are tiles of one head, not heads of one tile.
    tiles_outer: else they are of all batch rows too.
    heads_together: else how many heads these are, of a tile and then of the next; 0: all, or of
      documents in turns as many as the visits say.
    heads_inner: every head of the group visits a block of queries before the next, the last block
      first, so that tiles of all lengths are at one block at a time.
    heads_turned: tiles of keys that follow each other begin with different heads there.
    late: a visit's product for dK still runs when the next visit's first ones start; not in lists.
    once: dQ is written, not added: one thread block visits a block of queries.
    in_fragments: dQ is added from registers, to an array in their order (`instructions.py`).
    listed: how many thread blocks there are, each with a list of tiles, the next of which is on its
      way while one is computed; 0: one for each tile.
    first_stores: in fragments, it is stored by the first thread block that visits a block of
      queries, and added by the others.
    puts_at_once: then a visit's stores or adds are behind one branch, and which they are is read
      before dQ's product.
    in_turns: then these add in the order in which they start; visits go down.
    upward: tiles start from the last keys on, and visits go up.
    pieces: matrices are pieces of some columns, each one tile wide and copied as plain rows.
    values_first: dV's product starts before dS is computed, and P is computed beside dP's product.
    in_parts: then a part of it starts as soon as its powers are made.
    masks_by_minimum: what a band hides has low exponents, by a minimum, not a choice.
    shares: the thread blocks that share a tile's work.
    adds: they add their dK and dV to sums, in whichever order they end, or in turns.
    places: tiles that have sums at a time, each the place of one that is done; 0: all.
    joined: dQ's kernel is one launch with this one (`backward_joined.py`).
    """

    queries: int
    stages: int = 2
    warpgroups: int = 2
    apart: bool = False
    shared_ds: bool = False
    tiles_first: bool = False
    tiles_outer: bool = False
    heads_together: int = 0
    heads_inner: bool = False
    heads_turned: bool = False
    late: bool = False
    once: bool = False
    in_fragments: bool = False
    listed: int = 0
    first_stores: bool = False
    puts_at_once: bool = False
    in_turns: bool = False
    upward: bool = False
    pieces: bool = False
    values_first: bool = False
    in_parts: bool = False
    masks_by_minimum: bool = False
    shares: Shares = WHOLE
    adds: bool = False
    places: int = 0
    joined: bool = False

    @property
    def keys(self) -> int:
        """Keys of a thread block."""
        return self.warpgroups * ROWS
