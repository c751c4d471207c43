"""How the gradients of keys and values change, on Hopper: see `backward_tangent`.

    Sᵀ = K Qᵀ     tSᵀ = [tK K] [Q tQ]ᵀ      Pᵀ = exp(Sᵀ - lse)    Mᵀ = tSᵀ - mu
    dPᵀ = V dOᵀ   tdPᵀ = [tV V] [dO tdO]ᵀ   dSᵀ = Pᵀ (dPᵀ - D)    tdSᵀ = Mᵀ dSᵀ + Pᵀ (tdPᵀ - tD)
    tdV = [(P M)ᵀ Pᵀ] [dO tdO]              tdK = [tdSᵀ dSᵀ] [Q tQ]

Ten products. A thread block holds two compute warpgroups of 64 keys, and goes over the blocks of
queries that see some of them, of each head of the group in turn:

    loader         K tK V tV   Q0 tQ0 dO0 tdO0   Q1 tQ1 dO1 tdO1   ..
    warpgroup 0       [S0|tS0|dP0|tdP0]  P0 M0 dS0 tdS0  [tdV0|tdK0]  [S1|tS1|..    write tdK tdV
    warpgroup 1         [S0|tS0|dP0|tdP0]  P0 M0 dS0 tdS0  [tdV0|tdK0]  [S1|..      write tdK tdV

Six accumulators of 64 columns are 192 of a thread's 240 registers; sums of wider heads leave none.

Shared memory, with the barriers that guard it (`full`: copies have landed; `free`: its readers are
done):

    k_smem, tk_smem, v_smem, tv_smem    (W, 64, H or D)       kv_full        tdK, tdV go out here
    q_smem, tq_smem, do_smem, tdo_smem  (stages, 64, H or D)  q_full[slot], q_free[slot]
    rows_smem                           (stages, 5, 64)       q_full[slot]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from jattn.call.masking import hides_some, past_zeroed
from pallas_kernels.hopper.backward import by_block, in_two
from pallas_kernels.hopper.backward_block import (
    WGMMA,
    Block,
    banded,
    each,
    grid_of,
    key_gradients,
)
from pallas_kernels.hopper.backward_sums import Gradient
from pallas_kernels.hopper.backward_tiles import BackwardTiles
from pallas_kernels.hopper.constant import numbers
from pallas_kernels.hopper.forward import in_tiles
from pallas_kernels.hopper.indices import remainder
from pallas_kernels.hopper.seam import Ref, Seam, matrix, ring
from pallas_kernels.hopper.softmax import LOG2E, logits
from pallas_kernels.hopper.tangent_block import row_numbers
from pallas_kernels.hopper.tangent_products import Products
from pallas_kernels.hopper.tiles import ROWS
from pallas_kernels.hopper.visits import edge_padded, visits
from pallas_kernels.hopper.warpgroups import Role, run_roles

if TYPE_CHECKING:
    from jattn.call.row_arrays import BackwardTangentRows
    from jattn.call.spec import AttentionSpec, Operands, Tangents

__all__ = ["KeyTangentTiles", "choose_key_tangent_tiles", "key_gradient_tangents"]

# A query's vectors: its log-sum-exp in two, mu, D and tD.
HIGH, LOW, MU, ROW_TERM, T_ROW_TERM = range(5)
KEYS_SIDE = ("k", "tk", "v", "tv")
QUERIES_SIDE = ("q", "tq", "do", "tdo")
STAGES = 3
REGISTERS = (240, 24)  # of a thread that computes and one that loads: 504 of 512 for 128 each


@dataclass(frozen=True)
class KeyTangentTiles(BackwardTiles):
    """A thread block's tile of keys.

    holds: of clear blocks no wait for dP is moved before the making of P.
    """

    holds: bool = False


def choose_key_tangent_tiles(spec: AttentionSpec) -> KeyTangentTiles:
    """The tiles for a call."""
    # As backward: tiles of equal length of one head share its queries in L2.
    return KeyTangentTiles(queries=ROWS, stages=STAGES, tiles_first=not hides_some(spec))


def key_gradient_tangents(
    spec: AttentionSpec,
    operands: Operands,
    rows: BackwardTangentRows,
    tangents: Tangents,
    *,
    tiles: KeyTangentTiles | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Tangents of the gradients of key and value, in the call's dtype.

    Args:
      spec: the call; `limits.key_tangent_refusals` must be empty for it.
      operands: its arrays; sinks are not looked at.
      rows: what else each row has, `top` in base 2.
      tangents: of query, key and value; none has to be there.
      tiles: tile shapes to use instead of the table's.
      interpret: run on a CPU, thread by thread.
    """
    tiles = tiles or choose_key_tangent_tiles(spec)
    lengths = {"q": operands.query_lengths, "k": operands.key_lengths, "v": operands.key_lengths}
    arrays = {
        "q": operands.query,
        "tq": tangents.query,
        "k": operands.key,
        "tk": tangents.key,
        "v": operands.value,
        "tv": tangents.value,
        "do": rows.d_out,
        "tdo": rows.td_out,
    }
    inputs = {}
    for name, x in arrays.items():
        if x is not None:
            past = lengths.get(name.removeprefix("t"))
            inputs[name] = in_tiles(x if past is None else past_zeroed(x, past))
    count = -(-spec.queries // ROWS)
    high, low = in_two(rows.top, rows.rest * LOG2E)
    of_row = (high, low, rows.t_lse, rows.row_term, rows.t_row_term)
    inputs["rows"] = by_block(*row_numbers(*of_row, rows=count * ROWS), queries=ROWS)
    inputs["ranges"] = visits(spec, operands, queries=ROWS, keys=tiles.keys)
    inputs["largest_low"] = jnp.zeros((spec.batch, spec.kv_heads), jnp.float32)
    if spec.has_segments:
        inputs["query_segments"] = edge_padded(operands.query_segments, count * ROWS)
        its_rows = -(-spec.keys // tiles.keys) * tiles.keys
        inputs["key_segments"] = edge_padded(operands.key_segments, its_rows)
    if operands.key_lengths is not None:
        inputs["key_lengths"] = jnp.minimum(operands.key_lengths, spec.keys)
    for name in ("query_offset", "scale"):
        if getattr(operands, name) is not None:
            inputs[name] = getattr(operands, name)
    if banded(spec):
        inputs["index"] = numbers(ROWS)
    tdk, tdv = _launch(spec, tiles, inputs, interpret=interpret)
    return (
        tdk[:, : spec.keys, :, : spec.head_dim],
        tdv[:, : spec.keys, :, : spec.value_dim],
    )


def _launch(
    spec: AttentionSpec, tiles: KeyTangentTiles, inputs: dict[str, Array], *, interpret: bool
) -> list[Array]:
    seam, w = Seam(interpret), tiles.warpgroups
    head, value = inputs["k"].shape[3], inputs["v"].shape[3]
    widths = dict.fromkeys(("s", "ts", "dp", "tdp"), ROWS) | {"tdk": head, "tdv": value}
    scratch = _scratch(spec, tiles, inputs)
    scratch |= seam.stand_ins({name: (w, ROWS, columns) for name, columns in widths.items()})
    grid = grid_of(spec, tiles)

    def roles(refs: Ref, warpgroup: Array) -> tuple[Role, Role]:
        def compute() -> None:
            block = Block(spec, tiles, seam, refs, grid.place())
            Keys(block, warpgroup, holds=tiles.holds).compute()

        return compute, lambda: _load(Block(spec, tiles, seam, refs, grid.place()))

    return run_roles(
        roles,
        inputs,
        dict(zip(("tdk", "tdv"), key_gradients(spec, tiles, inputs), strict=True)),
        scratch,
        warpgroups=w,
        registers=REGISTERS,
        **grid.launch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )


def _scratch(
    spec: AttentionSpec, tiles: KeyTangentTiles, inputs: dict[str, Array]
) -> dict[str, Any]:
    w, stages = tiles.warpgroups, tiles.stages
    own = [name for name in KEYS_SIDE if name in inputs]
    its = [name for name in QUERIES_SIDE if name in inputs]
    scratch = {
        f"{name}_smem": matrix(spec.dtype, slots, ROWS, inputs[name].shape[3])
        for names, slots in ((own, w), (its, stages))
        for name in names
    }
    scratch |= {
        "rows_smem": plgpu.SMEM((stages, 5, ROWS), jnp.float32),
        "kv_full": plgpu.Barrier(num_arrivals=w * len(own) + banded(spec) + spec.has_segments),
        "q_full": ring(stages, len(its) + 1 + spec.has_segments),
        "q_free": ring(stages, w),
    }
    if banded(spec):
        scratch["index_smem"] = plgpu.SMEM((ROWS,), jnp.int32)
    if spec.has_segments:
        scratch["q_segments"] = plgpu.SMEM((stages, ROWS), jnp.int32)
        scratch["k_segments"] = plgpu.SMEM((tiles.keys,), jnp.int32)
    return scratch


def _load(block: Block) -> None:
    """The keys' side once, then each block of the queries' as soon as its slot is free."""
    spec, refs, batch, own = block.spec, block.refs, block.batch, vars(block.refs)
    start = block.tile * block.tiles.keys

    def copy(name: str, rows: Any, head: Array, slot: Any, full: Ref) -> None:
        if name in own:
            place = own[name].at[batch, rows, head]
            plgpu.copy_gmem_to_smem(place, own[f"{name}_smem"].at[slot], full)

    for w in range(block.tiles.warpgroups):
        for name in KEYS_SIDE:
            copy(name, pl.ds(start + w * ROWS, ROWS), block.kv_head, w, refs.kv_full)
    if banded(spec):
        plgpu.copy_gmem_to_smem(refs.index, refs.index_smem, refs.kv_full)
    if spec.has_segments:
        ids = refs.key_segments.at[batch, pl.ds(start, block.tiles.keys)]
        plgpu.copy_gmem_to_smem(ids, refs.k_segments, refs.kv_full)

    def fetch(n: Array) -> None:
        h, i = block.visit(n)
        head, which, slot = block.first_head + h, block.visited(i), remainder(n, STAGES)
        rows, full = pl.ds(which * ROWS, ROWS), refs.q_full.at[slot]
        plgpu.barrier_wait(refs.q_free.at[slot])
        for name in QUERIES_SIDE:
            copy(name, rows, head, slot, full)
        vectors = refs.rows.at[batch, head, which]
        plgpu.copy_gmem_to_smem(vectors, refs.rows_smem.at[slot], full)
        if spec.has_segments:
            ids = refs.query_segments.at[batch, rows]
            plgpu.copy_gmem_to_smem(ids, refs.q_segments.at[slot], full)

    each(0, block.heads * block.visits.count, fetch)
    for slot in range(STAGES):
        plgpu.barrier_wait(refs.q_free.at[slot])


class Keys(Products):
    """A compute warpgroup: 64 keys of the tile."""

    def __init__(self, block: Block, warpgroup: Array, *, holds: bool) -> None:
        self.block, self.warpgroup, self.holds = block, warpgroup, holds
        self.seam, self.refs = block.seam, block.refs

    @property
    def number(self) -> Array:
        return self.warpgroup

    def compute(self) -> None:
        """All visits to blocks of queries, and tdK and tdV of these keys to their arrays."""
        refs, block = self.refs, self.block
        for slot in range(STAGES):
            plgpu.barrier_arrive(refs.q_free.at[slot])
        plgpu.barrier_wait(refs.kv_full)
        tdk, tdv = self.accumulator(
            lambda tdk: self.accumulator(
                partial(self.visit_all, tdk), "tdv", refs.v_smem.shape[-1]
            ),
            "tdk",
            refs.k_smem.shape[-1],
        )
        row = block.tile * block.tiles.keys + self.number * ROWS
        k_smem, v_smem = refs.k_smem.at[self.number], refs.v_smem.at[self.number]
        block.store(
            row,
            Gradient(tdk * block.scale, [k_smem], [k_smem], "tdk"),
            Gradient(tdv, [v_smem], [v_smem], "tdv"),
        )
        plgpu.wait_smem_to_gmem(0)

    def visit_all(self, tdk_acc: Ref, tdv_acc: Ref) -> tuple[Array, Array]:
        block, seam = self.block, self.seam

        def over_head(h: Array) -> None:
            first, count = h * block.visits.count, block.visits.count
            masked = block.visits.masked if block.masked else 0
            step = partial(self.step, tdk_acc, tdv_acc)
            if block.masked:
                each(first, first + masked, partial(step, masked=True))
            each(first + masked, first + count, partial(step, masked=False))

        each(0, block.heads, over_head)
        found = (seam.wait(acc, in_flight=0) for acc in (tdk_acc, tdv_acc))
        tdk, tdv = (seam.layout(x, WGMMA) for x in found)
        return tdk, tdv

    def step(self, tdk_acc: Ref, tdv_acc: Ref, n: Array, *, masked: bool) -> None:
        """What the n-th of all visits adds to tdK and tdV."""
        seam, refs, spec = self.seam, self.refs, self.block.spec
        slot = remainder(n, STAGES)
        # A zero that the compiler cannot know: else it keeps the address of every product's rows.
        number = self.number + lax.shift_right_logical(n, np.int32(30))

        def start(acc: Ref, a: str, b: str) -> None:
            own, its = (vars(refs)[f"{name}_smem"] for name in (a, b))
            seam.matmul_into(acc, own.at[number], its.at[slot].T)

        def started(acc: Ref, t_acc: Ref | None, pair: tuple[str, str], moving: Any) -> None:
            start(acc, *pair)
            for a, b in moving:
                start(t_acc, a, b)

        def of_logits(s_acc: Ref, ts_acc: Ref | None) -> Any:
            begin = partial(started, s_acc, ts_acc, ("k", "q"), self.moving_logits)
            weigh = partial(self.weigh, n, slot, s_acc, ts_acc, masked=masked)
            weighed = None
            if masked:  # there are no registers for a mask beside six accumulators
                begin()
                weighed = weigh(late=0)
            body = partial(of_gradients, None if masked else begin, weigh, weighed)
            return self.with_two(body, "dp", self.moving_gradients, ROWS)

        def of_gradients(begin: Any, weigh: Any, weighed: Any, dp_acc: Ref, tdp_acc: Any) -> Any:
            if begin is not None:
                begin()
            started(dp_acc, tdp_acc, ("v", "do"), self.moving_gradients)
            late = len(self.moving_gradients)
            p, m = weigh(late=late + 1) if weighed is None else weighed
            dp = seam.layout(seam.wait(dp_acc, in_flight=late), WGMMA)
            ds = p * (dp - self.row(slot, ROW_TERM))
            change = -self.row(slot, T_ROW_TERM)
            if tdp_acc is not None:
                change += seam.layout(seam.wait(tdp_acc, in_flight=0), WGMMA)
            tds, tp = m * ds + p * change, p * m
            if masked:  # what is hidden may be so large that its products are infinite
                ds, tds, tp = (jnp.where(p == 0, 0.0, x) for x in (ds, tds, tp))
            seam.drain(0)
            # Only now, or ptxas sees an operand written while a product is in flight (C7513).
            return tuple(x.astype(spec.dtype) for x in (p, tp, ds, tds))

        plgpu.barrier_wait(refs.q_full.at[slot])
        p, tp, ds, tds = self.with_two(of_logits, "s", self.moving_logits, ROWS)
        seam.matmul_into(tdv_acc, tp, refs.do_smem.at[slot])
        if self.has("tdo"):
            seam.matmul_into(tdv_acc, p, refs.tdo_smem.at[slot])
        seam.matmul_into(tdk_acc, tds, refs.q_smem.at[slot])
        if self.has("tq"):
            seam.matmul_into(tdk_acc, ds, refs.tq_smem.at[slot])
        seam.drain(0)
        plgpu.barrier_arrive(refs.q_free.at[slot])

    def weigh(
        self, n: Array, slot: Array, s_acc: Ref, ts_acc: Any, *, late: int, masked: bool
    ) -> tuple[Array, Array]:
        """P and M of a block; `late` products were started after those of its logits."""
        seam, block = self.seam, self.block
        s = seam.wait(s_acc, in_flight=late + len(self.moving_logits))
        x, c = logits(block.spec, block.scale, seam.layout(s, WGMMA))
        p = block.weights(x, c, self.refs.rows_smem.at[slot], in_two=True)
        if masked:
            _, i = block.visit(n)
            p = block.hide(p, self.number * ROWS, block.visited(i) * ROWS, slot)
        m = -self.row(slot, MU)
        if ts_acc is not None:
            m += seam.layout(seam.wait(ts_acc, in_flight=late), WGMMA) * block.scale
        if late and self.holds:
            # Else ptxas waits for dP before it makes the weights.
            seam.hold(p, lax.shift_right_logical(n, np.int32(30)))
        return p, m

    @property
    def moving_logits(self) -> list[tuple[str, str]]:
        """What tS is the products of: of keys and of queries."""
        return self.there(("tk", "q"), ("k", "tq"))

    @property
    def moving_gradients(self) -> list[tuple[str, str]]:
        """What tdP is the products of: of values and of output gradients."""
        return self.there(("tv", "do"), ("v", "tdo"))

    def row(self, slot: Array, which: int) -> Array:
        """One value a query, as a matrix of a block."""
        return self.block.row(self.refs.rows_smem.at[slot, which])
