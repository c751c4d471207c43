"""Attention backward on Hopper (sm_90a) for wide heads, a head dim over 128: dK and dV.

    Sᵀ = K Qᵀ          Pᵀ = exp(Sᵀ - lse)              dV = Pᵀ dO
    dPᵀ = V dOᵀ        dSᵀ = Pᵀ (dPᵀ - D)              dK = dSᵀ Q

D being the row term, rowsum(O dO) less the gradient of the log-sum-exp. One warpgroup's registers
hold dK or dV of 64 keys, not both, and none of dQ: that has a kernel of its own
(`backward_queries.py`). So a thread block has one tile of 64 keys, and its two compute warpgroups
have roles: `value` makes P and dV, `key` makes dS and dK.

    loader    K V Q0 dO0  Q1    dO1      Q2    dO2      ..
    value     [S0] P0 [dV0]  [S1] P1 [dV1]  [S2] P2 [dV2] ..         write dV
    key       [dP0]    dS0 [dK0]  [dP1]  dS1 [dK1]  [dP2]  dS2 ..    write dK

Shared memory, with the barriers that guard it (`full`: its content is there; `free`: its readers
are done; both for each slot of a ring):

    k_smem, v_smem          (64, H), (64, D)   kv_full; done: both roles are
    q_smem, lse_smem        (slots, 64, H)     q_full[slot], q_free[slot]
    do_smem, row_term_smem     (slots, 64, D)     do_full[slot], do_free[slot]
    p_smem                  (2, 64, 64)        p_full[slot], p_free[slot]
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.backward_block import (
    ROW_TERM,
    WGMMA,
    Block,
    banded,
    each,
    grid_of,
    key_gradients,
)
from pallas_kernels.hopper.backward_sums import Gradient, sums_of_keys
from pallas_kernels.hopper.backward_tiles import BackwardTiles
from pallas_kernels.hopper.constant import numbers
from pallas_kernels.hopper.copies import backward_width
from pallas_kernels.hopper.dropout import kept, kept_factor, words_head
from pallas_kernels.hopper.grid import Grid
from pallas_kernels.hopper.indices import quotient, remainder
from pallas_kernels.hopper.plain import in_both_ways, named, piece_shape
from pallas_kernels.hopper.seam import Ref, Seam, matrix, ring
from pallas_kernels.hopper.softmax import logits
from pallas_kernels.hopper.tiles import ROWS
from pallas_kernels.hopper.visits import Visits
from pallas_kernels.hopper.warpgroups import run

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["launch"]

VALUE, KEY, LOADER = range(3)  # the warpgroups
RING = 2  # slots of P


def launch(
    spec: AttentionSpec,
    tiles: BackwardTiles,
    inputs: dict[str, Array],
    words_of_sums: Ref | None = None,
    *,
    interpret: bool,
) -> tuple[Array, ...]:
    """dK and dV, as `key_gradients` says; and sums if `tiles.adds`, with words for them."""
    seam = Seam(interpret)
    head, value = (backward_width(inputs[name].shape[3]) for name in "kv")
    if banded(spec):
        inputs = inputs | {"index": numbers(ROWS)}
    widths = {"s": ROWS, "dp": ROWS, "dk": head, "dv": value}
    scratch = _scratch(spec, tiles, head, value)
    scratch |= seam.stand_ins({name: (ROWS, columns) for name, columns in widths.items()})
    if words_of_sums is not None:
        inputs = inputs | {"words_of_sums": words_of_sums}
    out_type = key_gradients(spec, tiles, inputs)
    own = ["dk", "dv"]
    if tiles.adds:
        out_type.append(sums_of_keys(spec, tiles, inputs))
        own.append("sums")
        scratch["arrived_smem"] = plgpu.SMEM((3,), jnp.int32)
    if tiles.pieces:
        matrices = [f"{name}_smem" for name in ("q", "k", "v", "do")]
        scratch = in_both_ways(scratch, matrices, interpret=interpret)
    names = [*inputs, *own, *scratch]
    grid = grid_of(spec, tiles)

    def kernel(*args: Ref) -> None:
        refs = named(scratch, names, args)
        warpgroup = lax.axis_index("warpgroup")
        block = WideBlock(spec, tiles, seam, refs, grid)

        @pl.when(warpgroup == VALUE)
        def _() -> None:
            plgpu.set_max_registers(240, action="increase")
            _value_role(block)

        @pl.when(warpgroup == KEY)
        def _() -> None:
            plgpu.set_max_registers(240, action="increase")
            _key_role(block)

        @pl.when(warpgroup == LOADER)
        def _() -> None:
            plgpu.set_max_registers(24, action="decrease")
            _load(block)

    found: tuple[Array, ...] = run(
        kernel,
        inputs,
        out_type=out_type,
        scratch_types=list(scratch.values()),
        **grid.launch,
        num_threads=3,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return tuple(found)


def _scratch(spec: AttentionSpec, tiles: BackwardTiles, head: int, value: int) -> dict[str, Any]:
    dtype, q_slots, do_slots = spec.dtype, 2, tiles.stages
    columns = {"q": head, "k": head, "v": value, "do": value}
    own: dict[str, tuple[int, ...]] = {name: (ROWS, x) for name, x in columns.items()}
    if tiles.pieces:
        own = {name: piece_shape(ROWS, x) for name, x in columns.items()}
    copies = {name: shape[0] if tiles.pieces else 1 for name, shape in own.items()}

    scratch = {
        "k_smem": matrix(dtype, *own["k"]),
        "v_smem": matrix(dtype, *own["v"]),
        "q_smem": matrix(dtype, q_slots, *own["q"]),
        "do_smem": matrix(dtype, do_slots, *own["do"]),
        "lse_smem": plgpu.SMEM((q_slots, 2, ROWS), jnp.float32),
        "row_term_smem": plgpu.SMEM((do_slots, ROWS), jnp.float32),
        "p_smem": matrix(dtype, RING, ROWS, ROWS),
        "kv_full": plgpu.Barrier(
            num_arrivals=copies["k"]
            + copies["v"]
            + banded(spec)
            + spec.has_segments
            + (spec.dropout_rate > 0)
        ),
        "q_full": ring(q_slots, copies["q"] + 1 + spec.has_segments + (spec.dropout_rate > 0)),
        "q_free": ring(q_slots, 2),
        "do_full": ring(do_slots, copies["do"] + 1),
        "do_free": ring(do_slots, 2),
        "p_full": ring(RING, 1),
        "p_free": ring(RING, 1),
        "done": plgpu.Barrier(num_arrivals=2),
    }
    if banded(spec):
        scratch["index_smem"] = plgpu.SMEM((ROWS,), jnp.int32)
    if spec.dropout_rate > 0:
        scratch["words_smem"] = plgpu.SMEM((q_slots, 2, ROWS), jnp.uint32)
        scratch["dropout_keys"] = plgpu.SMEM((ROWS,), jnp.uint32)
    if spec.has_segments:
        scratch["q_segments"] = plgpu.SMEM((q_slots, ROWS), jnp.int32)
        scratch["k_segments"] = plgpu.SMEM((ROWS,), jnp.int32)
    return scratch


class WideBlock(Block):
    """A thread block whose visits are counted through all heads of the group: steps."""

    def __init__(
        self, spec: AttentionSpec, tiles: BackwardTiles, seam: Seam, refs: Ref, grid: Grid
    ) -> None:
        super().__init__(spec, tiles, seam, refs, grid.place())
        # A tile that no query sees visits some block all the same, of which all is hidden.
        visits = self.visits
        first = jnp.minimum(visits.first, refs.rows.shape[2] - 1)
        count = jnp.maximum(visits.count, 1)
        none = visits.count == 0
        self.visits = Visits(
            first, count, *(jnp.where(none, 1, x) for x in (visits.clear_from, visits.clear_to))
        )
        self.steps = count * self.heads
        self.key_start = self.tile * ROWS

    def place(self, n: Array) -> tuple[Array, Array]:
        """Query head and block of step n."""
        count = self.visits.count
        h, i = (quotient(n, count), remainder(n, count)) if self.heads > 1 else (jnp.int32(0), n)
        return self.first_head + h, self.visited(i)

    def fetch(self, array: Ref, place: tuple[Any, ...], parts: list[Ref], full: Ref) -> None:
        """Starts the copies of a matrix's parts."""
        for source, part in self.copies(array, place, parts):
            plgpu.copy_gmem_to_smem(source, part, full)

    def q_slot(self, n: Array) -> Array:
        """Where the queries of step n are."""
        return remainder(n, self.refs.q_smem.shape[0])

    def do_slot(self, n: Array) -> Array:
        """Where dO of step n is."""
        return remainder(n, self.refs.do_smem.shape[0])

    def accumulator(self, body: Any, name: str, columns: int) -> Any:
        """body(accumulator of 64 rows), zero at first."""
        stand_in = getattr(self.refs, f"{name}_stand_in") if self.seam.interpret else None
        return self.seam.with_accumulator(body, (ROWS, columns), stand_in)


def _load(block: WideBlock) -> None:
    """K and V once, then Q, dO and what belongs to their rows, each as soon as its slot is free."""
    spec, refs, batch, kv_head = block.spec, block.refs, block.batch, block.kv_head
    keys = pl.ds(block.key_start, ROWS)
    block.fetch(refs.k, (batch, keys, kv_head), block.parts(refs.k_rows), refs.kv_full)
    block.fetch(refs.v, (batch, keys, kv_head), block.parts(refs.v_rows), refs.kv_full)
    if banded(spec):
        plgpu.copy_gmem_to_smem(refs.index, refs.index_smem, refs.kv_full)
    if spec.has_segments:
        plgpu.copy_gmem_to_smem(refs.key_segments.at[batch, keys], refs.k_segments, refs.kv_full)
    if spec.dropout_rate > 0:
        plgpu.copy_gmem_to_smem(refs.dropout_words.at[keys], refs.dropout_keys, refs.kv_full)

    def fetch(n: Array) -> None:
        head, first = block.place(n)
        rows, slot = pl.ds(first * ROWS, ROWS), block.q_slot(n)
        full = refs.q_full.at[slot]
        plgpu.barrier_wait(refs.q_free.at[slot])
        block.fetch(refs.q, (batch, rows, head), block.parts(refs.q_rows, slot), full)
        lse = refs.rows.at[batch, head, first, pl.ds(0, 2)]
        plgpu.copy_gmem_to_smem(lse, refs.lse_smem.at[slot], full)
        if spec.has_segments:
            ids = refs.query_segments.at[batch, rows]
            plgpu.copy_gmem_to_smem(ids, refs.q_segments.at[slot], full)
        if spec.dropout_rate > 0:
            words = refs.words.at[batch, words_head(spec, head), first]
            plgpu.copy_gmem_to_smem(words, refs.words_smem.at[slot], full)
        slot = block.do_slot(n)
        full = refs.do_full.at[slot]
        plgpu.barrier_wait(refs.do_free.at[slot])
        block.fetch(refs.do, (batch, rows, head), block.parts(refs.do_rows, slot), full)
        row_term = refs.rows.at[batch, head, first, ROW_TERM]
        plgpu.copy_gmem_to_smem(row_term, refs.row_term_smem.at[slot], full)

    each(0, block.steps, fetch)
    for slot in range(refs.q_smem.shape[0]):
        plgpu.barrier_wait(refs.q_free.at[slot])
    for slot in range(refs.do_smem.shape[0]):
        plgpu.barrier_wait(refs.do_free.at[slot])


def _hidden_zero(n: Array) -> Array:
    """A zero that the compiler cannot know: what is computed with it stays inside the loop."""
    return lax.shift_right_logical(n, np.int32(30))


def _start(block: WideBlock) -> None:
    refs = block.refs
    for slot in range(refs.q_smem.shape[0]):
        plgpu.barrier_arrive(refs.q_free.at[slot])
    for slot in range(refs.do_smem.shape[0]):
        plgpu.barrier_arrive(refs.do_free.at[slot])
    plgpu.barrier_wait(refs.kv_full)


def _value_role(block: WideBlock) -> None:
    """P and dV of the tile."""
    spec, seam, refs = block.spec, block.seam, block.refs

    def over_tile(dv_acc: Ref, s_acc: Ref) -> Array:
        def scores(n: Array) -> None:
            """S of step n, started; past the last step it is of what there is, and not used."""
            slot = block.q_slot(n)
            pl.when(n < block.steps)(lambda: plgpu.barrier_wait(refs.q_full.at[slot]))
            s_acc[...] = seam.layout(jnp.zeros((ROWS, ROWS), jnp.float32), WGMMA)
            k = block.rows_of(refs.k_smem, pl.ds(ROWS * _hidden_zero(n), ROWS))
            seam.inner_into(s_acc, k, refs.q_smem.at[slot])

        def step(n: Array, *, in_two: bool) -> None:
            q_slot, do_slot, p_slot = block.q_slot(n), block.do_slot(n), remainder(n, RING)
            s = seam.wait(s_acc, in_flight=0)
            x, c = logits(spec, block.scale, s)
            p = block.weights(x, c, refs.lse_smem.at[q_slot], in_two=in_two)
            if block.masked:
                p = block.hide(p, 0, block.place(n)[1] * ROWS, q_slot)
            if spec.dropout_rate > 0:
                p = block.marked(p, 0, q_slot)
            plgpu.barrier_arrive(refs.q_free.at[q_slot])
            # What dP is multiplied by: the derivative of the softmax, and of the cap.
            factor = p if spec.logits_soft_cap is None else p * (1 - x * x)
            p = (kept(p) if spec.dropout_rate > 0 else p).astype(spec.dtype)
            plgpu.barrier_wait(refs.p_free.at[p_slot])
            refs.p_smem[p_slot] = factor.astype(spec.dtype)
            plgpu.barrier_arrive(refs.p_full.at[p_slot])
            plgpu.barrier_wait(refs.do_full.at[do_slot])
            seam.matmul_into(dv_acc, p, refs.do_smem.at[do_slot])
            seam.drain(0)
            plgpu.barrier_arrive(refs.do_free.at[do_slot])
            scores(n + 1)

        scores(jnp.int32(0))
        middle = jnp.where(block.in_two, block.steps, 0)
        each(0, middle, partial(step, in_two=True))
        each(middle, block.steps, partial(step, in_two=False))
        seam.drain(0)
        return seam.wait(dv_acc, in_flight=0)

    _start(block)
    dv = block.accumulator(
        lambda dv_acc: block.accumulator(partial(over_tile, dv_acc), "s", ROWS),
        "dv",
        backward_width(refs.v.shape[3]),
    )
    _finish(block, dv, "v")
    for slot in range(RING):
        plgpu.barrier_wait(refs.p_free.at[slot])


def _key_role(block: WideBlock) -> None:
    """dS and dK of the tile."""
    spec, seam, refs = block.spec, block.seam, block.refs

    def over_tile(dk_acc: Ref) -> Array:
        def step(n: Array, *, masked: bool) -> None:
            q_slot, do_slot, p_slot = block.q_slot(n), block.do_slot(n), remainder(n, RING)
            q, do = refs.q_smem.at[q_slot], refs.do_smem.at[do_slot]

            def product(dp_acc: Ref) -> Array:
                v = block.rows_of(refs.v_smem, pl.ds(ROWS * _hidden_zero(n), ROWS))
                seam.inner_into(dp_acc, v, do)
                return seam.wait(dp_acc, in_flight=0)

            plgpu.barrier_wait(refs.do_full.at[do_slot])
            dp = block.accumulator(product, "dp", ROWS)
            row_term = block.row(refs.row_term_smem.at[do_slot])
            plgpu.barrier_arrive(refs.do_free.at[do_slot])
            plgpu.barrier_wait(refs.p_full.at[p_slot])
            p = seam.load(refs.p_smem.at[p_slot], WGMMA)
            if spec.dropout_rate > 0:
                slope = p.astype(jnp.float32)
                ds = kept(slope) * dp - jnp.abs(slope) * row_term
            else:
                ds = p.astype(jnp.float32) * (dp - row_term)
            if masked:  # a hidden value may be so large that dP is infinite
                ds = jnp.where(p == 0, 0.0, ds)
            ds = ds.astype(spec.dtype)
            plgpu.barrier_wait(refs.q_full.at[q_slot])
            seam.matmul_into(dk_acc, ds, q)
            seam.drain(0)
            plgpu.barrier_arrive(refs.q_free.at[q_slot])
            plgpu.barrier_arrive(refs.p_free.at[p_slot])

        def over_head(h: Array) -> None:
            first, count = h * block.visits.count, block.visits.count
            masked = block.visits.masked if block.masked else 0
            if block.masked:
                each(first, first + masked, partial(step, masked=True))
            each(first + masked, first + count, partial(step, masked=False))

        each(0, block.heads, over_head)
        return seam.wait(dk_acc, in_flight=0)

    _start(block)
    for slot in range(RING):
        plgpu.barrier_arrive(refs.p_free.at[slot])
    dk = block.accumulator(over_tile, "dk", backward_width(refs.k.shape[3]))
    _finish(block, dk * block.scale, "k")


def _finish(block: WideBlock, gradient: Array, name: str) -> None:
    """Writes the role's gradient, by the place of an operand that both roles are done with."""
    if block.spec.dropout_rate > 0:
        gradient = gradient * kept_factor(block.spec)
    plgpu.barrier_arrive(block.refs.done)
    plgpu.barrier_wait(block.refs.done)
    smem, rows = (block.parts(getattr(block.refs, f"{name}_{kind}")) for kind in ("smem", "rows"))
    block.store(block.key_start, Gradient(gradient, smem, rows, f"d{name}"))
    plgpu.wait_smem_to_gmem(0)
