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
    b_smem             of a bias, see `bias.py`       b_full[slot], b_free[slot]
    k_smem             (key slots, keys, H)           k_full[slot], k_free[slot]
    v_smem             (stages, keys, D)              v_full[slot], v_free[slot]

The gradient of a bias that nothing shares is dS itself: it goes out through the slot in which its
block of the bias came, and zeros go where no block is visited.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from jattn.call.masking import hides_some
from pallas_kernels.hopper import bias, dropout
from pallas_kernels.hopper.backward_block import LOW, ROW_BIAS, ROW_TERM
from pallas_kernels.hopper.bias_form import form_of, has_ring
from pallas_kernels.hopper.constant import constant
from pallas_kernels.hopper.copies import backward_width
from pallas_kernels.hopper.dense_mask import mask_arrays, words_of
from pallas_kernels.hopper.dropout import (
    Words,
    kept_across,
    kept_factor,
    words_of_rows,
)
from pallas_kernels.hopper.indices import for_each, quotient, remainder
from pallas_kernels.hopper.masks import Steps, Warpgroup, hide, steps_of
from pallas_kernels.hopper.plain import cut, in_both_ways, named, parts_of, piece_shape, places
from pallas_kernels.hopper.plan import Plan, Work
from pallas_kernels.hopper.row_terms import row_sums
from pallas_kernels.hopper.seam import Ref, Seam, matrix, ring
from pallas_kernels.hopper.segments import segment_arrays
from pallas_kernels.hopper.softmax import LN2, LOG2E, across, cap_slope, logits, scale_of
from pallas_kernels.hopper.tiles import ROWS, SHARED_MEMORY, Tiles
from pallas_kernels.hopper.warpgroups import Part, run

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands

__all__ = ["QueryTiles", "choose_query_tiles", "launch", "part_of", "plan_of"]

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # one value a query


def launch(
    spec: AttentionSpec,
    operands: Operands,
    inputs: dict[str, Array],
    *,
    unscaled: float | None = None,
    wants_bias: bool = False,
    in_pieces: bool = False,
    tiles: QueryTiles | None = None,
    interpret: bool,
) -> tuple[Array, ...]:
    """dQ (B, T, N, H) in the call's dtype, and the bias's gradient if it is wanted.

    That is (B, N, T, S) in the bias's dtype, T and S in sizes that can be copied in tiles.

    unscaled: what dS K is multiplied by instead of the scale.
    in_pieces: matrices are pieces of 64 columns, copied as plain rows, of arrays of any length.

    inputs: q, k, v and do, in sizes that can be copied in tiles; and `rows` by blocks,
      (B, N, blocks, 3, 64 or 128): the log-sum-exp in base 2, rounded and what that leaves,
      infinite and 0 where a row sees nothing, and the row term. Rows are a multiple of 128. What
      is left multiplies all weights of a row by one factor, and so its dQ.
    """
    head, value = (backward_width(inputs[name].shape[3]) for name in "qv")
    tiles = replace(tiles or choose_query_tiles(spec, head, value), pieces=in_pieces)
    part, blocks = part_of(
        spec, operands, inputs, tiles, unscaled=unscaled, wants_bias=wants_bias, interpret=interpret
    )
    scratch = in_both_ways(part.scratch, part.both, interpret=interpret)
    names = [*part.inputs, *part.results, *scratch]

    def kernel(*args: Ref) -> None:
        part.body(named(scratch, names, args), lax.axis_index("block"))

    found: list[Array] = run(
        kernel,
        part.inputs,
        out_type=list(part.results.values()),
        scratch_types=list(scratch.values()),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=tiles.warpgroups + 1,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )
    return tuple(found)


def part_of(
    spec: AttentionSpec,
    operands: Operands,
    inputs: dict[str, Array],
    tiles: QueryTiles,
    *,
    unscaled: float | None,
    wants_bias: bool = False,
    interpret: bool,
) -> tuple[Part, int]:
    """The kernel as `launch` says, and how many thread blocks it has, which are given a number."""
    seam = Seam(interpret)
    head, value = (backward_width(inputs[name].shape[3]) for name in "qv")
    plan = plan_of(spec, tiles)
    names = ("q", "k", "v", "do", "rows", *(["out"] if "out" in inputs else []))
    inputs = {name: inputs[name] for name in names}
    inputs["zero"] = constant(np.zeros(1, np.int32))
    for name in ("query_lengths", "key_lengths", "query_offset"):
        if getattr(operands, name) is not None:
            inputs[name] = getattr(operands, name)
    if spec.has_segments:
        inputs |= segment_arrays(plan, operands)
    if has_ring(spec):
        inputs |= bias.bias_arrays(plan, operands)
    if spec.mask_shape is not None:
        inputs |= mask_arrays(plan, operands)
    if operands.scale is not None:
        inputs["scale"] = operands.scale
    inputs |= dropout.dropout_inputs(plan, operands, beside_rows=tiles.has_words_beside(spec))
    widths = {"s": tiles.keys, "dp": tiles.keys, "dq": head}
    scratch = _scratch(plan, tiles, head, value, takes_output="out" in inputs)
    scratch |= seam.stand_ins({x: (tiles.warpgroups, ROWS, size) for x, size in widths.items()})
    matrices = ("q", "do", "k", "v", *(["out"] if "out" in inputs else []))
    both = tuple(f"{name}_smem" for name in matrices) if tiles.pieces else ()
    results = {"dq": jax.ShapeDtypeStruct(inputs["q"].shape, spec.dtype)}
    if wants_bias:
        shape = (spec.batch, spec.heads, *inputs["bias"].shape[2:])
        results["d_bias"] = jax.ShapeDtypeStruct(shape, spec.bias_dtype)
    assert tiles.registers is not None
    most, least = tiles.registers

    def body(refs: Ref, number: Array) -> None:
        warpgroup = lax.axis_index("warpgroup")
        work = plan.work(number)
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

    return Part(inputs, results, scratch, both, body), plan.blocks


@dataclass(frozen=True)
class QueryTiles(Tiles):
    """Tiles of queries; `stages` are of values, and `overlap` is of dQ's product with the next S.

    key_slots: blocks of keys in shared memory; with `overlap` each is needed a step longer.
    pieces: matrices are pieces of 64 columns, each one tile wide and copied as plain rows.
    """

    key_slots: int = 2
    pieces: bool = False

    def matrix(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of one in shared memory."""
        return piece_shape(rows, columns) if self.pieces else (rows, columns)

    def copies(self, columns: int) -> int:
        """How many copies one takes."""
        return piece_shape(0, columns)[0] if self.pieces else 1

    def parts(self, ref: Ref, slot: Any) -> list[Ref]:
        """One in this slot of shared memory, or its pieces."""
        return parts_of(ref, slot) if self.pieces else [ref.at[slot]]

    def fetch(self, array: Ref, place: tuple[Any, ...], ref: Ref, slot: Any, full: Ref) -> None:
        """Starts the copies of one."""
        for source, part in places(array, place, self.parts(ref, slot), place[0] * 0):
            plgpu.copy_gmem_to_smem(source, part, full)

    def has_words_beside(self, spec: AttentionSpec) -> bool:
        """Whether the words of two blocks of keys for dropout are what the rows' vectors leave."""
        fit = self.keys == ROWS and self.warpgroups == dropout.SLOTS
        return spec.dropout_rate > 0 and fit


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
    # A bias takes registers that a block of 128 keys leaves none of.
    keys = 64 if form_of(spec) == "whole" else keys
    tiles = QueryTiles(w, keys, 1, query_slots=w, overlap=overlap, key_slots=1)
    words = spec.dropout_rate > 0 and not tiles.has_words_beside(spec)
    vectors = 1024 * (2 + 2 * spec.has_segments + words)  # each in a kilobyte of its own
    for key_slots, stages in ((4, 3), (3, 2), (2, 1)):
        blocks = keys * (key_slots * head + stages * value) + w * ROWS * (head + value)
        if blocks * 2 + vectors + tiles.bias_bytes(spec) <= SHARED_MEMORY:
            return replace(tiles, key_slots=key_slots, stages=stages)
    return tiles


def plan_of(spec: AttentionSpec, tiles: QueryTiles) -> Plan:
    """A thread block for each tile of each head."""
    plan = Plan(spec, tiles, pack=1, splits=1, blocks=1)
    return replace(plan, blocks=plan.works)


def _scratch(
    plan: Plan, tiles: QueryTiles, head: int, value: int, *, takes_output: bool = False
) -> dict[str, Any]:
    spec, dtype = plan.spec, plan.spec.dtype
    w, stages, key_slots = tiles.warpgroups, tiles.stages, tiles.key_slots
    beside = form_of(spec) == "rows" or tiles.has_words_beside(spec)

    scratch = {
        "q_smem": matrix(dtype, w, *tiles.matrix(ROWS, head)),
        "do_smem": matrix(dtype, w, *tiles.matrix(ROWS, value)),
        "k_smem": matrix(dtype, key_slots, *tiles.matrix(tiles.keys, head)),
        "v_smem": matrix(dtype, stages, *tiles.matrix(tiles.keys, value)),
        "rows_smem": plgpu.SMEM((w, 3 + beside, ROWS), jnp.float32),
        "rows_full": ring(w, tiles.copies(head) + tiles.copies(value) + 1 + spec.has_segments),
        "k_full": ring(key_slots, tiles.copies(head) + spec.has_segments),
        "k_free": ring(key_slots, w),
        "v_full": ring(stages, tiles.copies(value)),
        "v_free": ring(stages, w),
    }
    if takes_output:
        scratch["out_smem"] = matrix(dtype, w, *tiles.matrix(ROWS, value))
        arrivals = scratch["rows_full"].num_arrivals + tiles.copies(value)
        scratch["rows_full"] = ring(w, arrivals)
    scratch |= dropout.scratch(plan, beside_rows=tiles.has_words_beside(spec))
    if has_ring(spec):
        scratch |= bias.scratch(plan)
    if spec.has_segments:
        scratch["q_segments"] = plgpu.SMEM((w, ROWS), jnp.int32)
        scratch["k_segments"] = plgpu.SMEM((key_slots, tiles.keys), jnp.int32)
    return scratch


def _load(plan: Plan, tiles: QueryTiles, refs: Ref, work: Work, steps: Steps) -> None:
    """Each warpgroup's rows once, then keys and values, each as soon as its slot is free."""
    batch = work.batch
    for w in range(tiles.warpgroups):
        full, rows = refs.rows_full.at[w], pl.ds(work.query + w * ROWS, ROWS)
        tiles.fetch(refs.q, (batch, rows, work.head), refs.q_rows, w, full)
        tiles.fetch(refs.do, (batch, rows, work.head), refs.do_rows, w, full)
        if "out_smem" in vars(refs):
            tiles.fetch(refs.out, (batch, rows, work.head), refs.out_rows, w, full)
        size = refs.rows.shape[-1]
        block = quotient(work.query, size) + w * ROWS // size
        own = refs.rows.at[batch, work.head, block, :, pl.ds(w * ROWS % size, ROWS)]
        vectors = pl.ds(0, refs.rows.shape[-2])
        plgpu.copy_gmem_to_smem(own, refs.rows_smem.at[w, vectors], full)
        if plan.spec.has_segments:
            ids = refs.query_segments.at[batch, rows]
            plgpu.copy_gmem_to_smem(ids, refs.q_segments.at[w], full)

    def step(i: Array, _: None) -> None:
        rows = pl.ds(steps.block(i) * tiles.keys, tiles.keys)
        slot = remainder(i, tiles.key_slots)
        full = refs.k_full.at[slot]
        plgpu.barrier_wait(refs.k_free.at[slot])
        tiles.fetch(refs.k, (batch, rows, work.kv_head), refs.k_rows, slot, full)
        if plan.spec.has_segments:
            ids = refs.key_segments.at[batch, rows]
            plgpu.copy_gmem_to_smem(ids, refs.k_segments.at[slot], full)
        bias.load_block(plan, refs, work, steps.stop - 1 - i, i)
        dropout.load_block(plan, refs, steps.block(i), i)
        slot = remainder(i, tiles.stages)
        plgpu.barrier_wait(refs.v_free.at[slot])
        tiles.fetch(refs.v, (batch, rows, work.kv_head), refs.v_rows, slot, refs.v_full.at[slot])

    for_each(0, steps.visits, step, None)
    for slot in range(tiles.key_slots):
        plgpu.barrier_wait(refs.k_free.at[slot])
    for slot in range(tiles.stages):
        plgpu.barrier_wait(refs.v_free.at[slot])
    bias.drain(plan, refs)
    dropout.drain(plan, refs)


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
        bias.start(self.plan, refs)
        dropout.start(self.plan, refs)
        plgpu.barrier_wait(refs.rows_full.at[number])
        if "out_smem" in vars(refs):
            both = (tiles.parts(x, number) for x in (refs.out_smem, refs.do_smem))
            refs.rows_smem.at[number, ROW_TERM][...] = row_sums(self.seam, *both)
        dq = self.accumulator(self.visit_all, "dq", backward_width(refs.q.shape[3]))
        if self.writes_bias:
            self.end_bias()
        scale = self.scale if unscaled is None else unscaled
        if self.words is not None:
            scale = scale * kept_factor(self.plan.spec)
        if self.writes_bias:  # whose weights are of both parts
            dq = dq * scale
        else:
            factor = jnp.exp2(-self.seam.load(refs.rows_smem.at[number, 1], ROW))
            dq = dq * across(factor * scale, dq.shape[1])
        parts = tiles.parts(refs.q_smem, number)
        for x, part in zip(cut(dq, dq.shape[1] // len(parts)), parts, strict=True):
            part[...] = x.astype(self.plan.spec.dtype)
        plgpu.commit_smem()
        rows = pl.ds(self.work.query + number * ROWS, ROWS)
        place = (self.work.batch, rows, self.work.head)
        for to, part in places(refs.dq, place, tiles.parts(refs.q_rows, number), place[0] * 0):
            plgpu.copy_smem_to_gmem(part, to)
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
            seam.inner_into(s_acc, refs.q_smem.at[number], refs.k_smem.at[k_slot])
            seam.inner_into(dp_acc, refs.do_smem.at[number], refs.v_smem.at[v_slot])
            if before is not None:
                seam.matmul_into(dq_acc, before, refs.k_smem.at[self.k_slot(i - 1)])
            words = self.mask_words(i, masked=masked)
            kept = None
            # Beside an element mask there are no registers for it.
            first = dropout.decides_first(self.plan) and not self.plan.masked
            if self.words is not None and first:
                kept = dropout.mask(self.plan, seam, refs, self.words, jnp.int32(i))
                seam.made_before(kept, refs.zero[0])
            s = seam.layout(seam.wait(s_acc, in_flight=1 + late), WGMMA)
            x, c = logits(spec, self.scale, s)
            capped, has_bias = spec.logits_soft_cap is not None, spec.bias_shape is not None
            slope = cap_slope(x, masked=False) if capped and has_bias else None
            if has_bias:
                x, c = self.with_bias(i, x, c), LOG2E
            if masked:
                x = hide(
                    self.plan, seam, refs, self.work, self.steps, self.warpgroup, x, i, k_slot,
                    words,
                )  # fmt: skip
            lse = refs.rows_smem.at[self.warpgroup.number, 0]
            exponent = (x - self.row(lse)) * c if has_bias else x * c - self.row(lse)
            if self.writes_bias:
                exponent -= self.row(refs.rows_smem.at[self.warpgroup.number, LOW])
            p = jnp.exp2(exponent)
            if capped and not has_bias:
                slope = cap_slope(x, masked=masked)
            if slope is not None and not self.writes_bias:
                p = p * slope
            hidden = p == 0
            dp = seam.wait(dp_acc, in_flight=late)
            row_term = self.row(refs.rows_smem.at[self.warpgroup.number, ROW_TERM])
            dp = seam.layout(dp, WGMMA)
            if self.words is None:
                ds = p * (dp - row_term)
            else:
                if kept is None:
                    own = kept_across(self.plan, seam, refs, self.words, jnp.int32(i), p)
                else:
                    own = seam.masked(p, kept)
                ds = own * dp - p * row_term
            if masked or has_bias:  # a hidden value may be so large that dP is infinite
                ds = jnp.where(hidden, 0.0, ds)
            plgpu.barrier_arrive(refs.v_free.at[v_slot])
            if before is not None:
                seam.drain(0)
                plgpu.barrier_arrive(refs.k_free.at[self.k_slot(i - 1)])
            if self.writes_bias:
                self.write_bias(i, ds)
                ds = ds if slope is None else ds * slope
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

    def with_bias(self, i: Array | int, x: Array, c: float) -> Array:
        """The natural logits of the i-th block visited."""
        number, refs = self.warpgroup.number, self.refs
        if not has_ring(self.plan.spec):
            return x * (c * LN2) + self.row(refs.rows_smem.at[number, ROW_BIAS])
        keeps = self.writes_bias
        if keeps and not isinstance(i, int):
            self.release_bias(i - 1)
        count = jnp.int32(i)
        return bias.added(self.plan, self.seam, refs, number, count, x, c, keeps=keeps)

    @property
    def writes_bias(self) -> bool:
        """Whether the bias's gradient is wanted."""
        return "d_bias" in vars(self.refs)

    def bias_slot(self, i: Array | int) -> tuple[Array, Ref]:
        """The slot of the i-th block visited, and this warpgroup's rows of it."""
        slot = remainder(i, self.tiles.bias_stages)
        mine = pl.ds(self.warpgroup.number * ROWS, ROWS)
        return slot, self.refs.b_smem.at[slot, mine]

    def write_bias(self, i: Array | int, ds: Array) -> None:
        """The i-th block's dS on its way to the bias's gradient."""
        _, smem = self.bias_slot(i)
        smem[...] = ds.astype(self.plan.spec.bias_dtype)
        plgpu.commit_smem()
        self.send_bias(smem, self.steps.block(i))

    def send_bias(self, smem: Ref, block: Array) -> None:
        keys = self.tiles.keys
        rows = pl.ds(self.work.query + self.warpgroup.number * ROWS, ROWS)
        place = (self.work.batch, self.work.head, rows, pl.ds(block * keys, keys))
        plgpu.copy_smem_to_gmem(smem, self.refs.d_bias.at[place])

    def release_bias(self, i: Array | int) -> None:
        """The slot of the i-th block, whose dS has left it."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.refs.b_free.at[self.bias_slot(i)[0]])

    def end_bias(self) -> None:
        """The last slot, and zeros for the blocks that are not visited."""
        steps = self.steps
        last = steps.visits - 1
        self.release_bias(last)
        _, smem = self.bias_slot(last)
        shape = (ROWS, self.tiles.keys)
        zeros = self.seam.layout(jnp.zeros(shape, self.plan.spec.bias_dtype), WGMMA)
        smem[...] = zeros
        plgpu.commit_smem()
        count = -(-self.refs.d_bias.shape[3] // self.tiles.keys)

        def send(block: Array, _: None) -> None:
            self.send_bias(smem, block)

        for_each(0, steps.stop - steps.visits, send, None)
        for_each(steps.stop, count, send, None)

    def mask_words(self, i: Array | int, *, masked: bool) -> list[Array] | None:
        """Those of a dense mask for the i-th block visited, if it needs an element mask."""
        if self.plan.spec.mask_shape is None or not masked:
            return None
        number, block = self.warpgroup.number, self.steps.block(i)
        return words_of(self.plan, self.seam, self.refs, self.work, number, block)

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
