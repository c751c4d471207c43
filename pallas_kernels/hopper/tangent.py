"""The tangent of attention on Hopper, from its output and log-sum-exp.

    S = Q Kᵀ     tS = [tQ Q] [K tK]ᵀ     P = exp(S - lse)     W = P (tS - c)
    mu = rowsum(P tS)     tO = [W P] [V tV] - rowsum(W) O

(the scale left out; equations and c are those of `portable.tangent`.) Each pair in brackets is two
products into one accumulator. As lse is known, no sum is ever scaled anew. A thread block holds
compute warpgroups of 64 query rows, and goes over their blocks of keys from right to left:

    loader         Q tQ K0 tK0  V0 tV0 K1 tK1  V1 tV1 K2 tK2 ..                O
    warpgroup 0       [S0|tS0]  W0  [S1|tS1|tO += W0 V0 + P0 tV0]  W1  ..      write tO
    warpgroup 1         [S0|tS0]  W0  [S1|tS1|tO += W0 V0 + P0 tV0]  W1  ..    write tO

c is made where a row first sees keys, from that block: nothing was added to its sums before. It may
be of one key, far from mu, which is therefore not made of it: P have the sum 1 but for roundings.

Shared memory, with the barriers that guard it (`full`: a copy has landed; `free`: its readers are
done):

    q_smem, tq_smem    (W, 64, H)            rows_full[w]
    rows_smem          (W, 3, 64)            rows_full[w]
    k_smem, tk_smem    (stages, keys, H)     k_full[slot], k_free[slot]
    v_smem, tv_smem    (stages, keys, D)     v_full[slot], v_free[slot]
    o_smem             (W, 64, D)            o_full[w]      or O comes, and tO goes, through Q's
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from jattn.call.masking import past_zeroed
from pallas_kernels.hopper.backward import in_two
from pallas_kernels.hopper.constant import constant
from pallas_kernels.hopper.forward import in_tiles
from pallas_kernels.hopper.indices import for_each, remainder
from pallas_kernels.hopper.limits import padded_width
from pallas_kernels.hopper.masks import Steps, Warpgroup, hide, steps_of
from pallas_kernels.hopper.plan import Plan, Work
from pallas_kernels.hopper.seam import Ref, Seam, matrix, ring
from pallas_kernels.hopper.segments import segment_arrays
from pallas_kernels.hopper.softmax import LOG2E, across, logits, scale_of
from pallas_kernels.hopper.tangent_tiles import TangentTiles, choose_tangent_tiles
from pallas_kernels.hopper.tiles import ROWS
from pallas_kernels.hopper.warpgroups import run

if TYPE_CHECKING:
    from jattn.call.row_arrays import TangentRows
    from jattn.call.spec import AttentionSpec, Operands, Tangents

__all__ = ["tangent"]

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # one value a query
HIGH, LOW, OF_SINKS = range(3)  # a query's vectors: its log-sum-exp in two, the sinks' part of mu


def tangent(
    spec: AttentionSpec,
    operands: Operands,
    rows: TangentRows,
    tangents: Tangents,
    *,
    tiles: TangentTiles | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Tangents of the output, (B, T, N, D) in the call's dtype, and the log-sum-exp, (B, T, N).

    The latter is float32, natural, and 0 of a row that sees no key.

    Args:
      spec: the call; `limits.tangent_refusals` must be empty for it.
      operands: its arrays; sinks are not looked at.
      rows: what else each row has, `top` in base 2.
      tangents: of query, key and value, of which one has to be there.
      tiles: tile shapes to use instead of the table's.
      interpret: run on a CPU, thread by thread.
    """
    tiles = tiles or choose_tangent_tiles(spec)
    plan = Plan(spec, tiles, pack=1, splits=1, blocks=1)
    plan = replace(plan, blocks=plan.works)
    arrays = {
        "q": operands.query,
        "tq": tangents.query,
        "k": operands.key,
        "tk": tangents.key,
        # 0 * NaN is not 0, as hidden logits are.
        "v": _present(operands, operands.value) if _moves_logits(tangents) else None,
        "tv": _present(operands, tangents.value),
        "out": rows.out,
    }
    inputs = {name: in_tiles(x) for name, x in arrays.items() if x is not None}
    inputs["rows"] = _rows(plan, rows)
    inputs["zero"] = constant(np.zeros(1, np.int32))
    for name in ("query_lengths", "key_lengths", "query_offset", "scale"):
        if getattr(operands, name) is not None:
            inputs[name] = getattr(operands, name)
    if spec.has_segments:
        inputs |= segment_arrays(plan, operands)
    t_out, mu = _launch(plan, tiles, inputs, interpret=interpret)
    t_out = t_out[:, : spec.queries, :, : spec.value_dim]
    return t_out, jnp.swapaxes(mu[..., : spec.queries], 1, 2)


def _moves_logits(tangents: Tangents) -> bool:
    return tangents.query is not None or tangents.key is not None


def _present(operands: Operands, x: Array | None) -> Array | None:
    if x is None or operands.key_lengths is None:
        return x
    return past_zeroed(x, operands.key_lengths)


def _rows(plan: Plan, rows: TangentRows) -> Array:
    """(B, N, 3, rows of whole tiles) float32: a copy of one dimension is not cut at its end."""
    more = ((0, 0), (0, 0), (0, plan.query_tiles * plan.queries - plan.spec.queries))
    high, low = in_two(*(jnp.swapaxes(x, 1, 2) for x in (rows.top, rows.rest * LOG2E)))
    own = jnp.zeros_like(high) if rows.of_sinks is None else jnp.swapaxes(rows.of_sinks, 1, 2)
    whole = [jnp.pad(high, more, constant_values=jnp.inf), jnp.pad(low, more), jnp.pad(own, more)]
    return jnp.stack(whole, axis=2)


def _launch(
    plan: Plan, tiles: TangentTiles, inputs: dict[str, Array], *, interpret: bool
) -> tuple[Array, Array]:
    spec, seam = plan.spec, Seam(interpret)
    widths = {"s": tiles.keys, "ts": tiles.keys, "o": padded_width(spec.value_dim)}
    scratch = _scratch(plan, tiles, inputs)
    scratch |= seam.stand_ins({x: (tiles.warpgroups, ROWS, size) for x, size in widths.items()})
    names = [*inputs, "t_out", "mu", *scratch]

    def kernel(*args: Ref) -> None:
        refs = SimpleNamespace(**dict(zip(names, args, strict=True)))
        warpgroup = lax.axis_index("warpgroup")
        work = plan.work(lax.axis_index("block"))
        steps = steps_of(plan, refs, work)

        @pl.when(warpgroup < tiles.warpgroups)
        def _() -> None:
            if tiles.registers:
                plgpu.set_max_registers(tiles.registers[0], action="increase")
            scale = scale_of(spec, refs, work.batch)
            Rows(plan, tiles, seam, refs, Warpgroup(warpgroup), work, steps, scale).compute()

        @pl.when(warpgroup == tiles.warpgroups)
        def _() -> None:
            if tiles.registers:
                plgpu.set_max_registers(tiles.registers[1], action="decrease")
            _load(plan, tiles, refs, work, steps)

    t_out, mu = run(
        kernel,
        inputs,
        out_type=[
            jax.ShapeDtypeStruct(inputs["out"].shape, spec.dtype),
            jax.ShapeDtypeStruct(
                (spec.batch, spec.heads, plan.query_tiles * plan.queries), jnp.float32
            ),
        ],
        scratch_types=list(scratch.values()),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=tiles.warpgroups + 1,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )
    return t_out, mu


def _scratch(plan: Plan, tiles: TangentTiles, inputs: dict[str, Array]) -> dict[str, Any]:
    spec, w, stages = plan.spec, tiles.warpgroups, tiles.stages
    dtype = spec.dtype
    head, value = padded_width(spec.head_dim), padded_width(spec.value_dim)

    shapes = {
        "q": (w, ROWS, head),
        "tq": (w, ROWS, head),
        "k": (stages, tiles.keys, head),
        "tk": (stages, tiles.keys, head),
        "v": (stages, tiles.keys, value),
        "tv": (stages, tiles.keys, value),
    }
    scratch = {f"{name}_smem": matrix(dtype, *shapes[name]) for name in shapes if name in inputs}
    scratch |= {
        "rows_smem": plgpu.SMEM((w, 3, ROWS), jnp.float32),
        "mu_smem": plgpu.SMEM((w, ROWS), jnp.float32),
        "rows_full": ring(w, 2 + ("tq" in inputs) + spec.has_segments),
        "k_full": ring(stages, 1 + ("tk" in inputs) + spec.has_segments),
        "k_free": ring(stages, w),
        "v_full": ring(stages, ("v" in inputs) + ("tv" in inputs)),
        "v_free": ring(stages, w),
        "o_full": ring(w, 1),
    }
    if tiles.own_staging:
        scratch["o_smem"] = matrix(dtype, w, ROWS, value)
    if spec.has_segments:
        scratch["q_segments"] = plgpu.SMEM((w, ROWS), jnp.int32)
        scratch["k_segments"] = plgpu.SMEM((stages, tiles.keys), jnp.int32)
    return scratch


def _load(plan: Plan, tiles: TangentTiles, refs: Ref, work: Work, steps: Steps) -> None:
    """Each warpgroup's rows once, then keys and values, each as soon as its slot is free."""
    batch, own = work.batch, vars(refs)

    def copy(name: str, rows: Any, head: Array, slot: Any, full: Ref) -> None:
        if name in own:
            smem = own[f"{name}_smem"]
            columns = pl.ds(0, smem.shape[-1])
            plgpu.copy_gmem_to_smem(own[name].at[batch, rows, head, columns], smem.at[slot], full)

    for w in range(tiles.warpgroups):
        full, rows = refs.rows_full.at[w], pl.ds(work.query + w * ROWS, ROWS)
        for name in ("q", "tq"):
            copy(name, rows, work.head, w, full)
        plgpu.copy_gmem_to_smem(refs.rows.at[batch, work.head, :, rows], refs.rows_smem.at[w], full)
        if plan.spec.has_segments:
            ids = refs.query_segments.at[batch, rows]
            plgpu.copy_gmem_to_smem(ids, refs.q_segments.at[w], full)

    def step(i: Array, _: None) -> None:
        rows = pl.ds((steps.stop - 1 - i) * tiles.keys, tiles.keys)
        slot = remainder(i, tiles.stages)
        full = refs.k_full.at[slot]
        plgpu.barrier_wait(refs.k_free.at[slot])
        for name in ("k", "tk"):
            copy(name, rows, work.kv_head, slot, full)
        if plan.spec.has_segments:
            ids = refs.key_segments.at[batch, rows]
            plgpu.copy_gmem_to_smem(ids, refs.k_segments.at[slot], full)
        plgpu.barrier_wait(refs.v_free.at[slot])
        for name in ("v", "tv"):
            copy(name, rows, work.kv_head, slot, refs.v_full.at[slot])

    for_each(0, steps.visits, step, None)
    for slot in range(tiles.stages):
        plgpu.barrier_wait(refs.k_free.at[slot])
        plgpu.barrier_wait(refs.v_free.at[slot])


class Sums(NamedTuple):
    """A row's, (64,): c; P tS; W as rounded; and P, if a sink or a mask asks for it."""

    centre: Array
    mu: Array
    rounded: Array
    total: Array


class Weights(NamedTuple):
    """What is to be multiplied by tV and by V: P and W of the latest block; None of neither."""

    p: Array | None
    w: Array | None


@dataclass(frozen=True)
class Rows:
    """A compute warpgroup: 64 query rows of the tile; scale is what their Q Kᵀ is multiplied by."""

    plan: Plan
    tiles: TangentTiles
    seam: Seam
    refs: Ref
    warpgroup: Warpgroup
    work: Work
    steps: Steps
    scale: Array | float

    def compute(self) -> None:
        """All of the rows' blocks of keys, and their tO and mu to their arrays."""
        refs, number = self.refs, self.warpgroup.number
        for slot in range(self.tiles.stages):
            plgpu.barrier_arrive(refs.k_free.at[slot])
            plgpu.barrier_arrive(refs.v_free.at[slot])
        if self.tiles.own_staging:
            self.load_out()
        plgpu.barrier_wait(refs.rows_full.at[number])
        acc, sums = self.accumulator(self.visit_all, "o", padded_width(self.plan.spec.value_dim))
        if not self.tiles.own_staging:
            plgpu.commit_smem()  # all of the warpgroup has read its queries
            self.load_out()
        self.store(acc, sums)

    @property
    def o_smem(self) -> Ref:
        refs = self.refs
        whole = refs.o_smem if self.tiles.own_staging else refs.q_smem
        return whole.at[self.warpgroup.number]

    @property
    def rows(self) -> Any:
        return pl.ds(self.work.query + self.warpgroup.number * ROWS, ROWS)

    def load_out(self) -> None:
        refs, smem = self.refs, self.o_smem
        its = refs.out.at[self.work.batch, self.rows, self.work.head, pl.ds(0, smem.shape[-1])]
        plgpu.copy_gmem_to_smem(its, smem, refs.o_full.at[self.warpgroup.number])

    def store(self, acc: Array, sums: Sums) -> None:
        """What the weights were too large by is one factor a row, and of all its sums."""
        spec, seam, refs, number = self.plan.spec, self.seam, self.refs, self.warpgroup.number
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

    def visit_all(self, o_acc: Ref) -> tuple[Array, Sums]:
        """The sum of [W P] [V tV], a block of keys behind S, and the rows' sums."""
        plan, steps = self.plan, self.steps

        def loop(start: Any, stop: Any, state: Any, *, masked: bool) -> Any:
            return for_each(start, stop, partial(self.step, o_acc, masked=masked), state)

        nothing = self.seam.layout(jnp.zeros((ROWS,), jnp.float32), ROW)
        state = self.first_step(o_acc, Sums(*(nothing,) * 4))
        if plan.masked:
            # One more than need a mask: then every row has its c.
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
        plgpu.barrier_wait(self.refs.v_full.at[self.slot(steps.visits - 1)])
        self.add_values(o_acc, steps.visits - 1, weights)
        self.seam.drain(0)
        plgpu.barrier_arrive(self.refs.v_free.at[self.slot(steps.visits - 1)])
        acc = self.seam.layout(self.seam.wait(o_acc, in_flight=0), WGMMA)
        return acc, sums

    def first_step(self, o_acc: Ref, sums: Sums) -> tuple[Weights, Sums]:
        """Of the first block, which has no product beside its logits; makes c."""
        return self.step(o_acc, 0, (None, sums), masked=self.plan.masked)

    def step(
        self, o_acc: Ref, i: Array | int, state: tuple[Weights | None, Sums], *, masked: bool
    ) -> tuple[Weights, Sums]:
        """P and W of the i-th block visited, while those of the block before are multiplied."""
        seam, refs, (before, sums) = self.seam, self.refs, state
        slot, named = self.slot(i), vars(refs)
        # A zero that the compiler cannot know: else it keeps the address of every product's rows.
        number = self.warpgroup.number + i * refs.zero[0]
        moving = [("tq", "k"), ("q", "tk")]
        pairs = [(a, b) for a, b in moving if a in named and b in named]

        def products(s_acc: Ref, ts_acc: Ref | None) -> tuple[Weights, Sums]:
            seam.matmul_into(s_acc, refs.q_smem.at[number], refs.k_smem.at[slot].T)
            for a, b in pairs:
                of_queries, of_keys = named[f"{a}_smem"], named[f"{b}_smem"]
                seam.matmul_into(ts_acc, of_queries.at[number], of_keys.at[slot].T)
            late = 0 if before is None else self.add_values(o_acc, i - 1, before)
            s = seam.layout(seam.wait(s_acc, in_flight=late + len(pairs)), WGMMA)
            p, slope = self.weigh(s, i, slot, masked=masked)
            w = None
            if ts_acc is not None:
                ts = seam.layout(seam.wait(ts_acc, in_flight=late), WGMMA) * self.scale
                w, moved = self.change(
                    p, ts if slope is None else ts * slope, sums, i, masked=masked
                )
            else:
                moved = sums
            plgpu.barrier_arrive(refs.k_free.at[slot])
            if self.plan.spec.has_sinks or masked:
                moved = moved._replace(total=moved.total + p.sum(axis=1))
            if before is not None:
                seam.drain(0)
                plgpu.barrier_arrive(refs.v_free.at[self.slot(i - 1)])
            # Only now, or ptxas sees an operand written while a product is in flight (C7513).
            p_rounded = p.astype(self.plan.spec.dtype) if "tv" in named else None
            if w is None:
                return Weights(p_rounded, None), moved
            w_rounded = w.astype(self.plan.spec.dtype)
            rounded = moved.rounded + w_rounded.astype(jnp.float32).sum(axis=1)
            return Weights(p_rounded, w_rounded), moved._replace(rounded=rounded)

        plgpu.barrier_wait(refs.k_full.at[slot])
        if before is not None:
            plgpu.barrier_wait(refs.v_full.at[self.slot(i - 1)])
        keys = self.tiles.keys
        if not pairs:
            found = self.accumulator(lambda s_acc: products(s_acc, None), "s", keys)
        else:
            found = self.accumulator(
                lambda s_acc: self.accumulator(partial(products, s_acc), "ts", keys), "s", keys
            )
        return found  # type: ignore[no-any-return]

    def weigh(
        self, s: Array, i: Array | int, slot: Array, *, masked: bool
    ) -> tuple[Array, Array | None]:
        """P of a block, and the slope of a soft cap, if there is one."""
        spec = self.plan.spec
        x, c = logits(spec, self.scale, s)
        slope = None if spec.logits_soft_cap is None else 1 - x * x
        if masked:
            x = hide(
                self.plan, self.seam, self.refs, self.work, self.steps, self.warpgroup, x, i, slot
            )
        high = self.seam.load(self.refs.rows_smem.at[self.warpgroup.number, HIGH], ROW)
        return jnp.exp2(x * c - across(high, x.shape[1])), slope

    def change(
        self, p: Array, tx: Array, sums: Sums, i: Array | int, *, masked: bool
    ) -> tuple[Array, Sums]:
        """W of a block, whose logits change by tx, and the rows' sums with it."""
        hidden = p == 0
        if masked:  # a hidden key may be so large that its product is infinite
            tx = jnp.where(hidden, 0.0, tx)
        centre = sums.centre
        if masked or (isinstance(i, int) and i == 0):
            weight = p.sum(axis=1)
            sees_none = weight == 0.0
            mean = (p * tx).sum(axis=1) / jnp.where(sees_none, 1.0, weight)
            if masked:
                mean = jnp.where(sees_none | (sums.total > 0.0), centre, mean)
            centre = mean
        w = p * (tx - across(centre, tx.shape[1]))
        return w, sums._replace(centre=centre, mu=sums.mu + (p * tx).sum(axis=1))

    def add_values(self, o_acc: Ref, i: Array | int, weights: Weights) -> int:
        """Starts O += W V + P tV of the i-th block visited; how many products these are."""
        seam, refs, slot = self.seam, self.refs, self.slot(i)
        count = 0
        if weights.w is not None:
            seam.matmul_into(o_acc, weights.w, refs.v_smem.at[slot])
            count += 1
        if weights.p is not None:
            seam.matmul_into(o_acc, weights.p, refs.tv_smem.at[slot])
            count += 1
        return count

    def slot(self, i: Array | int) -> Array:
        """Where a block of keys is, by the number of blocks visited before it."""
        return remainder(i, self.tiles.stages)

    def accumulator(self, body: Any, name: str, columns: int) -> Any:
        """body(accumulator of 64 rows), zero at first."""
        number, seam = self.warpgroup.number, self.seam
        stand_in = getattr(self.refs, f"{name}_stand_in").at[number] if seam.interpret else None
        return seam.with_accumulator(body, (ROWS, columns), stand_in)
