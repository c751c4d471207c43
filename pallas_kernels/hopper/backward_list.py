"""Lists of tiles of keys for the Hopper backward kernel: one starts while the one before ends.

A thread block of one tile takes 5.6 us to start and end, nearly three visits, in which the matrix
unit is idle: it waits for K, V and the first queries, and for dK and dV to be written. In a thread
block that has a list of tiles the loading warpgroup goes on to the next one's K and V, which have a
second slot, and to its queries.

    loader    K0 V0  Q dO ..       K1 V1  Q dO ..           K2 V2 ..
    compute            visits of tile 0 .. | dK0 dV0 | visits of tile 1 ..

The list is made when the call is traced: in the order of launch, each tile goes to the thread block
that is free first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array, lax

from pallas_kernels.hopper.backward_block import Block, Turn
from pallas_kernels.hopper.backward_tiles import BackwardTiles
from pallas_kernels.hopper.grid import Grid
from pallas_kernels.hopper.indices import remainder
from pallas_kernels.hopper.seam import Ref
from pallas_kernels.hopper.visits import known_counts

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["each_listed", "schedule"]

TILE_COST = 1.0  # of a tile's start and end, in visits


def schedule(
    spec: AttentionSpec, tiles: BackwardTiles, grid: Grid
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """(blocks, 2 + most): how many tiles each block has, and their numbers in the grid; then zeros.

    Each in the order of the grid goes to the thread block that is free first, by its visits.
    """
    counts = known_counts(spec, queries=tiles.queries, keys=tiles.keys)
    sizes = dict(grid.axes)
    axis = [name for name, _ in grid.axes].index("tile")
    numbers = np.arange(prod(sizes.values()))
    tile = np.unravel_index(numbers, tuple(sizes.values()))[axis]
    costs = counts[tile] * (spec.group // tiles.shares.heads) + TILE_COST
    free = [(0.0, block) for block in range(tiles.listed)]
    mine: list[list[int]] = [[] for _ in free]
    for number, cost in enumerate(costs.tolist()):
        now, block = heapq.heappop(free)
        mine[block].append(number)
        heapq.heappush(free, (now + cost, block))
    most = max(map(len, mine))
    return np.array([[len(x), *x, *[0] * (most + 1 - len(x))] for x in mine], np.int32)


def each_listed(
    refs: Ref,
    grid: Grid,
    block_at: Callable[[dict[str, Array], Turn], Block],
    body: Callable[[Block, Callable[[], None]], None],
) -> Array:
    """body(a tile, what is called when the next one's number may be read), for each of the list.

    Returns how many blocks of queries were visited in all.
    """
    own = lax.axis_index("block")
    count = refs.schedule[own, 0]

    def one(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        turn, visited, number = carry
        block = block_at(grid.at(number), Turn(remainder(turn, 2), visited))
        after: list[Array] = []
        body(block, lambda: after.append(refs.schedule[own, turn + 2]))
        return turn + 1, visited + block.visits.count * block.heads, after[0]

    zero = count * 0
    start = (zero, zero, refs.schedule[own, 1])
    visited: Array = lax.while_loop(lambda carry: carry[0] < count, one, start)[1]
    return visited
