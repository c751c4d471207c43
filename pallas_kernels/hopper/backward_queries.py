"""The Hopper kernel for dQ alone: three products, whose sum stays in registers.

    S = Q Kᵀ      P = exp(S - lse)      dP = dO Vᵀ      dS = P (dP - D)      dQ = dS K

D being the row term, rowsum(O dO) less the gradient of the log-sum-exp. With the kernels of dK and
dV that is seven products in place of five, but no two thread blocks add to the same number: results
are bitwise the same each time, and nothing is filled with zeros before, nor rounded after.

A thread block holds W compute warpgroups of 64 query rows, and goes over their blocks of keys from
right to left:

    loader         Q dO K0 V0   K1 V1         K2 V2         ..
    warpgroup 0       [S0|dP0]  dS0  [S1|dP1|dQ0]  dS1  [S2|dP2|dQ1] ..   [dQn]   write dQ
    warpgroup 1         [S0|dP0]  dS0  [S1|dP1|dQ0]  dS1  [S2|dP2|dQ1] ..   [dQn]   write dQ

Shared memory, with the barriers that guard it (`full`: a copy has landed; `free`: its readers are
done):

    q_smem, do_smem    (W, 64, H), (W, 64, D)         rows_full[w]       dQ goes out through Q
    rows_smem          (W, 3, 64)
    k_smem             (key slots, keys, H)           k_full[slot], k_free[slot]
    v_smem             (stages, keys, D)              v_full[slot], v_free[slot]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from jattn.call.masking import hides_some
from pallas_kernels.hopper.backward_block import ROW_TERM
from pallas_kernels.hopper.constant import constant
from pallas_kernels.hopper.dropout import (
    Words,
    dropout_inputs,
    kept,
    kept_factor,
    marked,
    words_of_rows,
)
from pallas_kernels.hopper.indices import for_each, quotient, remainder
from pallas_kernels.hopper.masks import Steps, Warpgroup, hide, steps_of
from pallas_kernels.hopper.plan import Plan, Work
from pallas_kernels.hopper.seam import Ref, Seam, matrix, ring
from pallas_kernels.hopper.segments import segment_arrays
from pallas_kernels.hopper.softmax import across, logits, scale_of
from pallas_kernels.hopper.tiles import ROWS, SHARED_MEMORY, Tiles
from pallas_kernels.hopper.warpgroups import run

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands

__all__ = ["QueryTiles", "choose_query_tiles", "launch", "plan_of"]

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # one value a query


def launch(
    spec: AttentionSpec,
    operands: Operands,
    inputs: dict[str, Array],
    *,
    unscaled: float | None = None,
    tiles: QueryTiles | None = None,
    interpret: bool,
) -> Array:
    """dQ (B, T, N, H) in the call's dtype.

    unscaled: what dS K is multiplied by instead of the scale.

    inputs: q, k, v and do, in sizes that can be copied in tiles; and `rows` by blocks,
      (B, N, blocks, 3, 64 or 128): the log-sum-exp in base 2, rounded and what that leaves,
      infinite and 0 where a row sees nothing, and the row term. Rows are a multiple of 128. What
      is left multiplies all weights of a row by one factor, and so its dQ.
    """
    seam = Seam(interpret)
    head, value = inputs["q"].shape[3], inputs["v"].shape[3]
    tiles = tiles or choose_query_tiles(spec, head, value)
    plan = plan_of(spec, tiles)
    inputs = {name: inputs[name] for name in ("q", "k", "v", "do", "rows")}
    inputs["zero"] = constant(np.zeros(1, np.int32))
    for name in ("query_lengths", "key_lengths", "query_offset"):
        if getattr(operands, name) is not None:
            inputs[name] = getattr(operands, name)
    if spec.has_segments:
        inputs |= segment_arrays(plan, operands)
    if operands.scale is not None:
        inputs["scale"] = operands.scale
    inputs |= dropout_inputs(spec, operands)
    widths = {"s": tiles.keys, "dp": tiles.keys, "dq": head}
    scratch = _scratch(plan, tiles, head, value)
    scratch |= seam.stand_ins({x: (tiles.warpgroups, ROWS, size) for x, size in widths.items()})
    names = [*inputs, "dq", *scratch]
    assert tiles.registers is not None
    most, least = tiles.registers

    def kernel(*args: Ref) -> None:
        refs = SimpleNamespace(**dict(zip(names, args, strict=True)))
        warpgroup = lax.axis_index("warpgroup")
        work = plan.work(lax.axis_index("block"))
        steps = steps_of(plan, refs, work)

        @pl.when(warpgroup < tiles.warpgroups)
        def _() -> None:
            plgpu.set_max_registers(most, action="increase")
            scale = scale_of(spec, refs, work.batch)
            own = Warpgroup(warpgroup)
            words = words_of_rows(plan, seam, refs, work, own)
            rows = Rows(plan, tiles, seam, refs, own, work, steps, scale, words)
            rows.compute(unscaled)

        @pl.when(warpgroup == tiles.warpgroups)
        def _() -> None:
            plgpu.set_max_registers(least, action="decrease")
            _load(plan, tiles, refs, work, steps)

    return run(  # type: ignore[no-any-return]
        kernel,
        inputs,
        out_type=jax.ShapeDtypeStruct(inputs["q"].shape, spec.dtype),
        scratch_types=list(scratch.values()),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=tiles.warpgroups + 1,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )


@dataclass(frozen=True)
class QueryTiles(Tiles):
    """Tiles of queries; `stages` are of values, and `overlap` is of dQ's product with the next S.

    key_slots: blocks of keys in shared memory; with `overlap` each is needed a step longer.
    """

    key_slots: int = 2


def choose_query_tiles(spec: AttentionSpec, head: int, value: int) -> QueryTiles:
    """The tiles for a call, whose arrays have these head dims."""
    # TFLOP/s of this kernel alone (three products) on an H200, bf16, 16,384 tokens, heads x head
    # dim 2048; T = 16k, 4k.
    width, w = max(head, value), 2
    if width <= 64:
        # Causal 652, 536; full 586, 574. Overlap the other way: causal 545, 514; full 566, 535.
        # Blocks of 64 keys: causal 527, 457; full 533, 517; with three warpgroups causal 617, 525;
        # full 549, 578.
        keys, overlap = 128, hides_some(spec)
    else:
        # 128: causal 789, 714; full 783. No overlap: causal 652 at 4k. 256: causal 800, 728; full
        # 757; beside its dQ there are no registers for a dS that waits.
        keys, overlap = 64, width <= 192
    for key_slots, stages in ((4, 3), (3, 2), (2, 1), (1, 1)):
        blocks = keys * (key_slots * head + stages * value) + w * ROWS * (head + value)
        vectors = 1024 * (2 + 2 * spec.has_segments)  # each in a kilobyte of its own
        if blocks * 2 + vectors <= SHARED_MEMORY:
            break
    return QueryTiles(w, keys, stages, query_slots=w, overlap=overlap, key_slots=key_slots)


def plan_of(spec: AttentionSpec, tiles: QueryTiles) -> Plan:
    """A thread block for each tile of each head."""
    plan = Plan(spec, tiles, pack=1, splits=1, blocks=1)
    return replace(plan, blocks=plan.works)


def _scratch(plan: Plan, tiles: QueryTiles, head: int, value: int) -> dict[str, Any]:
    spec, dtype = plan.spec, plan.spec.dtype
    w, stages, key_slots = tiles.warpgroups, tiles.stages, tiles.key_slots

    scratch = {
        "q_smem": matrix(dtype, w, ROWS, head),
        "do_smem": matrix(dtype, w, ROWS, value),
        "k_smem": matrix(dtype, key_slots, tiles.keys, head),
        "v_smem": matrix(dtype, stages, tiles.keys, value),
        "rows_smem": plgpu.SMEM((w, 3, ROWS), jnp.float32),
        "rows_full": ring(w, 3 + spec.has_segments),
        "k_full": ring(key_slots, 1 + spec.has_segments),
        "k_free": ring(key_slots, w),
        "v_full": ring(stages, 1),
        "v_free": ring(stages, w),
    }
    if spec.has_segments:
        scratch["q_segments"] = plgpu.SMEM((w, ROWS), jnp.int32)
        scratch["k_segments"] = plgpu.SMEM((key_slots, tiles.keys), jnp.int32)
    return scratch


def _load(plan: Plan, tiles: QueryTiles, refs: Ref, work: Work, steps: Steps) -> None:
    """Each warpgroup's rows once, then keys and values, each as soon as its slot is free."""
    batch = work.batch
    for w in range(tiles.warpgroups):
        full, rows = refs.rows_full.at[w], pl.ds(work.query + w * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(refs.q.at[batch, rows, work.head], refs.q_smem.at[w], full)
        plgpu.copy_gmem_to_smem(refs.do.at[batch, rows, work.head], refs.do_smem.at[w], full)
        size = refs.rows.shape[-1]
        block = quotient(work.query, size) + w * ROWS // size
        own = refs.rows.at[batch, work.head, block, :, pl.ds(w * ROWS % size, ROWS)]
        plgpu.copy_gmem_to_smem(own, refs.rows_smem.at[w], full)
        if plan.spec.has_segments:
            ids = refs.query_segments.at[batch, rows]
            plgpu.copy_gmem_to_smem(ids, refs.q_segments.at[w], full)

    def step(i: Array, _: None) -> None:
        rows = pl.ds(steps.block(i) * tiles.keys, tiles.keys)
        slot = remainder(i, tiles.key_slots)
        full = refs.k_full.at[slot]
        plgpu.barrier_wait(refs.k_free.at[slot])
        plgpu.copy_gmem_to_smem(refs.k.at[batch, rows, work.kv_head], refs.k_smem.at[slot], full)
        if plan.spec.has_segments:
            ids = refs.key_segments.at[batch, rows]
            plgpu.copy_gmem_to_smem(ids, refs.k_segments.at[slot], full)
        slot = remainder(i, tiles.stages)
        plgpu.barrier_wait(refs.v_free.at[slot])
        plgpu.copy_gmem_to_smem(
            refs.v.at[batch, rows, work.kv_head], refs.v_smem.at[slot], refs.v_full.at[slot]
        )

    for_each(0, steps.visits, step, None)
    for slot in range(tiles.key_slots):
        plgpu.barrier_wait(refs.k_free.at[slot])
    for slot in range(tiles.stages):
        plgpu.barrier_wait(refs.v_free.at[slot])


@dataclass(frozen=True)
class Rows:
    """A compute warpgroup: 64 query rows of the tile.

    scale is what their Q Kᵀ is multiplied by, words those of dropout, if there is any.
    """

    plan: Plan
    tiles: QueryTiles
    seam: Seam
    refs: Ref
    warpgroup: Warpgroup
    work: Work
    steps: Steps
    scale: Array | float
    words: Words | None

    def compute(self, unscaled: float | None) -> None:
        """All of the rows' blocks of keys, and their dQ to its array."""
        refs, tiles, number = self.refs, self.tiles, self.warpgroup.number
        for slot in range(tiles.key_slots):
            plgpu.barrier_arrive(refs.k_free.at[slot])
        for slot in range(tiles.stages):
            plgpu.barrier_arrive(refs.v_free.at[slot])
        plgpu.barrier_wait(refs.rows_full.at[number])
        dq = self.accumulator(self.visit_all, "dq", refs.q_smem.shape[-1])
        q_smem = refs.q_smem.at[number]
        scale = self.scale if unscaled is None else unscaled
        if self.words is not None:
            scale = scale * kept_factor(self.plan.spec)
        factor = jnp.exp2(-self.seam.load(refs.rows_smem.at[number, 1], ROW))
        dq = dq * across(factor * scale, dq.shape[1])
        q_smem[...] = dq.astype(self.plan.spec.dtype)
        plgpu.commit_smem()
        rows = pl.ds(self.work.query + number * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(q_smem, refs.dq.at[self.work.batch, rows, self.work.head])
        plgpu.wait_smem_to_gmem(0)

    def visit_all(self, dq_acc: Ref) -> Array:
        """dQ, a block of keys behind S."""
        plan, refs, steps = self.plan, self.refs, self.steps

        def loop(start: Any, stop: Any, ds: Any, *, masked: bool) -> Any:
            step = partial(self.step, dq_acc, masked=masked)
            return for_each(start, stop, step, ds)

        ds = self.step(dq_acc, 0, None, masked=plan.masked)
        if not plan.masked_later:
            ds = loop(1, steps.visits, ds, masked=False)
        else:
            ds = loop(1, steps.clear_from, ds, masked=True)
            ds = loop(steps.clear_from, steps.clear_to, ds, masked=False)
            if plan.masked_left:
                ds = loop(steps.clear_to, steps.visits, ds, masked=True)
        if ds is not None:
            last = self.k_slot(steps.visits - 1)
            self.seam.matmul_into(dq_acc, ds, refs.k_smem.at[last])
            self.seam.drain(0)
            plgpu.barrier_arrive(refs.k_free.at[last])
        return self.seam.wait(dq_acc, in_flight=0)

    def step(
        self, dq_acc: Ref, i: Array | int, before: Array | None, *, masked: bool
    ) -> Array | None:
        """dS of the i-th block visited, with dQ += dS K of the block before.

        Without overlap dQ += dS K of this block follows, and nothing is left for the next.
        """
        spec, seam, refs = self.plan.spec, self.seam, self.refs
        k_slot, v_slot = self.k_slot(i), remainder(i, self.tiles.stages)
        late, keys = int(before is not None), self.tiles.keys
        # A zero that the compiler cannot know: else it keeps the address of every product's rows.
        number = self.warpgroup.number + i * refs.zero[0]

        def gradient(s_acc: Ref, dp_acc: Ref) -> Array:
            seam.matmul_into(s_acc, refs.q_smem.at[number], refs.k_smem.at[k_slot].T)
            seam.matmul_into(dp_acc, refs.do_smem.at[number], refs.v_smem.at[v_slot].T)
            if before is not None:
                seam.matmul_into(dq_acc, before, refs.k_smem.at[self.k_slot(i - 1)])
            s = seam.layout(seam.wait(s_acc, in_flight=1 + late), WGMMA)
            x, c = logits(spec, self.scale, s)
            slope = None if spec.logits_soft_cap is None else 1 - x * x
            if masked:
                x = hide(self.plan, seam, refs, self.work, self.steps, self.warpgroup, x, i, k_slot)
            p = jnp.exp2(x * c - self.row(refs.rows_smem.at[self.warpgroup.number, 0]))
            if self.words is not None:
                first_key = self.steps.block(i) * self.tiles.keys
                p = marked(spec, refs, self.words, first_key, p, axis=1)
            hidden = p == 0
            if slope is not None:
                p = p * slope  # d tanh(y) = 1 - tanh² y
            dp = seam.wait(dp_acc, in_flight=late)
            row_term = self.row(refs.rows_smem.at[self.warpgroup.number, ROW_TERM])
            dp = seam.layout(dp, WGMMA)
            ds = p * (dp - row_term) if self.words is None else kept(p) * dp - jnp.abs(p) * row_term
            if masked:  # a hidden value may be so large that dP is infinite
                ds = jnp.where(hidden, 0.0, ds)
            plgpu.barrier_arrive(refs.v_free.at[v_slot])
            if before is not None:
                seam.drain(0)
                plgpu.barrier_arrive(refs.k_free.at[self.k_slot(i - 1)])
            # Only now, or ptxas sees an operand written while a product is in flight (C7513).
            return ds.astype(spec.dtype)

        plgpu.barrier_wait(refs.k_full.at[k_slot])
        plgpu.barrier_wait(refs.v_full.at[v_slot])
        ds: Array = self.accumulator(
            lambda s_acc: self.accumulator(partial(gradient, s_acc), "dp", keys), "s", keys
        )
        if self.tiles.overlap:
            return ds
        seam.matmul_into(dq_acc, ds, refs.k_smem.at[k_slot])
        seam.drain(0)
        plgpu.barrier_arrive(refs.k_free.at[k_slot])
        return None

    def k_slot(self, i: Array | int) -> Array:
        return remainder(i, self.tiles.key_slots)

    def row(self, smem: Ref) -> Array:
        """One value a query, as a matrix of a block."""
        return across(self.seam.load(smem, ROW), self.tiles.keys)

    def accumulator(self, body: Any, name: str, columns: int) -> Any:
        """body(accumulator of 64 rows), zero at first."""
        number, seam = self.warpgroup.number, self.seam
        stand_in = getattr(self.refs, f"{name}_stand_in").at[number] if seam.interpret else None
        return seam.with_accumulator(body, (ROWS, columns), stand_in)
