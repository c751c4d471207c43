"""dK and dV of a tile that thread blocks share: each adds its own to float32 sums, as it ends.

The first to end stores them, so that no zeros are made before. The last rounds what is there and
its own, so that nothing is left to do after the kernel. Sums are in fragment order
(`instructions.py`), and stay in L2 while a tile's thread blocks are at work. A word of global
memory for each warpgroup's rows counts who arrived, and says whose numbers are there:

    first    arrive: 0    store                                  > leave
    others   arrive: 1 ..          wait for the first one's, add > leave
    last     arrive: n - 1         wait for all, load, dK and dV

There are sums of some tiles at a time, in a ring, so that a longer call has no more of them: the
first to end waits until the tile whose place it takes is done, and the last says so. Of that tile
all thread blocks were launched before.

Nobody waits for one that has not ended, but the first, for ones that run since before it did; so
what is waited for always comes. In which order thread blocks end is not known, so where gradients
must be the same each time they add in the order in which they start, and each waits for one that
runs since before it did; or they have arrays of their own, which XLA sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.backward_cut import BackwardTiles
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.indices import divided, remainder
from pallas_kernels.hopper.seam import Ref, Seam
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = [
    "Gradient",
    "row_of_sums",
    "store_share",
    "sums_of_keys",
    "words_of_sums",
]


class Gradient(NamedTuple):
    """What a warpgroup has of a gradient of the keys: 64 rows.

    staging: the parts of shared memory of its operand's size, which nothing reads any more; `rows`
      as copies name them.
    name: of its array.
    """

    x: Array
    staging: list[Ref]
    rows: list[Ref]
    name: str


def sums_of_keys(
    spec: AttentionSpec, tiles: BackwardTiles, inputs: dict[str, Array]
) -> jax.ShapeDtypeStruct:
    """Of dK, and then of dV, of 64 keys each."""
    columns = sum(padded_width(inputs[name].shape[3]) for name in "kv")
    rows = spec.batch * spec.kv_heads * _blocks(spec, tiles)
    if tiles.places:
        rows = tiles.places * (tiles.keys // ROWS)
    return jax.ShapeDtypeStruct((rows, ROWS * columns), jnp.float32)


def words_of_sums(spec: AttentionSpec, tiles: BackwardTiles) -> Array:
    """What the words are at first: of dK or both, and of dV where it has a warpgroup of its own."""
    return jnp.zeros(spec.batch * spec.kv_heads * _blocks(spec, tiles) * 2, jnp.int32)


def _blocks(spec: AttentionSpec, tiles: BackwardTiles) -> int:
    """Blocks of 64 keys of a head, in whole tiles."""
    return -(-spec.keys // tiles.keys) * (tiles.keys // ROWS)


def row_of_sums(
    spec: AttentionSpec, tiles: BackwardTiles, batch: Array, head: Array, key: Array
) -> Array:
    """The number of 64 keys from this one on: of tiles that are launched later it is higher."""
    side_by_side = _key_heads_side_by_side(spec, tiles)
    of_all = batch * np.int32(spec.kv_heads) + head
    _, own = divided(of_all, side_by_side)
    number = (of_all - own) * np.int32(_blocks(spec, tiles))
    block = _shifted(key, ROWS)
    if tiles.upward:
        block = np.int32(_blocks(spec, tiles) - 1) - block
    if side_by_side == 1:
        return number + block
    tile, within = divided(block, tiles.keys // ROWS)
    return number + (tile * np.int32(side_by_side) + own) * np.int32(tiles.keys // ROWS) + within


def _shifted(x: Array, by: int) -> Array:
    """x / by, a power of two."""
    return lax.shift_right_logical(x, np.int32(by.bit_length() - 1))


def _key_heads_side_by_side(spec: AttentionSpec, tiles: BackwardTiles) -> int:
    """Of how many a tile is launched before any of them has its next."""
    if tiles.tiles_first:
        return 1
    heads = tiles.heads_together or spec.kv_heads * tiles.shares.heads
    return 1 if heads % tiles.shares.heads else heads // tiles.shares.heads


def store_share(
    seam: Seam,
    refs: Ref,
    number: Array,
    gradients: tuple[Gradient, ...],
    *,
    shares: int,
    turn: Array | None,
    places: int,
    store_whole: Callable[[tuple[Gradient, ...]], None],
) -> None:
    """This thread block's share of gradients, of 64 keys with this number.

    shares: how many there are.
    turn: how many are added before this one, if they are in an order.
    places: of sums, in a ring; 0: one for each number.
    store_whole: called by the last one, with what all of them make.
    """
    last = shares - 1
    word = number * np.int32(2) + np.int32(gradients[0].name == "dv")
    if turn is None:
        own = lax.axis_index("warpgroup")
        seam.arrive(refs.words_of_sums, word, refs.arrived_smem, own)
        before = refs.arrived_smem[own]
    else:
        before = turn
    at = remainder(number, places) if places else number

    def place(gradient: Gradient) -> int:
        return ROWS * padded_width(refs.k.shape[3]) if gradient.name == "dv" else 0

    @pl.when(before == 0)
    def _() -> None:
        if places:

            @pl.when(number >= places)
            def _() -> None:
                seam.await_all(refs.words_of_sums, word - np.int32(2 * places), shares)

        for gradient in gradients:
            seam.store_fragment(gradient.x, refs.sums, at, place(gradient))
        seam.leave(refs.words_of_sums, word, first=True)

    @pl.when((before > 0) & (before < last))
    def _() -> None:
        if turn is None:
            seam.await_first(refs.words_of_sums, word)
        else:
            seam.await_all(refs.words_of_sums, word, turn)
        for gradient in gradients:
            seam.add_fragment(gradient.x, refs.sums, at, place(gradient))
        seam.leave(refs.words_of_sums, word, first=False)

    @pl.when(before == last)
    def _() -> None:
        seam.await_all(refs.words_of_sums, word, last)
        whole = []
        for gradient in gradients:
            if turn is not None:
                seam.together()  # or all are loaded before any is added, and spill
            columns = gradient.x.shape[1]
            others = seam.load_fragment(refs.sums, at, columns, place(gradient))
            whole.append(gradient._replace(x=gradient.x + others))
        if places:
            seam.leave(refs.words_of_sums, word, first=False)
        store_whole(tuple(whole))
