"""The compute warpgroups of the forward kernel: 64 query rows of each tile.

S_0 = Q K_0ᵀ     P_0 = softmax S_0
S_i = Q K_iᵀ     O += P_{i-1} V_{i-1}     in flight together; P_i = softmax S_i
S_0 = Q' K'_0ᵀ   O += P_n V_n             the same from a tile to the next of a list
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper import bias, dropout, folded_bias
from pallas_kernels.hopper.dense_mask import words_of
from pallas_kernels.hopper.dropout import Words, dropped, words_of_rows
from pallas_kernels.hopper.indices import for_each, quotient, remainder
from pallas_kernels.hopper.load import query_slot
from pallas_kernels.hopper.masks import End, Steps, Warpgroup, hide, steps_of
from pallas_kernels.hopper.plain import parts_in
from pallas_kernels.hopper.plan import MOST_LISTED
from pallas_kernels.hopper.seam import Ref, Seam
from pallas_kernels.hopper.softmax import LN2, Softmax, across, logits, scale_of
from pallas_kernels.hopper.store import store
from pallas_kernels.hopper.taken import NOTES, Note
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from pallas_kernels.hopper.plan import Plan, Work

__all__ = ["compute", "value_columns"]


class Tile(NamedTuple):
    """A tile of the list: its place in it, what it is, and the key blocks visited before it.

    scale: what its Q Kᵀ is multiplied by.
    words: of dropout, if there is any.
    """

    turn: Array | int
    work: Work
    steps: Steps
    visited: Array
    scale: Array | float
    words: Words | None


class Weights(NamedTuple):
    """P of a tile's latest block of keys, and the softmax so far."""

    p: Array
    softmax: Softmax


def compute(
    plan: Plan, seam: Seam, refs: Ref, warpgroup: Warpgroup, *, folded: bool = False
) -> None:
    """All tiles of this thread block, for one warpgroup.

    folded: the bias comes with Q Kᵀ.
    """
    tiles = plan.tiles

    @pl.when(warpgroup.number == 0)
    def _() -> None:
        for slot in range(tiles.query_slots):
            plgpu.barrier_arrive(refs.q_free.at[slot])

    for slot in range(tiles.stages):
        plgpu.barrier_arrive(refs.k_free.at[slot])
        plgpu.barrier_arrive(refs.v_free.at[slot])
    if not folded:
        bias.start(plan, refs)
    dropout.start(plan, refs)
    if tiles.in_turn:
        pl.when(warpgroup.number == tiles.warpgroups - 1)(
            lambda: plgpu.barrier_arrive(refs.turn.at[0])
        )
    columns = value_columns(plan, refs.v_smem)
    seam.with_accumulator(
        lambda o_acc: Rows(plan, seam, refs, warpgroup, o_acc, folded).every_tile(),
        (ROWS, columns),
        refs.o_stand_in.at[warpgroup.number] if seam.interpret else None,
    )
    plgpu.wait_smem_to_gmem(0)
    if tiles.in_turn:
        pl.when(warpgroup.number == 0)(lambda: plgpu.barrier_wait(refs.turn.at[0]))


def value_columns(plan: Plan, v_smem: Ref) -> int:
    """Columns of a tile's output: of values in pieces no more than there are."""
    return plan.spec.value_dim if len(v_smem.shape) == 4 else v_smem.shape[-1]


@dataclass(frozen=True)
class Rows:
    """64 query rows of a tile; O is accumulated in `o_acc`, which is zero when a tile begins.

    folded: the bias comes with Q Kᵀ.
    """

    plan: Plan
    seam: Seam
    refs: Ref
    warpgroup: Warpgroup
    o_acc: Ref
    folded: bool

    def every_tile(self) -> None:
        """The tiles of this thread block's list, or its only one."""
        plan, refs = self.plan, self.refs
        if plan.counted:
            self.every_counted()
            return
        index = plan.listed(refs, 0)
        first = self.tile(0, index, jnp.int32(0))
        weights = self.first_step(first)
        if not plan.is_scheduled:
            self.last_step(first, self.steps(first, weights))
            return

        def tile(turn: Array, carry: Any) -> Any:
            weights, visited, index = carry
            index_after = plan.listed(refs, turn + 1)  # long before it is used
            now = self.tile(turn, index, visited)
            weights = self.steps(now, weights)
            after = self.tile(turn + 1, index_after, visited + now.steps.visits)
            return self.last_and_first_step(now, after, weights), after.visited, index_after

        tile_count = refs.schedule[lax.axis_index("block"), 0]
        # Zero, but not to ptxas: it would keep the addresses of what a count of 0 leads to.
        zero = quotient(tile_count, MOST_LISTED + 1)
        for_each(0, tile_count, tile, (weights, zero, index))
        plgpu.barrier_arrive(refs.q_free.at[query_slot(plan, tile_count, self.warpgroup.number)])

    def every_counted(self) -> None:
        """The tiles that this thread block takes, of which it is told by its loader."""
        plan, refs = self.plan, self.refs
        plgpu.barrier_wait(refs.told.at[0])
        first = self.told(0, jnp.int32(0))
        weights = self.first_step(first)

        def tile(carry: Any) -> Any:
            weights, visited, turn, _ = carry
            now = self.told(turn, visited)
            weights = self.steps(now, weights)
            plgpu.barrier_wait(refs.told.at[remainder(turn + 1, NOTES)])
            after = self.told(turn + 1, visited + now.steps.visits)
            weights = self.last_and_first_step(now, after, weights)
            return weights, after.visited, turn + 1, Note(plan, refs, turn + 1).number

        number = Note(plan, refs, 0).number
        zero = jnp.minimum(number, 0)  # but not to ptxas
        start = (weights, zero, zero, number)
        end = lax.while_loop(lambda carry: carry[3] < np.int32(plan.works), tile, start)
        plgpu.barrier_arrive(refs.q_free.at[query_slot(plan, end[2], self.warpgroup.number)])

    def told(self, turn: Array | int, visited: Array) -> Tile:
        """The turn-th tile, of which this warpgroup was told."""
        plan, refs = self.plan, self.refs
        note = Note(plan, refs, turn)
        work = note.work
        steps = steps_of(plan, refs, work, note.ranges)
        return Tile(turn, work, steps, visited, scale_of(plan.spec, refs, work.batch), None)

    def tile(self, turn: Array | int, index: Array, visited: Array) -> Tile:
        work = self.plan.work(index)
        scale = scale_of(self.plan.spec, self.refs, work.batch)
        words = words_of_rows(self.plan, self.seam, self.refs, work, self.warpgroup)
        return Tile(turn, work, steps_of(self.plan, self.refs, work), visited, scale, words)

    def first_step(self, tile: Tile) -> Weights:
        """S_0 and its softmax, with no product to run beside it."""
        refs = self.refs
        slot = self.slot(tile.visited)

        def products(s_acc: Ref) -> Weights:
            self.multiply_keys(s_acc, tile, slot)
            words = self.mask_words(tile, 0, masked=self.plan.masked)
            kept = self.kept(tile, 0)
            s = self.seam.wait(s_acc, in_flight=0)
            p, softmax, _ = self.weigh(
                tile, s, 0, None, words, masked=self.plan.masked, end="right"
            )
            plgpu.barrier_arrive(refs.k_free.at[slot])
            self.await_first_values(tile)
            return Weights(self.rounded(tile, 0, p, kept), softmax)

        self.await_queries(tile)
        plgpu.barrier_wait(refs.k_full.at[slot])
        return self.with_scores(products)

    def steps(self, tile: Tile, weights: Weights) -> Weights:
        """All blocks of keys but the first, and the values of all but the last."""
        plan, steps = self.plan, tile.steps

        def loop(
            start: Any, stop: Any, weights: Weights, masked: bool | None, end: End | None = None
        ) -> Weights:
            body = partial(self.step, tile, masked=masked, end=end)
            return for_each(start, stop, body, weights)

        if plan.one_loop:
            return loop(1, steps.visits, weights, None if plan.masked_later else False)
        if plan.masked:
            weights = loop(1, steps.clear_from, weights, True, "right")
        weights = loop(steps.clear_from, steps.clear_to, weights, False)
        if plan.masked_left:
            weights = loop(steps.clear_to, steps.visits, weights, True, "left")
        return weights

    def step(
        self, tile: Tile, i: Array, weights: Weights, *, masked: bool | None, end: End | None
    ) -> Weights:
        """S_i = Q K_iᵀ with O += P_{i-1} V_{i-1}."""

        def correct(o: Array, correction: Array) -> Array:
            if self.plan.spec.has_key_lengths:
                self.await_values(tile.visited + i)
            return o * across(correction, o.shape[1])

        before = weights.softmax
        return self.two_products(tile, i, weights, before, correct, masked=masked, end=end)

    def last_and_first_step(self, tile: Tile, after: Tile, weights: Weights) -> Weights:
        """S_0 of the tile after this with O += P_n V_n of this one, which is then done."""
        tiles = self.plan.tiles
        through_slot = not (tiles.own_staging or tiles.from_registers)
        q_free = self.refs.q_free.at[self.query_slot(tile)]

        def store(o: Array, _: Array | None) -> Array:
            self.store(tile, o, weights.softmax)
            if through_slot:
                plgpu.barrier_arrive(q_free)
            return jnp.zeros_like(o)

        if tiles.from_registers:  # the next ones come to the same slot
            plgpu.barrier_arrive(q_free)
        self.await_queries(after)
        if tiles.own_staging:
            plgpu.barrier_arrive(q_free)
        masked = self.plan.masked
        return self.two_products(after, 0, weights, None, store, masked=masked, end="right")

    def last_step(self, tile: Tile, weights: Weights) -> None:
        """O += P_n V_n, with no product to run beside it."""
        refs, slot = self.refs, self.slot(tile.visited + tile.steps.visits - 1)
        if not self.plan.spec.has_key_lengths:
            self.await_values(tile.visited + tile.steps.visits - 1)
        self.multiply_values(weights.p, slot)
        o = self.seam.wait(self.o_acc, in_flight=0)
        plgpu.barrier_arrive(refs.v_free.at[slot])
        self.store(tile, o, weights.softmax)
        plgpu.barrier_arrive(refs.q_free.at[self.query_slot(tile)])

    def two_products(
        self,
        tile: Tile,
        i: Array | int,
        before: Weights,
        softmax: Softmax | None,
        next_o: Callable[[Array, Any], Array],
        *,
        masked: bool | None,
        end: End | None,
    ) -> Weights:
        """S = Q Kᵀ of a tile's i-th block with the O += P V of the block before, and S's softmax.

        `next_o` is what becomes of O then, by the correction that the softmax asks for.
        """
        plan, seam, refs, spec = self.plan, self.seam, self.refs, self.plan.spec
        tiles, block = plan.tiles, tile.visited + i
        slot, slot_before = self.slot(block), self.slot(block - 1)

        def products(s_acc: Ref) -> Weights:
            self.multiply_keys(s_acc, tile, slot)
            self.multiply_values(before.p, slot_before)
            if tiles.in_turn:
                following = remainder(self.warpgroup.number + 1, tiles.warpgroups)
                plgpu.barrier_arrive(refs.turn.at[following])
            words = self.mask_words(tile, i, masked=masked)
            kept = self.kept(tile, i)
            if kept is not None:
                # A zero that the compiler cannot know.
                seam.made_before(kept, lax.shift_right_logical(block, np.int32(30)))
            s = seam.wait(s_acc, in_flight=int(tiles.overlap))
            # Segments come with the keys, and are read where there is a mask.
            later = spec.has_segments and masked is not False and not plan.counted
            if not later:
                plgpu.barrier_arrive(refs.k_free.at[slot])
            p, now, correction = self.weigh(tile, s, i, softmax, words, masked=masked, end=end)
            if later:
                plgpu.barrier_arrive(refs.k_free.at[slot])
            if plan.holds_maxima(masked=masked is None) and softmax is not None:
                # Behind a mask that is a branch, and in some loops without one, ptxas waits for P V
                # before it has made the maximum.
                seam.hold_rows(now.m, lax.shift_right_logical(block, np.int32(30)))
            o = seam.wait(self.o_acc, in_flight=0)
            plgpu.barrier_arrive(refs.v_free.at[slot_before])
            self.o_acc[...] = next_o(o, correction)
            # With several loops only now: else ptxas sees an operand written while a product is in
            # flight, and waits for every single one (C7513).
            return Weights(self.rounded(tile, i, p, kept), now)

        # Between an accumulator's birth and its product no branch may come: ptxas would add a wait.
        plgpu.barrier_wait(refs.k_full.at[slot])
        if not spec.has_key_lengths:
            self.await_values(block - 1)
        if tiles.in_turn:
            plgpu.barrier_wait(refs.turn.at[self.warpgroup.number])
        return self.with_scores(products)

    def mask_words(self, tile: Tile, i: Array | int, *, masked: bool | None) -> list[Array] | None:
        """Those of a dense mask for a tile's i-th block, if it needs an element mask."""
        plan = self.plan
        if plan.spec.mask_shape is None or not masked:
            return None
        block = tile.steps.block(i)
        return words_of(plan, self.seam, self.refs, tile.work, self.warpgroup.number, block)

    def weigh(
        self,
        tile: Tile,
        s: Array,
        i: Array | int,
        softmax: Softmax | None,
        words: list[Array] | None,
        *,
        masked: bool | None,
        end: End | None,
    ) -> tuple[Array, Softmax, Array]:
        """P of a tile's i-th block, the softmax that includes it, and the correction of O.

        masked: whether the block needs an element mask; None if only i tells.
        end: at which end of the blocks visited it then is; None if only i tells.
        """
        plan = self.plan
        x, c = logits(plan.spec, tile.scale, self.seam.layout(s, plgpu.Layout.WGMMA))
        q_slot, slot = None, self.slot(tile.visited + i)
        if plan.counted and plan.spec.has_segments:
            q_slot = self.query_slot(tile)
            slot = remainder(tile.visited + i, self.refs.k_segments.shape[0])
        has_bias = plan.spec.bias_shape is not None and not self.folded
        if has_bias:
            number, count = self.warpgroup.number, tile.visited + i
            x = bias.added(plan, self.seam, self.refs, number, count, x, c, widens=plan.one_power)

        def hidden(x: Array, end: End | None = None) -> Array:
            return hide(
                plan, self.seam, self.refs, tile.work, tile.steps, self.warpgroup, x, i, slot,
                words, q_slot, end if plan.ends_apart else None,
            )  # fmt: skip

        def hidden_at_its_end(x: Array) -> Array:
            of_ends = (partial(hidden, end="right"), partial(hidden, end="left"))
            found: Array = lax.cond(i < tile.steps.clear_from, *of_ends, x)
            return found

        if masked:
            x = hidden(x, end)
        elif masked is None:
            some = i < tile.steps.clear_from
            if plan.masked_left:
                some |= i >= tile.steps.clear_to
            of_end = hidden_at_its_end if plan.ends_apart else hidden
            x = lax.cond(some, of_end, lambda x: x, x)
        if has_bias:
            softmax = softmax or Softmax.start_beside_bias(self.seam, one_power=plan.one_power)
            p, softmax, correction = softmax.update_natural(x)
        else:
            p, softmax, correction = (softmax or Softmax.start(self.seam)).update(
                x, c, masked=masked is not False
            )
        if tile.words is not None and dropout.drops_early(plan):
            count = tile.visited + i
            p = dropout.kept_across(plan, self.seam, self.refs, tile.words, count, p)
        # What dropout leaves is rounded later too, for the reason that `two_products` gives.
        early = plan.one_loop and tile.words is None
        return p.astype(plan.spec.dtype) if early else p, softmax, correction

    def kept(self, tile: Tile, i: Array | int) -> Array | None:
        """Dropout's mask for a tile's i-th block, if it is made before P."""
        if tile.words is None or not dropout.decides_first(self.plan):
            return None
        return dropout.mask(self.plan, self.seam, self.refs, tile.words, tile.visited + i)

    def rounded(self, tile: Tile, i: Array | int, p: Array, kept: Array | None) -> Array:
        """P of a tile's i-th block as the product takes it, with zeros where dropout drops."""
        plan = self.plan
        if tile.words is None or dropout.drops_early(plan):
            return p.astype(plan.spec.dtype)
        if kept is not None:
            return self.seam.masked(p.astype(plan.spec.dtype), kept)
        return dropped(plan, self.seam, self.refs, tile.words, tile.visited + i, p)

    def store(self, tile: Tile, o: Array, softmax: Softmax) -> None:
        """O and the log-sum-exp on their way to their arrays."""
        slot = self.query_slot(tile)
        if self.folded:
            softmax = Softmax(softmax.m * LN2, softmax.l)
        store(self.plan, self.seam, self.refs, self.warpgroup, tile.work, slot, o, softmax)

    def await_first_values(self, tile: Tile) -> None:
        """Where lengths are given: the values of the first block, zero past the length.

        0 * NaN is not 0. Each warpgroup does this for itself, since all write the same.
        """
        plan, refs = self.plan, self.refs
        if not plan.spec.has_key_lengths:
            return
        self.await_values(tile.visited)
        length = jnp.minimum(refs.key_lengths[tile.work.batch], plan.spec.keys)
        real = length - tile.steps.block(0) * plan.tiles.keys

        @pl.when(real < plan.tiles.keys)
        def _() -> None:
            for v in parts_in(refs.v_smem, self.slot(tile.visited)):
                key = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=plgpu.Layout.WGMMA)
                v[...] = jnp.where(key < real, v[...], jnp.zeros((), v.dtype))
            plgpu.commit_smem()

    def await_values(self, block: Array) -> None:
        """Waits for a block's values, by the number of blocks visited before it."""
        plgpu.barrier_wait(self.refs.v_full.at[self.slot(block)])

    def await_queries(self, tile: Tile) -> None:
        number, turn = self.warpgroup.number, tile.turn
        first = 0 if isinstance(turn, int) else remainder(turn, 2) * self.plan.tiles.warpgroups
        plgpu.barrier_wait(self.refs.q_full.at[first + number])

    def multiply_keys(self, s_acc: Ref, tile: Tile, slot: Array) -> None:
        """S += Q Kᵀ, started."""
        place = self.query_slot(tile)
        left = self.plan.spec.head_dim
        for q, k in zip(self.refs.q_smem, self.refs.k_smem, strict=True):
            self.seam.keys_into(s_acc, q.at[place], k.at[slot], columns=left)
            left -= k.shape[-1]
        if self.folded:
            folded_bias.multiply(self.seam, self.refs, s_acc, slot)

    def multiply_values(self, p: Array, slot: Array) -> None:
        """O += P V, started."""
        self.seam.values_into(self.o_acc, p, self.refs.v_smem.at[slot])

    def query_slot(self, tile: Tile) -> Any:
        return query_slot(self.plan, tile.turn, self.warpgroup.number)

    def slot(self, block: Array | int) -> Array:
        """Where a key or value block is, by the number of blocks visited before it."""
        return remainder(block, self.plan.tiles.stages)

    def with_scores(self, body: Callable[[Ref], Weights]) -> Weights:
        stand_in = self.refs.s_stand_in.at[self.warpgroup.number] if self.seam.interpret else None
        shape = (ROWS, self.plan.tiles.keys)
        return self.seam.with_accumulator(body, shape, stand_in)  # type: ignore[no-any-return]
