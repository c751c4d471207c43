"""What the Hopper backward kernels share: a thread block's tile of keys, and its masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from jattn.call.masking import hides_some
from pallas_kernels.hopper import backward_mask
from pallas_kernels.hopper.backward_sums import Gradient, row_of_sums, store_share
from pallas_kernels.hopper.backward_tiles import BackwardTiles
from pallas_kernels.hopper.bias_form import rows_share
from pallas_kernels.hopper.copies import backward_width
from pallas_kernels.hopper.dropout import Words, kept_down, marked
from pallas_kernels.hopper.grid import Grid
from pallas_kernels.hopper.indices import divided, quotient, remainder
from pallas_kernels.hopper.piece_widths import MOST_UNROLLED
from pallas_kernels.hopper.plain import cut, fetch_pieces, parts_of, places
from pallas_kernels.hopper.plan import L2_BYTES
from pallas_kernels.hopper.seam import Ref, Seam
from pallas_kernels.hopper.softmax import scale_of
from pallas_kernels.hopper.tiles import ROWS
from pallas_kernels.hopper.visits import Visits

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = [
    "CLAIMS",
    "HIGH",
    "LOW",
    "ROW",
    "ROW_BIAS",
    "ROW_TERM",
    "WGMMA",
    "Block",
    "Turn",
    "banded",
    "behind",
    "each",
    "grid_of",
    "key_gradients",
    "share_at",
]

LEAST_LOW = 2.0**-10  # of a log-sum-exp in base 2, that counts beside weights in 16 bits
WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # one value a key
COLUMN = WGMMA.reduce(0)  # one value a query
# A query's vectors: its log-sum-exp in two, its row term, and of some biases its own.
HIGH, LOW, ROW_TERM, ROW_BIAS = range(4)
# Of the row of shared memory behind a slot's vectors: which blocks of dQ were claimed. One of its
# own would be 1 KiB.
CLAIMS = 0


class Turn(NamedTuple):
    """A tile of a thread block's list: where its K and V are, and what was visited before it."""

    slot: Array
    visited: Array


class Block:
    """One thread block: its tile of keys, and which blocks of queries it visits."""

    def __init__(
        self,
        spec: AttentionSpec,
        tiles: BackwardTiles,
        seam: Seam,
        refs: Ref,
        place: dict[str, Array],
        turn: Turn | None = None,
    ) -> None:
        self.spec, self.tiles, self.seam, self.refs = spec, tiles, seam, refs
        self.makes_dq = "dq" in vars(refs)
        self.turn = turn
        shares = tiles.shares
        self.batch, self.tile, self.kv_head, part = share_at(spec, tiles, place, refs)
        if tiles.upward:
            self.tile = np.int32(-(-spec.keys // tiles.keys) - 1) - self.tile
        self.heads = spec.group // shares.heads
        self.first_head = self.kv_head * spec.group
        if shares.heads > 1:
            self.first_head += part * self.heads
        of = self.batch if refs.ranges.shape[0] > 1 else 0
        self.scale = self.dq_scale = scale_of(spec, refs, self.batch)
        query_part: Array | int = 0
        row = self.tile
        if shares.queries > 1:
            query_part, self.tile = divided(row, -(-spec.keys // tiles.keys))
        self.share = query_part * np.int32(shares.heads) + part
        self.list: Ref = None
        if spec.mask_shape is not None:
            self.list = backward_mask.list_of(spec, refs, self.batch, self.kv_head, self.tile)
            total, mixed = self.list[0], self.list[1]
            self.visits = Visits(0, total, mixed, total)
            self.heads = 1  # the list is of all of them
        else:
            self.visits = Visits(*(refs.ranges[of, row, i] for i in range(4)))
        # Where tiles that run at a time would all be at one block, each begins at its own.
        self.stagger: Array | None = None
        free = tiles.first_stores and not tiles.in_turns
        if free and not (banded(spec) or spec.has_segments):
            if shares.queries == 1:  # one register less
                self.visits = self.visits._replace(first=np.int32(0))
            ahead = self.tile * np.int32(tiles.keys // tiles.queries)
            self.stagger = remainder(ahead, jnp.maximum(self.visits.count, 1))
        # Whether log-sum-exps of the group's heads have a second part that counts.
        # Where kernels are joined they are subtracted everywhere, which is asked of nothing.
        self.in_two: Any = False
        if not tiles.joined:
            self.in_two = refs.largest_low[self.batch, self.kv_head] > LEAST_LOW

    def keys_at(self, first: Array | int, size: int = ROWS) -> Any:
        """Rows of K's and V's shared memory, from this one on of those that hold the tile."""
        if self.turn is not None:
            first = first + self.turn.slot * np.int32(self.tiles.keys)
        return pl.ds(first, size)

    def rows_of(self, ref: Ref, rows: Any) -> Ref:
        """These rows of a matrix in shared memory."""
        return ref.at[:, rows] if self.tiles.pieces else ref.at[rows]

    def parts(self, ref: Ref, *slot: Array) -> list[Ref]:
        """A matrix in shared memory, or in this slot of it, or its pieces."""
        if self.tiles.pieces:
            return parts_of(ref, *slot)
        return [ref.at[slot] if slot else ref]

    def copies(self, array: Ref, place: tuple[Any, ...], parts: list[Ref]) -> list[tuple[Ref, Ref]]:
        """What of an array is in which part of a matrix: (array, part), for each."""
        return places(array, place, parts, self.batch * 0)

    def load(
        self, array: Ref, place: tuple[Any, ...], matrix: Ref, full: Ref, *slot: Array
    ) -> None:
        """Starts the copies of an array's rows to a matrix, or to this slot of it.

        Of keys, where thread blocks have lists, to the slot that these have.
        """

        def part_at(*piece: Any) -> Ref:
            part = matrix.at[(*slot, *piece)] if slot or piece else matrix
            in_list = self.turn is not None and not slot
            return part.at[self.keys_at(0, self.tiles.keys)] if in_list else part

        count = matrix.shape[-3] if self.tiles.pieces else 0
        if self.tiles.listed and self.tiles.first_stores and count > MOST_UNROLLED:
            fetch_pieces(array, place, part_at, count, full)
            return
        parts = [part_at(i) for i in range(count)] or [part_at()]
        for source, part in self.copies(array, place, parts):
            plgpu.copy_gmem_to_smem(source, part, full)

    def store(self, row: Array, *gradients: Gradient) -> None:
        """Gradients of the keys from this row on, or the share of them, on their way."""
        if self.tiles.adds:
            number = row_of_sums(self.spec, self.tiles, self.batch, self.kv_head, row)
            whole = partial(self.store_whole, row)
            store_share(
                self.seam,
                self.refs,
                number,
                gradients,
                shares=self.tiles.shares.count,
                turn=self.share if self.tiles.in_turns else None,
                places=self.tiles.places * (self.tiles.keys // ROWS),
                store_whole=whole,
            )
            return
        if self.tiles.shares.count == 1:
            self.store_whole(row, gradients)
            return
        place, arrays = (self.batch, pl.ds(row, ROWS), self.kv_head), vars(self.refs)
        for gradient in gradients:
            self.seam.store(gradient.x, arrays[gradient.name].at[(self.share, *place)])

    def store_whole(self, row: Array, gradients: tuple[Gradient, ...]) -> None:
        """The same where they are all there is, rounded."""
        place, arrays = (self.batch, pl.ds(row, ROWS), self.kv_head), vars(self.refs)
        for x, staging, _, _ in gradients:
            for own, part in zip(cut(x, staging[0].shape[-1]), staging, strict=True):
                part[...] = own.astype(self.spec.dtype)
        plgpu.commit_smem()
        for _, _, rows, name in gradients:
            for to, part in self.copies(arrays[name], place, rows):
                plgpu.copy_smem_to_gmem(part, to)

    @property
    def masked(self) -> bool:
        """Whether some visit needs an element mask."""
        return hides_some(self.spec) or self.spec.keys % self.tiles.keys != 0

    def located(self, h: Array, i: Array) -> tuple[Array, Array]:
        """Visit i of head h: the head, counted from the first, and the block of queries."""
        if self.list is None:
            return h, self.visited(i)
        return divided(self.list[i + 2], self.refs.rows.shape[2])

    def visit(self, n: Array) -> tuple[Array, Array]:
        """Which head of the group, and which of its visits, the n-th of all visits is."""
        count = self.visits.count
        if self.tiles.in_turns and self.heads == 1:
            return jnp.int32(0), n if self.tiles.upward else count - 1 - n
        if self.tiles.first_stores and self.heads == 1:  # two registers less
            return jnp.int32(0), n
        if self.tiles.heads_inner:
            i, h = divided(n, self.heads)
            if self.tiles.heads_turned:
                h = remainder(h + self.tile, self.heads)
            return h, i if self.tiles.upward else count - 1 - i
        return quotient(n, count), remainder(n, count)

    def visited(self, i: Array) -> Array:
        """The i-th block of queries that is visited: those that need an element mask come first."""
        visits = self.visits
        if self.stagger is not None:
            i += self.stagger
        elif self.tiles.in_turns or (self.spec.band.lower is None and not self.spec.has_segments):
            return visits.first + i  # type: ignore[no-any-return]
        else:
            i += visits.clear_to
        return visits.first + i - jnp.where(i < visits.count, np.int32(0), visits.count)  # type: ignore[no-any-return]

    def weights(self, x: Array, c: float, lse: Ref, *, in_two: bool) -> Array:
        """exp of the logits (64, queries), x c in base 2, less the log-sum-exps in two."""
        exponent = x * c - self.row(lse.at[0])
        return jnp.exp2(exponent - self.row(lse.at[1]) if in_two else exponent)

    def row(self, ref: Ref) -> Array:
        """One value a query, as a (64, queries) matrix."""
        x = self.seam.load(ref, COLUMN)
        return lax.broadcast_in_dim(x, (ROWS, x.shape[0]), [1])

    def words(self, shape: tuple[int, ...], own: Array | int, slot: Array) -> tuple[Words, Array]:
        """Those of dropout for a matrix (64, queries): of its queries, and of its keys.

        own: the first of the 64 keys, counted from the tile's.
        slot: where the queries' words are.
        """
        both = self.refs.words_smem.at[slot]
        words = Words(*(self.row(both.at[i]) for i in range(2)))
        mine = self.seam.load(self.refs.dropout_keys.at[pl.ds(own, ROWS)], ROW)
        return words, lax.broadcast_in_dim(mine, shape, [0])

    def marked(self, p: Array, own: Array | int, slot: Array) -> Array:
        """p (64, queries), with a negative sign where dropout drops."""
        return marked(self.spec, *self.words(p.shape, own, slot), p)

    def kept(self, p: Array, own: Array | int, slot: Array) -> Array:
        """p (64, queries), with zeros where dropout drops."""
        return kept_down(self.spec, self.seam, *self.words(p.shape, own, slot), p)

    def hide(
        self, x: Array, own: Array | int, first_query: Array, slot: Array, none: float = 0.0
    ) -> Array:
        """x (64, queries), with `none` where a query does not see a key.

        own: the first of the 64 keys, counted from the tile's.
        slot: where the queries' segment ids are.
        """
        spec, seam, refs, shape = self.spec, self.seam, self.refs, x.shape
        key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)
        key += self.tile * self.tiles.keys + own
        if banded(spec):
            if spec.has_query_offset:
                first_query += refs.query_offset[self.batch]
            if "index_smem" in vars(refs):
                # Comes from memory: of an iota the compiler would keep every element in registers.
                query = self.row(refs.index_smem) + first_query
                if spec.band.upper is not None:
                    x = jnp.where(key <= query + spec.band.upper, x, none)
                if spec.band.lower is not None:
                    x = jnp.where(key >= query + spec.band.lower, x, none)
            else:
                ahead = self.tile * self.tiles.keys + own - first_query
                lower, upper = spec.band.lower, spec.band.upper
                apart = lower is None or upper is None or upper - lower >= sum(shape)
                if apart and none == -np.inf and self.tiles.masks_by_minimum:
                    x = seam.hidden_by_band(x, ahead, lower, upper)
                else:
                    x = seam.banded(x, ahead, lower, upper, none)
        if "w_smem" in vars(refs):
            x = jnp.where(backward_mask.seen_by(seam, refs, own, slot, shape), x, none)
        past = spec.keys % self.tiles.keys != 0
        if self.tiles.masks_by_minimum and hides_past(spec):
            past = False
        if spec.has_key_lengths or past:
            length = refs.key_lengths[self.batch] if spec.has_key_lengths else spec.keys
            x = jnp.where(key < length, x, none)
        if spec.has_segments:
            mine = seam.load(refs.k_segments.at[pl.ds(own, ROWS)], ROW)
            mine = lax.broadcast_in_dim(mine, shape, [0])
            x = jnp.where(mine == self.row(refs.q_segments.at[slot]), x, none)
        return x


def grid_of(spec: AttentionSpec, tiles: BackwardTiles) -> Grid:
    """A thread block for each share of each tile of keys of each key head."""
    shares = tiles.shares
    heads = spec.kv_heads * shares.heads
    batch, head = ("batch", spec.batch), ("head", heads)
    tile = ("tile", shares.queries * -(-spec.keys // tiles.keys))
    if (together := tiles.heads_together) > heads:  # of some rows
        rows = together // heads
        return Grid((("lot", spec.batch // rows), tile, ("batch", rows), head))
    if together:
        batch, head = ("batch", spec.batch * heads // together), ("head", together)
    if tiles.tiles_outer:  # few: the longest of all batch rows first
        return Grid((tile, batch, head))
    if rows_share(spec) and _outgrows_l2(spec):
        # Rows side by side, so that a block of the bias comes from memory once for all of them.
        return Grid((head, batch, tile) if tiles.tiles_first else (head, tile, batch))
    return Grid((batch, head, tile) if tiles.tiles_first else (batch, tile, head))


def share_at(
    spec: AttentionSpec, tiles: BackwardTiles, place: dict[str, Array], refs: Ref = None
) -> tuple[Array, Array, Array, Array]:
    """Batch row, row of tiles, key head, and which share of its group's heads is at this place."""
    batch, head = place["batch"], place["head"]
    if refs is not None and "heads_together" in vars(refs):  # as `heads_together`, but traced
        together = refs.heads_together[batch]
        number = place["tile"] * np.int32(spec.kv_heads) + head
        of_lot = together * np.int32(-(-spec.keys // tiles.keys))
        lot, rest = quotient(number, of_lot), remainder(number, of_lot)
        head = lot * together + remainder(rest, together)
        return batch, quotient(rest, together), head, head * 0
    heads, together = spec.kv_heads * tiles.shares.heads, tiles.heads_together
    if together > heads:
        batch = place["lot"] * np.int32(together // heads) + batch
    elif together:
        batch, lot = divided(batch, heads // together)
        head = head + lot * together
    return batch, place["tile"], *divided(head, tiles.shares.heads)


def _outgrows_l2(spec: AttentionSpec) -> bool:
    """Whether a bias does not stay in L2 from one row that shares it to the next."""
    assert spec.bias_shape is not None
    assert spec.bias_dtype is not None
    return prod(spec.bias_shape) * spec.bias_dtype.itemsize > L2_BYTES // 2


def key_gradients(
    spec: AttentionSpec, tiles: BackwardTiles, inputs: dict[str, Array]
) -> list[jax.ShapeDtypeStruct]:
    """dK and dV as a kernel writes them: (B, rows, K, columns), or (shares, ...) in float32."""
    dims = [inputs[name].shape[3] for name in "kv"]
    shape: tuple[int, ...] = (spec.batch, inputs["k"].shape[1], spec.kv_heads)
    dtype: Any = spec.dtype
    if tiles.shares.count > 1 and not tiles.adds:
        # Whole tiles: what is stored from registers is not cut at an array's end.
        dims = [backward_width(x) for x in dims]
        rows = -(-spec.keys // tiles.keys) * tiles.keys
        shape, dtype = (tiles.shares.count, spec.batch, rows, spec.kv_heads), jnp.float32
    return [jax.ShapeDtypeStruct((*shape, dim), dtype) for dim in dims]


def banded(spec: AttentionSpec) -> bool:
    """Whether a band hides some keys."""
    return spec.band.lower is not None or spec.band.upper is not None


def hides_past(spec: AttentionSpec) -> bool:
    """Whether a band hides from every query what is past the last key."""
    upper = spec.band.upper
    return upper is not None and not spec.has_query_offset and spec.queries + upper <= spec.keys


def behind(refs: Ref, slot: Array | int) -> Ref:
    """The row of shared memory behind this slot's vectors."""
    return refs.rows_smem.at[slot, refs.rows.shape[3]]


def each(start: Any, stop: Any, body: Callable[[Array], None]) -> None:
    """A loop that stays a `while`: Pallas has no `scan` with barriers beside accumulators."""

    def go(i: Array) -> Array:
        body(i)
        return i + 1

    lax.while_loop(lambda i: i < stop, go, jnp.asarray(start, jnp.int32))
