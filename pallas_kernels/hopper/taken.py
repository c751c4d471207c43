"""Tiles whose lengths only segments tell: each thread block takes the next that nobody has taken.

The loading warpgroup counts in a word of global memory, shortly before a tile's last blocks of keys
are on their way, and tells the others by a note in shared memory, of which there are four in turn,
each with a barrier:

    number, batch row, first head, query tile; first and stop of the blocks of keys, of the clear

A thread must see every phase of a barrier that it waits for. Of tiles of one block of keys three
are taken before any other warpgroup need have begun: with two barriers one that began late would
miss a phase, and wait for ever.

Ids of keys have a ring of their own, `id_slots` long: a mask is made after the product that frees a
block of keys, and no block need wait for it.

The first tile of a thread block has its own number. A number past the last is of no tile: of what
its note says, the last one, only the first product is computed, for nobody.

Tiles are those of all heads in the order of a list without lengths (`Plan.work`); or, where the
keys and values of all heads fit in L2, the longest first (`longest_first`): a few tiles for each
thread block end together only so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.hopper.indices import divided, quotient, remainder
from pallas_kernels.hopper.plan import Work

if TYPE_CHECKING:
    from pallas_kernels.hopper.plan import Plan
    from pallas_kernels.hopper.seam import Ref, Seam

__all__ = ["NOTES", "WORDS", "Note", "id_slots", "longest_first", "take"]

NOTES, WORDS = 4, 8


class Note:
    """What a note says, read where it is asked for."""

    def __init__(self, plan: Plan, refs: Ref, turn: Array | int) -> None:
        self._plan, self._refs, self._slot = plan, refs, _slot(turn)

    def _word(self, i: int) -> Array:
        word: Array = self._refs.notes[self._slot + np.int32(i)]
        return word

    @property
    def number(self) -> Array:
        """The tile's number."""
        return self._word(0)

    @property
    def work(self) -> Work:
        """The tile, or for a number past the last some tile."""
        head, tile = self._word(2), self._word(3)
        batch = self._word(1) if self._plan.spec.batch > 1 else head * 0
        kv_head = quotient(head, self._plan.spec.group)
        return Work(batch, head, kv_head, tile * self._plan.queries, head * 0, tile)

    @property
    def ranges(self) -> list[Array]:
        """The tile's blocks of keys, first and stop, and those of the clear ones."""
        return [self._word(i) for i in range(4, WORDS)]


def take(plan: Plan, seam: Seam, refs: Ref, turn: Array | int) -> None:
    """The turn-th tile of this thread block; by the loading warpgroup, which tells the others."""
    slot = _slot(turn)
    if isinstance(turn, int) and turn == 0:
        number = lax.axis_index("block")
    else:
        seam.take(refs.counter, refs.notes, slot, plan.blocks)
        number = refs.notes[slot]
    at = jnp.minimum(number, np.int32(plan.works - 1))
    if plan.longest_first:
        place, pack = divided(at, plan.head_packs)
        batch, tile = divided(refs.order[place], plan.query_tiles)
        head = pack * np.int32(plan.pack)
    else:
        work = plan.work(at)
        batch, head, tile = work.batch, work.head, work.tile
    row = batch if refs.ranges.shape[0] > 1 else 0  # the same in all where shapes tell
    ranges = [refs.ranges[row, tile, i] for i in range(4)]
    seam.tell(refs.notes, slot, [number, batch, head, tile])
    seam.tell(refs.notes, slot + np.int32(4), ranges)
    seam.together()
    plgpu.barrier_arrive(refs.told.at[remainder(turn, NOTES)])


def id_slots(stages: int) -> int:
    """How many blocks' ids of keys there is room for: more than of keys, a power of two."""
    return 1 << stages.bit_length()


def longest_first(ranges: Array) -> Array:
    """The numbers of (B, tiles) tiles by falling count of visits: (B tiles,) int32."""
    visits = (ranges[..., 1] - ranges[..., 0]).reshape(-1)
    own = jnp.arange(visits.shape[0], dtype=jnp.int32)
    mine, its = visits[:, None], visits[None]
    before = (its > mine) | ((its == mine) & (own[None] < own[:, None]))
    rank = before.sum(axis=1, dtype=jnp.int32)
    return jnp.where(rank[None] == own[:, None], own[None], 0).sum(axis=1, dtype=jnp.int32)


def _slot(turn: Array | int) -> Array:
    return remainder(turn, NOTES) * np.int32(WORDS)
