"""What a compute warpgroup of the kernel of the output's tangent does: see `tangent`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.indices import for_each, remainder
from pallas_kernels.hopper.masks import Warpgroup, hide
from pallas_kernels.hopper.seam import Ref, Seam
from pallas_kernels.hopper.softmax import across, logits
from pallas_kernels.hopper.tangent_products import Products
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from pallas_kernels.hopper.plan import Plan, Work
    from pallas_kernels.hopper.tangent_tiles import TangentTiles
    from pallas_kernels.hopper.tangent_visits import Order

__all__ = ["Rows"]

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # one value a query
HIGH, LOW, OF_SINKS = range(3)  # a query's vectors: its log-sum-exp in two, the sinks' part of mu


class Sums(NamedTuple):
    """A row's, (64,): c; P tS; W as rounded; and P, if a sink asks for it."""

    centre: Array
    mu: Array
    rounded: Array
    total: Array


class Weights(NamedTuple):
    """What is to be multiplied by tV and by V: P and W of the latest block; None of neither."""

    p: Array | None
    w: Array | None


@dataclass(frozen=True)
class Rows(Products):
    """A compute warpgroup: 64 query rows of the tile; scale is what their Q Kᵀ is multiplied by."""

    plan: Plan
    tiles: TangentTiles
    seam: Seam
    refs: Ref
    warpgroup: Warpgroup
    work: Work
    order: Order
    scale: Array | float

    @property
    def number(self) -> Array:
        return self.warpgroup.number

    def compute(self) -> None:
        """All of the rows' blocks of keys, and their tO and mu to their arrays."""
        refs, number = self.refs, self.number
        for slot in range(self.tiles.stages):
            plgpu.barrier_arrive(refs.k_free.at[slot])
            plgpu.barrier_arrive(refs.v_free.at[slot])
        if self.tiles.own_staging:
            self.load_out()
        plgpu.barrier_wait(refs.rows_full.at[number])
        # Before the output's accumulator, whose registers the sweep does not take from it.
        centre = self.centre_of_sweep()
        visits, width = partial(self.visit_all, centre), padded_width(self.plan.spec.value_dim)
        acc, sums = self.accumulator(visits, "o", width)
        if not self.tiles.own_staging:
            plgpu.commit_smem()  # all of the warpgroup has read its queries
            self.load_out()
        self.store(acc, sums)

    @property
    def o_smem(self) -> Ref:
        refs = self.refs
        whole = refs.o_smem if self.tiles.own_staging else refs.q_smem
        return whole.at[self.number]

    @property
    def rows(self) -> Any:
        return pl.ds(self.work.query + self.number * ROWS, ROWS)

    def load_out(self) -> None:
        refs, smem = self.refs, self.o_smem
        its = refs.out.at[self.work.batch, self.rows, self.work.head, pl.ds(0, smem.shape[-1])]
        plgpu.copy_gmem_to_smem(its, smem, refs.o_full.at[self.number])

    def store(self, acc: Array, sums: Sums) -> None:
        """What the weights were too large by is one factor a row, and of all its sums."""
        spec, seam, refs, number = self.plan.spec, self.seam, self.refs, self.number
        own = refs.rows_smem.at[number]
        factor = jnp.exp2(-seam.load(own.at[LOW], ROW))
        others = seam.load(own.at[OF_SINKS], ROW)
        refs.mu_smem[number] = sums.mu * factor + others
        if spec.has_sinks:  # what c was taken off has the sum 1, less the sink's share
            others += sums.centre * (sums.total * factor - 1)
        plgpu.barrier_wait(refs.o_full.at[number])
        smem, width = self.o_smem, acc.shape[1]
        out = seam.load(smem, WGMMA).astype(jnp.float32)
        of_output = sums.rounded * factor + others
        t_out = acc * across(factor, width) - across(of_output, width) * out
        smem[...] = t_out.astype(spec.dtype)
        plgpu.commit_smem()
        at = (self.work.batch, self.rows, self.work.head, pl.ds(0, width))
        plgpu.copy_smem_to_gmem(smem, refs.t_out.at[at])
        plgpu.copy_smem_to_gmem(
            refs.mu_smem.at[number], refs.mu.at[self.work.batch, self.work.head, self.rows]
        )
        plgpu.wait_smem_to_gmem(0)

    def centre_of_sweep(self) -> Array:
        """c of the tile's rows, (64,), by all their keys, which are swept; 0 if none is."""
        nothing = self.seam.layout(jnp.zeros((ROWS,), jnp.float32), ROW)
        if not self.plan.masked or not self.pairs:
            return nothing

        def step(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            slot = self.slot(i)

            def products(s_acc: Ref, ts_acc: Ref) -> tuple[Array, Array]:
                self.start_logits(i, slot, s_acc, ts_acc)
                p, tx = self.weights(i, slot, s_acc, ts_acc, masked=True)
                assert tx is not None
                tx = jnp.where(p == 0, 0.0, tx)
                plgpu.barrier_arrive(self.refs.k_free.at[slot])
                total, moved = sums
                return total + p.sum(axis=1), moved + (p * tx).sum(axis=1)

            plgpu.barrier_wait(self.refs.k_full.at[slot])
            found: tuple[Array, Array] = self.with_logits(products)
            return found

        total, moved = for_each(0, self.order.sweep, step, (nothing, nothing))
        sees_none = total == 0.0
        return jnp.where(sees_none, 0.0, moved / jnp.where(sees_none, 1.0, total))

    def visit_all(self, centre: Array, o_acc: Ref) -> tuple[Array, Sums]:
        """The sum of [W P] [V tV], a block of keys behind S, and the rows' sums."""
        plan, steps = self.plan, self.order.steps

        def loop(start: Any, stop: Any, state: Any, *, masked: bool) -> Any:
            return for_each(start, stop, partial(self.step, o_acc, masked=masked), state)

        nothing = self.seam.layout(jnp.zeros((ROWS,), jnp.float32), ROW)
        # The first block has no product beside its logits.
        state = self.step(o_acc, 0, (None, Sums(centre, *(nothing,) * 3)), masked=plan.masked)
        if plan.masked:
            # One more than need a mask: the clear one came first.
            clear_from = jnp.minimum(jnp.maximum(steps.clear_from, 1) + 1, steps.visits)
            clear_to = jnp.maximum(steps.clear_to, clear_from)
            state = loop(1, clear_from, state, masked=True)
            if plan.masked_left:
                state = loop(clear_from, clear_to, state, masked=False)
                state = loop(clear_to, steps.visits, state, masked=True)
            else:
                state = loop(clear_from, steps.visits, state, masked=False)
        else:
            state = loop(1, steps.visits, state, masked=False)
        weights, sums = state
        last = self.slot(steps.visits - 1)
        plgpu.barrier_wait(self.refs.v_full.at[last])
        self.add_values(o_acc, last, weights)
        self.seam.drain(0)
        plgpu.barrier_arrive(self.refs.v_free.at[last])
        acc = self.seam.layout(self.seam.wait(o_acc, in_flight=0), WGMMA)
        return acc, sums

    def step(
        self, o_acc: Ref, i: Array | int, state: tuple[Weights | None, Sums], *, masked: bool
    ) -> tuple[Weights, Sums]:
        """P and W of the i-th block visited, while those of the block before are multiplied."""
        seam, refs, (before, sums) = self.seam, self.refs, state
        slot = self.slot(i)
        last = slot if before is None else self.slot(i - 1)

        def products(s_acc: Ref, ts_acc: Ref | None) -> tuple[Weights, Sums]:
            self.start_logits(i, slot, s_acc, ts_acc)
            late = 0 if before is None else self.add_values(o_acc, last, before)
            p, tx = self.weights(i, slot, s_acc, ts_acc, late=late, masked=masked)
            w, moved = None, sums
            if tx is not None:
                w, moved = self.change(p, tx, sums, i, masked=masked)
            plgpu.barrier_arrive(refs.k_free.at[slot])
            if self.plan.spec.has_sinks:
                moved = moved._replace(total=moved.total + p.sum(axis=1))
            if before is not None:
                seam.drain(0)
                plgpu.barrier_arrive(refs.v_free.at[last])
            # Only now, or ptxas sees an operand written while a product is in flight (C7513).
            p_rounded = p.astype(self.plan.spec.dtype) if hasattr(refs, "tv") else None
            if w is None:
                return Weights(p_rounded, None), moved
            w_rounded = w.astype(self.plan.spec.dtype)
            rounded = moved.rounded + w_rounded.astype(jnp.float32).sum(axis=1)
            return Weights(p_rounded, w_rounded), moved._replace(rounded=rounded)

        plgpu.barrier_wait(refs.k_full.at[slot])
        if before is not None:
            plgpu.barrier_wait(refs.v_full.at[last])
        found: tuple[Weights, Sums] = self.with_logits(products)
        return found

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What the logits' tangents are products of: of queries and of keys."""
        return self.there(("tq", "k"), ("q", "tk"))

    def with_logits(self, products: Callable[[Ref, Any], Any]) -> Any:
        """products(accumulator of S, that of tS or None)."""
        return self.with_two(products, "s", self.pairs, self.tiles.keys)

    def start_logits(self, i: Array | int, slot: Array, s_acc: Ref, ts_acc: Ref | None) -> None:
        """Starts the products of S and tS of the block in this slot."""
        seam, refs, named = self.seam, self.refs, vars(self.refs)
        # A zero that the compiler cannot know: else it keeps the address of every product's rows.
        number = self.number + i * refs.zero[0]
        seam.matmul_into(s_acc, refs.q_smem.at[number], refs.k_smem.at[slot].T)
        for a, b in self.pairs:
            of_queries, of_keys = named[f"{a}_smem"], named[f"{b}_smem"]
            seam.matmul_into(ts_acc, of_queries.at[number], of_keys.at[slot].T)

    def weights(
        self,
        i: Array | int,
        slot: Array,
        s_acc: Ref,
        ts_acc: Ref | None,
        *,
        masked: bool,
        late: int = 0,
    ) -> tuple[Array, Array | None]:
        """P of a block, and how its logits change; `late` products were started after theirs."""
        seam = self.seam
        s = seam.layout(seam.wait(s_acc, in_flight=late + len(self.pairs)), WGMMA)
        p, slope = self.weigh(s, i, slot, masked=masked)
        if ts_acc is None:
            return p, None
        tx = seam.layout(seam.wait(ts_acc, in_flight=late), WGMMA) * self.scale
        return p, tx if slope is None else tx * slope

    def weigh(
        self, s: Array, i: Array | int, slot: Array, *, masked: bool
    ) -> tuple[Array, Array | None]:
        """P of a block, and the slope of a soft cap, if there is one."""
        spec = self.plan.spec
        x, c = logits(spec, self.scale, s)
        slope = None if spec.logits_soft_cap is None else 1 - x * x
        if masked:
            steps = self.order.steps
            of = (self.plan, self.seam, self.refs, self.work, steps, self.warpgroup)
            x = hide(*of, x, self.order.step(i), slot)
        high = self.seam.load(self.refs.rows_smem.at[self.number, HIGH], ROW)
        return jnp.exp2(x * c - across(high, x.shape[1])), slope

    def change(
        self, p: Array, tx: Array, sums: Sums, i: Array | int, *, masked: bool
    ) -> tuple[Array, Sums]:
        """W of a block, whose logits change by tx, and the rows' sums with it."""
        centre = sums.centre
        if isinstance(i, int) and i == 0:
            of_block = _mean(p, tx)
            if masked:
                swept = self.seam.layout(jnp.full((ROWS,), self.order.sweep, jnp.int32), ROW)
                of_block = jnp.where(swept > 0, centre, of_block)
            centre = of_block
        if masked:  # a hidden key may be so large that its product is infinite
            tx = jnp.where(p == 0, 0.0, tx)
        w = p * (tx - across(centre, tx.shape[1]))
        return w, sums._replace(centre=centre, mu=sums.mu + (p * tx).sum(axis=1))

    def add_values(self, o_acc: Ref, slot: Array, weights: Weights) -> int:
        """Starts O += W V + P tV of the block in this slot; how many products these are."""
        seam, refs = self.seam, self.refs
        count = 0
        if weights.w is not None:
            seam.matmul_into(o_acc, weights.w, refs.v_smem.at[slot])
            count += 1
        if weights.p is not None:
            seam.matmul_into(o_acc, weights.p, refs.tv_smem.at[slot])
            count += 1
        return count

    def slot(self, i: Array | int) -> Array:
        """Where the block of the i-th visit is, and that of the i-th of the sweep."""
        return remainder(i, self.tiles.stages)


def _mean(p: Array, tx: Array) -> Array:
    """Of each row, (64,), by its weights in a block seen whole; by none if they underflow."""
    weight = p.sum(axis=1)
    none = weight == 0.0
    mean = (p * tx).sum(axis=1) / jnp.where(none, 1.0, weight)
    return jnp.where(none, tx.sum(axis=1) / tx.shape[1], mean)
