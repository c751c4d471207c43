"""How the gradient of the queries changes, on Hopper, from the rows' numbers and their tangents.

    S = Q Kᵀ     tS = [tQ Q] [K tK]ᵀ      P = exp(S - lse)     M = tS - mu
    dP = dO Vᵀ   tdP = [tdO dO] [V tV]ᵀ   dS = P (dP - D)      tdS = M dS + P (tdP - tD)
    tdQ = [tdS dS] [K tK]

(the scale left out; the equations are those of `portable.weight_tangents`.) Each pair in brackets
is two products into one accumulator, eight in all. A thread block holds compute warpgroups of 64
query rows, and goes over their blocks of keys from right to left:

    loader         Q tQ dO tdO K0 tK0  V0 tV0        K1 tK1  V1 tV1              ..
    warpgroup 0       [S0|tS0]-[dP0|tdP0]  dS0 tdS0  [tdQ0|S1|tS1]-[dP1|tdP1] .. [tdQn]   write tdQ
    warpgroup 1         [S0|tS0]-[dP0|tdP0]  dS0 tdS0  [tdQ0|S1|tS1]-[dP1|tdP1] ..

`-`: tdQ0 has run, whose operands dS0 and tdS0 have given the registers of dP1. P and M are made
while dP and tdP run; of masked blocks before, as there are no registers for a mask beside five
accumulators. Without overlap tdQ0 has run before S1 is begun, and all steps are in the loops.

Each warpgroup works its own tile out: what is known before the branch to them spills. No two thread
blocks add to the same number, and results are bitwise the same each time.

Shared memory, with the barriers that guard it (`full`: a copy has landed; `free`: its readers are
done):

    q_smem, tq_smem    (W, 64, H)            rows_full[w]       tdQ goes out through Q
    do_smem, tdo_smem  (W, 64, D)            rows_full[w]
    rows_smem          (W, 4, 64)            rows_full[w]
    k_smem, tk_smem    (key slots, keys, H)  k_full[slot], k_free[slot]
    v_smem, tv_smem    (stages, keys, D)     v_full[slot], v_free[slot]
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
from pallas_kernels.hopper.backward_tangent_rows import Rows
from pallas_kernels.hopper.backward_tangent_tiles import (
    BackwardTangentTiles,
    choose_backward_tangent_tiles,
)
from pallas_kernels.hopper.constant import constant
from pallas_kernels.hopper.forward import in_tiles
from pallas_kernels.hopper.indices import for_each, remainder
from pallas_kernels.hopper.limits import padded_width
from pallas_kernels.hopper.masks import Steps, Warpgroup, steps_of
from pallas_kernels.hopper.plan import Plan, Work
from pallas_kernels.hopper.seam import Ref, Seam, matrix, ring
from pallas_kernels.hopper.segments import segment_arrays
from pallas_kernels.hopper.softmax import LOG2E, scale_of
from pallas_kernels.hopper.tiles import ROWS
from pallas_kernels.hopper.warpgroups import run

if TYPE_CHECKING:
    from jattn.call.row_arrays import BackwardTangentRows
    from jattn.call.spec import AttentionSpec, Operands, Tangents

__all__ = ["query_gradient_tangent"]


def query_gradient_tangent(
    spec: AttentionSpec,
    operands: Operands,
    rows: BackwardTangentRows,
    tangents: Tangents,
    *,
    tiles: BackwardTangentTiles | None = None,
    interpret: bool = False,
) -> Array:
    """The tangent of the query's gradient, (B, T, N, H) in the call's dtype.

    Args:
      spec: the call; `limits.backward_tangent_refusals` must be empty for it.
      operands: its arrays; sinks are not looked at.
      rows: what else each row has, `top` in base 2.
      tangents: of query, key and value; none has to be there.
      tiles: tile shapes to use instead of the table's.
      interpret: run on a CPU, thread by thread.
    """
    tiles = tiles or choose_backward_tangent_tiles(spec)
    plan = Plan(spec, tiles, pack=1, splits=1, blocks=1)
    plan = replace(plan, blocks=plan.works)
    arrays = {
        "q": operands.query,
        "tq": tangents.query,
        "k": _present(operands, operands.key),
        "tk": _present(operands, tangents.key),
        "v": operands.value,
        "tv": tangents.value,
        "do": rows.d_out,
        "tdo": rows.td_out,
    }
    inputs = {name: in_tiles(x) for name, x in arrays.items() if x is not None}
    inputs["rows"] = _rows(plan, rows)
    inputs["zero"] = constant(np.zeros(1, np.int32))
    for name in ("query_lengths", "key_lengths", "query_offset", "scale"):
        if getattr(operands, name) is not None:
            inputs[name] = getattr(operands, name)
    if spec.has_segments:
        inputs |= segment_arrays(plan, operands)
    td_query = _launch(plan, tiles, inputs, interpret=interpret)
    return td_query[:, : spec.queries, :, : spec.head_dim]


def _present(operands: Operands, x: Array | None) -> Array | None:
    """What weights of 0 are multiplied by: 0 * NaN is not 0."""
    if x is None or operands.key_lengths is None:
        return x
    return past_zeroed(x, operands.key_lengths)


def _rows(plan: Plan, rows: BackwardTangentRows) -> Array:
    """(B, N, 5, rows of whole tiles) float32: a copy of one dimension is not cut at its end."""
    more = ((0, 0), (0, 0), (0, plan.query_tiles * plan.queries - plan.spec.queries))
    high, low = in_two(rows.top, rows.rest * LOG2E)
    numbers = (high, rows.t_lse, rows.row_term, rows.t_row_term, low)
    past = (jnp.inf, 0, 0, 0, 0)  # rows that do not exist have no weight
    whole = [
        jnp.pad(jnp.swapaxes(x, 1, 2), more, constant_values=fill)
        for x, fill in zip(numbers, past, strict=True)
    ]
    return jnp.stack(whole, axis=2)


def _launch(
    plan: Plan, tiles: BackwardTangentTiles, inputs: dict[str, Array], *, interpret: bool
) -> Array:
    spec, seam = plan.spec, Seam(interpret)
    widths = dict.fromkeys(("s", "ts", "dp", "tdp"), tiles.keys)
    widths |= {"tdq": padded_width(spec.head_dim)}
    scratch = _scratch(plan, tiles, inputs)
    scratch |= seam.stand_ins({x: (tiles.warpgroups, ROWS, size) for x, size in widths.items()})
    names = [*inputs, "tdq", *scratch]

    def kernel(*args: Ref) -> None:
        refs = SimpleNamespace(**dict(zip(names, args, strict=True)))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < tiles.warpgroups)
        def _() -> None:
            if tiles.registers:
                plgpu.set_max_registers(tiles.registers[0], action="increase")
            work = plan.work(lax.axis_index("block"))
            steps = steps_of(plan, refs, work)
            scale = scale_of(spec, refs, work.batch)
            Rows(plan, tiles, seam, refs, Warpgroup(warpgroup), work, steps, scale).compute()

        @pl.when(warpgroup == tiles.warpgroups)
        def _() -> None:
            if tiles.registers:
                plgpu.set_max_registers(tiles.registers[1], action="decrease")
            work = plan.work(lax.axis_index("block"))
            _load(plan, tiles, refs, work, steps_of(plan, refs, work))

    (td_query,) = run(
        kernel,
        inputs,
        out_type=[jax.ShapeDtypeStruct(inputs["q"].shape, spec.dtype)],
        scratch_types=list(scratch.values()),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=tiles.warpgroups + 1,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )
    found: Array = td_query
    return found


def _scratch(plan: Plan, tiles: BackwardTangentTiles, inputs: dict[str, Array]) -> dict[str, Any]:
    spec, w, stages, slots = plan.spec, tiles.warpgroups, tiles.stages, tiles.key_slots
    head, value = padded_width(spec.head_dim), padded_width(spec.value_dim)
    shapes = {
        **dict.fromkeys(("q", "tq"), (w, ROWS, head)),
        **dict.fromkeys(("do", "tdo"), (w, ROWS, value)),
        **dict.fromkeys(("k", "tk"), (slots, tiles.keys, head)),
        **dict.fromkeys(("v", "tv"), (stages, tiles.keys, value)),
    }
    moving = sum(name in inputs for name in ("tq", "tdo"))
    scratch = {f"{x}_smem": matrix(spec.dtype, *shapes[x]) for x in shapes if x in inputs}
    scratch |= {
        "rows_smem": plgpu.SMEM((w, 4, ROWS), jnp.float32),
        "rows_full": ring(w, 3 + moving + spec.has_segments),
        "k_full": ring(slots, 1 + ("tk" in inputs) + spec.has_segments),
        "k_free": ring(slots, w),
        "v_full": ring(stages, 1 + ("tv" in inputs)),
        "v_free": ring(stages, w),
    }
    if spec.has_segments:
        scratch["q_segments"] = plgpu.SMEM((w, ROWS), jnp.int32)
        scratch["k_segments"] = plgpu.SMEM((slots, tiles.keys), jnp.int32)
    return scratch


def _load(plan: Plan, tiles: BackwardTangentTiles, refs: Ref, work: Work, steps: Steps) -> None:
    """Each warpgroup's rows once, then keys and values, each as soon as its slot is free."""
    batch, own = work.batch, vars(refs)

    def copy(name: str, rows: Any, head: Array, slot: Any, full: Ref) -> None:
        if name in own:
            smem = own[f"{name}_smem"]
            columns = pl.ds(0, smem.shape[-1])
            plgpu.copy_gmem_to_smem(own[name].at[batch, rows, head, columns], smem.at[slot], full)

    for w in range(tiles.warpgroups):
        full, rows = refs.rows_full.at[w], pl.ds(work.query + w * ROWS, ROWS)
        for name in ("q", "tq", "do", "tdo"):
            copy(name, rows, work.head, w, full)
        numbers = refs.rows.at[batch, work.head, pl.ds(0, 4), rows]
        plgpu.copy_gmem_to_smem(numbers, refs.rows_smem.at[w], full)
        if plan.spec.has_segments:
            ids = refs.query_segments.at[batch, rows]
            plgpu.copy_gmem_to_smem(ids, refs.q_segments.at[w], full)

    def step(i: Array, _: None) -> None:
        rows = pl.ds(steps.block(i) * tiles.keys, tiles.keys)
        slot = remainder(i, tiles.key_slots)
        full = refs.k_full.at[slot]
        plgpu.barrier_wait(refs.k_free.at[slot])
        for name in ("k", "tk"):
            copy(name, rows, work.kv_head, slot, full)
        if plan.spec.has_segments:
            ids = refs.key_segments.at[batch, rows]
            plgpu.copy_gmem_to_smem(ids, refs.k_segments.at[slot], full)
        slot = remainder(i, tiles.stages)
        plgpu.barrier_wait(refs.v_free.at[slot])
        for name in ("v", "tv"):
            copy(name, rows, work.kv_head, slot, refs.v_full.at[slot])

    for_each(0, steps.visits, step, None)
    for slot in range(tiles.key_slots):
        plgpu.barrier_wait(refs.k_free.at[slot])
    for slot in range(tiles.stages):
        plgpu.barrier_wait(refs.v_free.at[slot])
