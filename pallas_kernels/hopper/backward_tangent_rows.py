"""What a compute warpgroup of the kernel of tdQ does: see `backward_tangent`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.indices import for_each, remainder
from pallas_kernels.hopper.masks import Steps, Warpgroup, hide
from pallas_kernels.hopper.seam import Ref, Seam
from pallas_kernels.hopper.softmax import across, logits
from pallas_kernels.hopper.tangent_products import Products
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from pallas_kernels.hopper.backward_tangent_tiles import BackwardTangentTiles
    from pallas_kernels.hopper.plan import Plan, Work

__all__ = ["Rows"]

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # one value a query
# A query's numbers: its log-sum-exp, rounded, mu, D and tD; and what the first leaves.
HIGH, MU, ROW_TERM, T_ROW_TERM, LOW = range(5)


class Operands(NamedTuple):
    """tdS and dS of a block, as they are multiplied by K and by tK; no dS if tK is 0."""

    tds: Array
    ds: Array | None


class Weights(NamedTuple):
    """P and M of a block."""

    p: Array
    m: Array


@dataclass(frozen=True)
class Rows(Products):
    """A compute warpgroup: 64 query rows of the tile; scale is what their Q Kᵀ is multiplied by."""

    plan: Plan
    tiles: BackwardTangentTiles
    seam: Seam
    refs: Ref
    warpgroup: Warpgroup
    work: Work
    steps: Steps
    scale: Array | float

    @property
    def number(self) -> Array:
        return self.warpgroup.number

    def compute(self) -> None:
        """All of the rows' blocks of keys, and their tdQ to its array."""
        refs, seam, number = self.refs, self.seam, self.number
        for slot in range(self.tiles.key_slots):
            plgpu.barrier_arrive(refs.k_free.at[slot])
        for slot in range(self.tiles.stages):
            plgpu.barrier_arrive(refs.v_free.at[slot])
        plgpu.barrier_wait(refs.rows_full.at[number])
        tdq = self.accumulator(self.visit_all, "tdq", refs.q_smem.shape[-1])
        # Worked out again, as if it could differ: kept, it takes registers from the products.
        work = self.plan.work(lax.axis_index("block") + self.steps.visits * refs.zero[0])
        rows = pl.ds(work.query + number * ROWS, ROWS)
        low = seam.load_gmem(refs.rows.at[work.batch, work.head, LOW, rows], ROW)
        # What the weights were too large by is one factor a row.
        tdq = tdq * across(jnp.exp2(-low) * self.scale, tdq.shape[1])
        smem = refs.q_smem.at[number]
        smem[...] = tdq.astype(self.plan.spec.dtype)
        plgpu.commit_smem()
        columns = pl.ds(0, tdq.shape[1])
        plgpu.copy_smem_to_gmem(smem, refs.tdq.at[work.batch, rows, work.head, columns])
        plgpu.wait_smem_to_gmem(0)

    def visit_all(self, tdq_acc: Ref) -> Array:
        """The sum of [tdS dS] [K tK], a block of keys behind S."""
        plan, steps = self.plan, self.steps

        def loop(start: Any, stop: Any, found: Any, *, masked: bool) -> Any:
            return for_each(start, stop, partial(self.step, tdq_acc, masked=masked), found)

        # Without overlap no step is beside another, and the first is as others.
        first = int(self.tiles.overlap)
        found = self.step(tdq_acc, 0, None, masked=plan.masked) if first else None
        if not plan.masked:
            found = loop(first, steps.visits, found, masked=False)
        else:
            clear_from = steps.clear_from
            if not first or plan.masked_later:
                found = loop(first, clear_from, found, masked=True)
            found = loop(clear_from, steps.clear_to, found, masked=False)
            if plan.masked_left:
                found = loop(steps.clear_to, steps.visits, found, masked=True)
        if found is not None:
            self.end_step(tdq_acc, steps.visits - 1, found)
        return self.seam.layout(self.seam.wait(tdq_acc, in_flight=0), WGMMA)

    def end_step(self, tdq_acc: Ref, i: Array | int, found: Operands) -> None:
        """Adds the product of the i-th block visited, and frees its keys."""
        slot = self.k_slot(i)
        self.add_keys(tdq_acc, slot, found)
        self.seam.drain(0)
        plgpu.barrier_arrive(self.refs.k_free.at[slot])

    def step(
        self, tdq_acc: Ref, i: Array | int, before: Operands | None, *, masked: bool
    ) -> Operands | None:
        """tdS and dS of the i-th block visited, behind those of the block before by [K tK].

        Without overlap they are multiplied at once, and nothing is left for the next.
        """
        seam, refs = self.seam, self.refs
        k_slot, v_slot = self.k_slot(i), remainder(i, self.tiles.stages)
        # A zero that the compiler cannot know: else it keeps the address of every product's rows.
        number = self.number + i * refs.zero[0]

        def start_logits(s_acc: Ref, ts_acc: Ref | None) -> None:
            self.start(number, s_acc, "q", "k", k_slot)
            for a, b in self.moving_logits:
                self.start(number, ts_acc, a, b, k_slot)

        def of_logits(s_acc: Ref, ts_acc: Ref | None) -> Operands:
            weigh = partial(self.weigh, i, k_slot, s_acc, ts_acc, masked=masked)
            start = partial(start_logits, s_acc, ts_acc)
            if before is not None:
                self.add_keys(tdq_acc, self.k_slot(i - 1), before)
                start()
                seam.drain(1 + len(self.moving_logits))
                plgpu.barrier_arrive(refs.k_free.at[self.k_slot(i - 1)])
            elif masked:
                start()
            # With a mask there are no registers for more accumulators beside its own.
            weighed = weigh(late=0) if masked else None
            plgpu.barrier_wait(refs.v_full.at[v_slot])
            # Only now, in the registers of what the product before had for operands.
            body = partial(of_gradients, start if before is None else None, weigh, weighed)
            return self.with_two(body, "dp", self.moving_gradients, self.tiles.keys)  # type: ignore[no-any-return]

        def of_gradients(
            start: Any, weigh: Any, weighed: Weights | None, dp_acc: Ref, tdp_acc: Ref | None
        ) -> Operands:
            if weighed is None and start is not None:
                start()
            self.start(number, dp_acc, "do", "v", v_slot)
            for a, b in self.moving_gradients:
                self.start(number, tdp_acc, a, b, v_slot)
            late = len(self.moving_gradients)
            p, m = weigh(late=late + 1) if weighed is None else weighed
            dp = seam.layout(seam.wait(dp_acc, in_flight=late), WGMMA)
            ds = p * (dp - self.row(ROW_TERM))
            change = -self.row(T_ROW_TERM)
            if tdp_acc is not None:
                change += seam.layout(seam.wait(tdp_acc, in_flight=0), WGMMA)
            tds = m * ds + p * change
            if masked:  # what is hidden may be so large that its products are infinite
                ds, tds = (jnp.where(p == 0, 0.0, x) for x in (ds, tds))
            seam.drain(0)
            plgpu.barrier_arrive(refs.v_free.at[v_slot])
            # Only now, or ptxas sees an operand written while a product is in flight (C7513).
            dtype = self.plan.spec.dtype
            return Operands(tds.astype(dtype), ds.astype(dtype) if self.has("tk") else None)

        plgpu.barrier_wait(refs.k_full.at[k_slot])
        found: Operands = self.with_two(of_logits, "s", self.moving_logits, self.tiles.keys)
        if self.tiles.overlap:
            return found
        self.end_step(tdq_acc, i, found)
        return None

    @property
    def moving_logits(self) -> list[tuple[str, str]]:
        """What tS is the products of: of queries and of keys."""
        return self.there(("tq", "k"), ("q", "tk"))

    @property
    def moving_gradients(self) -> list[tuple[str, str]]:
        """What tdP is the products of: of output gradients and of values."""
        return self.there(("tdo", "v"), ("do", "tv"))

    def start(self, number: Array, acc: Ref, a: str, b: str, slot: Array) -> None:
        """Starts acc += A Bᵀ, of this warpgroup's rows and the block in this slot."""
        rows, block = (vars(self.refs)[f"{name}_smem"] for name in (a, b))
        self.seam.matmul_into(acc, rows.at[number], block.at[slot].T)

    def add_keys(self, tdq_acc: Ref, slot: Array, found: Operands) -> None:
        """Starts tdQ += tdS K + dS tK of the block in this slot."""
        self.seam.matmul_into(tdq_acc, found.tds, self.refs.k_smem.at[slot])
        if found.ds is not None:
            self.seam.matmul_into(tdq_acc, found.ds, self.refs.tk_smem.at[slot])

    def weigh(
        self,
        i: Array | int,
        slot: Array,
        s_acc: Ref,
        ts_acc: Ref | None,
        *,
        late: int,
        masked: bool,
    ) -> Weights:
        """P and M of a block; `late` products were started after those of its logits."""
        seam = self.seam
        s = seam.wait(s_acc, in_flight=late + len(self.moving_logits))
        x, c = logits(self.plan.spec, self.scale, seam.layout(s, WGMMA))
        if masked:
            of = (self.plan, seam, self.refs, self.work, self.steps, self.warpgroup)
            x = hide(*of, x, i, slot)
        p = jnp.exp2(x * c - self.row(HIGH))
        m = -self.row(MU)
        if ts_acc is not None:
            m += seam.layout(seam.wait(ts_acc, in_flight=late), WGMMA) * self.scale
        if late and self.tiles.holds:
            # Else ptxas waits for all products before it makes the weights.
            seam.hold(p, self.refs.zero[0].astype(jnp.uint32))
        return Weights(p, m)

    def row(self, which: int) -> Array:
        """One value a query, as a matrix of a block."""
        smem = self.refs.rows_smem.at[self.number, which]
        return across(self.seam.load(smem, ROW), self.tiles.keys)

    def k_slot(self, i: Array | int) -> Array:
        return remainder(i, self.tiles.key_slots)
