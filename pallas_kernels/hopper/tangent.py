"""The tangent of attention on Hopper, from its output and log-sum-exp.

    S = Q Kᵀ     tS = [tQ Q] [K tK]ᵀ     P = exp(S - lse)     W = P (tS - c)
    mu = rowsum(P tS)     tO = [W P] [V tV] - rowsum(W) O

(the scale left out; equations and c are those of `portable.tangent`.) Each pair in brackets is two
products into one accumulator. As lse is known, no sum is ever scaled anew. A thread block holds
compute warpgroups of 64 query rows, and goes over their blocks of keys from right to left:

    loader         Q tQ K0 tK0  V0 tV0 K1 tK1  V1 tV1 K2 tK2 ..                O
    warpgroup 0       [S0|tS0]  W0  [S1|tS1|tO += W0 V0 + P0 tV0]  W1  ..      write tO
    warpgroup 1         [S0|tS0]  W0  [S1|tS1|tO += W0 V0 + P0 tV0]  W1  ..    write tO

O, rounded, is multiplied by how far c is from mu. So c is of a block that all rows see whole, or,
where a tile has none, of all its blocks, whose keys are then read twice (`tangent_visits`); the
warpgroups' part is `tangent_rows`. Nor is mu made of c: P have the sum 1 but for roundings.

Shared memory, with the barriers that guard it (`full`: a copy has landed; `free`: its readers are
done):

    q_smem, tq_smem    (W, 64, H)            rows_full[w]
    rows_smem          (W, 3, 64)            rows_full[w]
    k_smem, tk_smem    (stages, keys, H)     k_full[slot], k_free[slot]
    v_smem, tv_smem    (stages, keys, D)     v_full[slot], v_free[slot]
    o_smem             (W, 64, D)            o_full[w]      or O comes, and tO goes, through Q's
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

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
from pallas_kernels.hopper.masks import Warpgroup, steps_of
from pallas_kernels.hopper.plan import Plan, Work
from pallas_kernels.hopper.seam import Ref, Seam, matrix, ring
from pallas_kernels.hopper.segments import segment_arrays
from pallas_kernels.hopper.softmax import LOG2E, scale_of
from pallas_kernels.hopper.tangent_rows import Rows
from pallas_kernels.hopper.tangent_tiles import TangentTiles, choose_tangent_tiles
from pallas_kernels.hopper.tangent_visits import Order, order_of
from pallas_kernels.hopper.tiles import ROWS
from pallas_kernels.hopper.warpgroups import run

if TYPE_CHECKING:
    from jattn.call.row_arrays import TangentRows
    from jattn.call.spec import AttentionSpec, Operands, Tangents

__all__ = ["tangent"]


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
        moves = "tq" in inputs or "tk" in inputs
        order = order_of(plan, steps_of(plan, refs, work), moves_logits=moves)

        @pl.when(warpgroup < tiles.warpgroups)
        def _() -> None:
            if tiles.registers:
                plgpu.set_max_registers(tiles.registers[0], action="increase")
            scale = scale_of(spec, refs, work.batch)
            Rows(plan, tiles, seam, refs, Warpgroup(warpgroup), work, order, scale).compute()

        @pl.when(warpgroup == tiles.warpgroups)
        def _() -> None:
            if tiles.registers:
                plgpu.set_max_registers(tiles.registers[1], action="decrease")
            _load(plan, tiles, refs, work, order)

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


def _load(plan: Plan, tiles: TangentTiles, refs: Ref, work: Work, order: Order) -> None:
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
        rows = pl.ds(order.block(i) * tiles.keys, tiles.keys)
        slot = remainder(i, tiles.stages)
        copy_keys(rows, slot)
        plgpu.barrier_wait(refs.v_free.at[slot])
        for name in ("v", "tv"):
            copy(name, rows, work.kv_head, slot, refs.v_full.at[slot])

    def copy_keys(rows: Any, slot: Array) -> None:
        full = refs.k_full.at[slot]
        plgpu.barrier_wait(refs.k_free.at[slot])
        for name in ("k", "tk"):
            copy(name, rows, work.kv_head, slot, full)
        if plan.spec.has_segments:
            ids = refs.key_segments.at[batch, rows]
            plgpu.copy_gmem_to_smem(ids, refs.k_segments.at[slot], full)

    def sweep(i: Array, _: None) -> None:
        rows = pl.ds(order.steps.block(i) * tiles.keys, tiles.keys)
        copy_keys(rows, remainder(i, tiles.stages))

    if plan.masked:
        for_each(0, order.sweep, sweep, None)
    for_each(0, order.steps.visits, step, None)
    for slot in range(tiles.stages):
        plgpu.barrier_wait(refs.k_free.at[slot])
        plgpu.barrier_wait(refs.v_free.at[slot])
