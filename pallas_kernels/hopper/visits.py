"""Which blocks of queries a tile of keys visits in each head.

Visits go up, from the first block that sees some of the tile's keys. Those at either end may need
an element mask; those between do not.

    visit       0        1        2        3        4
    block     first                                stop-1
              mask     mask   |  clear    clear  | mask
                              clear_from         clear_to

O(tiles) integers: a constant where nothing about them is traced, else made by XLA before the
kernel.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jattn.call.masking import KeyIntervals
from pallas_kernels import blocks
from pallas_kernels.hopper.constant import constant

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands

__all__ = [
    "MOST_KNOWN",
    "Visits",
    "edge_padded",
    "in_order",
    "known_counts",
    "tiles_that_visit",
    "visits",
    "visits_every_block",
]


MOST_KNOWN = 4096  # tiles of a constant, which takes 5 us of tracing each


class Visits(NamedTuple):
    """One tile's, in each head: first block, how many, and which of them need no element mask."""

    first: Any
    count: Any
    clear_from: Any
    clear_to: Any

    @property
    def masked(self) -> Any:
        """How many need one."""
        return self.count - (self.clear_to - self.clear_from)


def visits(
    spec: AttentionSpec,
    operands: Operands,
    *,
    queries: int,
    keys: int,
    parts: int = 1,
    every: bool = False,
) -> Array:
    """`Visits` of tiles of `keys` keys to blocks of `queries`: (B or 1, parts * tiles, 4) int32.

    parts: how many each tile's visits are shared out to, one after another.
    every: all blocks are visited, also those that see none of the tile's keys.
    """
    tiles, count = -(-spec.keys // keys), -(-spec.queries // queries)
    traced = (operands.query_lengths, operands.key_lengths, operands.query_offset)
    if tiles <= MOST_KNOWN and not spec.has_segments and all(x is None for x in traced):
        known = _known(spec, tiles, queries=queries, keys=keys, every=every)
        return constant(np.stack(_in_parts(np, Visits(*known.T), parts), axis=-1)[None])
    intervals = KeyIntervals.of_batch(spec, operands, 1)
    start = jnp.arange(tiles, dtype=jnp.int32)[None] * keys
    first, stop = blocks.query_blocks(intervals, start, start + keys, queries)
    if every:
        first, stop = 0, count
    clear_first, clear_stop = blocks.unmasked_query_blocks(intervals, start, start + keys, queries)
    if spec.band.lower is None:
        # Rows past the last query have an infinite log-sum-exp, which hides them without a mask.
        clear_stop = jnp.where(start + keys <= intervals.key_length, stop, clear_first)
    ends = (jnp.asarray(x, jnp.int32) for x in (first, stop, clear_first, clear_stop))
    first, stop, clear_first, clear_stop, _ = jnp.broadcast_arrays(*ends, start)
    if spec.has_segments:
        ids = [
            edge_padded(x, n * size).reshape(spec.batch, n, size)
            for x, n, size in (
                (operands.query_segments, count, queries),
                (operands.key_segments, tiles, keys),
            )
        ]
        (least, most), (own_least, own_most) = ((x.min(axis=2), x.max(axis=2)) for x in ids)
        own_least, own_most = own_least[..., None], own_most[..., None]
        least, most = least[:, None], most[:, None]
        # Compared by range, which is exact for sorted ("packed") ids and safe for any others.
        meets = (most >= own_least) & (least <= own_most)
        first, stop = (jnp.broadcast_to(x, meets.shape[:2]) for x in (first, stop))
        if not every:
            first = jnp.maximum(first, blocks.first_true(meets))
            stop = jnp.minimum(stop, count - blocks.first_true(meets[..., ::-1]))
            stop = jnp.where(meets.any(axis=2), stop, first)
        block = jnp.arange(count, dtype=jnp.int32)[None, None]
        one = (least == own_least) & (most == own_least) & (own_most == own_least)
        clear = one & (block >= clear_first[..., None]) & (block < clear_stop[..., None])
        clear &= (block >= first[..., None]) & (block < stop[..., None])
        clear_first, clear_stop = blocks.first_run(clear)
    whole = Visits(
        *(x.astype(jnp.int32) for x in _counted(jnp, first, stop, clear_first, clear_stop))
    )
    return jnp.stack(list(_in_parts(jnp, whole, parts)), axis=-1)


def known_counts(
    spec: AttentionSpec, *, queries: int, keys: int
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """(tiles,): how many visits each tile has, as far as shapes tell: the most with lengths."""
    tiles = -(-spec.keys // keys)
    return _known(spec, tiles, queries=queries, keys=keys, every=False)[:, 1]


def tiles_that_visit(
    spec: AttentionSpec, *, queries: int, keys: int
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """(2, blocks): the first and the last tile that visit a block; where all are visited for sure.

    All between visit it too.
    """
    tiles = -(-spec.keys // keys)
    found = np.zeros((2, -(-spec.queries // queries)), np.int32)
    known = list(enumerate(_known(spec, tiles, queries=queries, keys=keys, every=False)))
    for own, order in zip(found, (known[::-1], known), strict=True):
        for tile, (first, count, *_) in order:
            own[first : first + count] = tile
    return found


def in_order(visits: Array, blocks: int) -> tuple[Array, Array]:
    """`Visits` that neither begin nor end before those of the tile before do; and who makes them.

    Returns them, and (2, B, blocks) the first and the last tile that visit a block: all between do
    too. Of sorted ids these are the visits that there were; what others visit besides is hidden by
    an element mask.
    """
    given = Visits(*jnp.moveaxis(visits, -1, 0))
    some = given.count > 0
    start = jnp.where(some, given.first, blocks)
    stop = jnp.where(some, given.first + given.count, 0)
    tile = jnp.arange(visits.shape[1])
    behind = tile[None, :, None] <= tile[None, None]
    # As matrices: of a running minimum XLA makes several kernels.
    start = jnp.where(behind, start[:, None], blocks).min(axis=2)
    stop = jnp.where(behind.swapaxes(1, 2), stop[:, None], 0).max(axis=2)
    count = jnp.maximum(stop - start, 0)
    clear = (
        jnp.clip(x + given.first - start, 0, count) for x in (given.clear_from, given.clear_to)
    )
    block = jnp.arange(blocks)[None, :, None]
    first = (stop[:, None] <= block).sum(axis=2, dtype=jnp.int32)
    last = (start[:, None] <= block).sum(axis=2, dtype=jnp.int32) - 1
    return jnp.stack([start, count, *clear], axis=-1), jnp.stack([first, last])


def visits_every_block(spec: AttentionSpec, *, queries: int, keys: int) -> bool:
    """Whether it is known that each block of queries is visited by some tile of keys."""
    unknown = spec.has_segments or spec.has_query_lengths or spec.has_key_lengths
    if unknown or spec.has_query_offset or spec.mask_shape is not None:
        return False
    tiles = -(-spec.keys // keys)
    if tiles > MOST_KNOWN:
        return False
    found = _known(spec, tiles, queries=queries, keys=keys, every=False)
    visited = np.zeros(-(-spec.queries // queries), bool)
    for first, count, *_ in found:
        visited[first : first + count] = True
    return bool(visited.all())


@functools.lru_cache(maxsize=64)
def _known(
    spec: AttentionSpec, tiles: int, *, queries: int, keys: int, every: bool
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """(tiles, 4): the `Visits` of a call whose intervals follow from its shapes."""
    intervals = KeyIntervals(spec.band, spec.queries, spec.keys)
    ends = []
    for start in range(0, tiles * keys, keys):
        first, stop = blocks.query_blocks(intervals, start, start + keys, queries)
        if every:
            first, stop = 0, -(-spec.queries // queries)
        clear = blocks.unmasked_query_blocks(intervals, start, start + keys, queries)
        if spec.band.lower is None:  # as above
            clear = clear[0], stop if start + keys <= spec.keys else clear[0]
        ends.append((first, stop, *clear))
    found = np.stack(_counted(np, *np.array(ends, np.int32).T), axis=-1)
    found.setflags(write=False)
    return found


def _in_parts(xp: Any, whole: Visits, parts: int) -> Visits:
    """(.., tiles) visits as (.., parts * tiles): all tiles' first parts, all their second, .."""
    if parts == 1:
        return whole
    made = []
    for part in range(parts):
        start, stop = (whole.count * (part + more) // parts for more in range(2))
        clear = (xp.clip(x - start, 0, stop - start) for x in (whole.clear_from, whole.clear_to))
        made.append(Visits(whole.first + start, stop - start, *clear))
    return Visits(*(xp.concatenate(x, axis=-1) for x in zip(*made, strict=True)))


def _counted(xp: Any, first: Any, stop: Any, clear_first: Any, clear_stop: Any) -> Visits:
    """The visits to blocks [first, stop), of which [clear_first, clear_stop) need no mask."""
    total = xp.maximum(stop - first, 0)
    some = clear_first < clear_stop
    clear_from = xp.where(some, xp.clip(clear_first - first, 0, total), total)
    clear_to = xp.where(some, xp.clip(clear_stop - first, clear_from, total), total)
    return Visits(first, total, clear_from, clear_to)


def edge_padded(ids: Array | None, size: int) -> Array:
    """(B, size) ids, the last one repeated."""
    assert ids is not None
    return jnp.pad(ids, ((0, 0), (0, size - ids.shape[1])), mode="edge")
