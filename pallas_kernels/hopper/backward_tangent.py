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

Shared memory and its barriers are those of `tangent_block`, with four numbers a row; tdQ goes out
through Q.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.backward import in_two
from pallas_kernels.hopper.backward_tangent_rows import Rows
from pallas_kernels.hopper.backward_tangent_tiles import (
    BackwardTangentTiles,
    choose_backward_tangent_tiles,
)
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.indices import for_each, remainder
from pallas_kernels.hopper.masks import Steps, Warpgroup, steps_of
from pallas_kernels.hopper.plan import Plan, Work
from pallas_kernels.hopper.seam import Ref, Seam
from pallas_kernels.hopper.softmax import LOG2E, scale_of
from pallas_kernels.hopper.tangent_block import (
    Loader,
    inputs_of,
    matrices,
    plan_of,
    present,
    rings,
    segment_memory,
)
from pallas_kernels.hopper.tiles import ROWS
from pallas_kernels.hopper.warpgroups import Role, run_roles

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
    plan = plan_of(spec, tiles)
    arrays = {
        "q": operands.query,
        "tq": tangents.query,
        "k": present(operands, operands.key),
        "tk": present(operands, tangents.key),
        "v": operands.value,
        "tv": tangents.value,
        "do": rows.d_out,
        "tdo": rows.td_out,
    }
    high, low = in_two(rows.top, rows.rest * LOG2E)
    numbers = (high, rows.t_lse, rows.row_term, rows.t_row_term, low)
    inputs = inputs_of(plan, operands, arrays, *numbers)
    td_query = _launch(plan, tiles, inputs, interpret=interpret)
    return td_query[:, : spec.queries, :, : spec.head_dim]


def _launch(
    plan: Plan, tiles: BackwardTangentTiles, inputs: dict[str, Array], *, interpret: bool
) -> Array:
    spec, seam, w = plan.spec, Seam(interpret), tiles.warpgroups
    widths = dict.fromkeys(("s", "ts", "dp", "tdp"), tiles.keys)
    widths |= {"tdq": padded_width(spec.head_dim)}
    scratch = matrices(plan, tiles, inputs)
    # The last of a row's numbers is read where it is.
    scratch |= {"rows_smem": plgpu.SMEM((w, 4, ROWS), jnp.float32), **rings(plan, tiles, inputs)}
    scratch |= segment_memory(plan, tiles)
    scratch |= seam.stand_ins({x: (w, ROWS, size) for x, size in widths.items()})

    def roles(refs: Ref, warpgroup: Array) -> tuple[Role, Role]:
        def compute() -> None:
            work = plan.work(lax.axis_index("block"))
            steps = steps_of(plan, refs, work)
            scale = scale_of(spec, refs, work.batch)
            Rows(plan, tiles, seam, refs, Warpgroup(warpgroup), work, steps, scale).compute()

        def load() -> None:
            work = plan.work(lax.axis_index("block"))
            _load(plan, tiles, refs, work, steps_of(plan, refs, work))

        return compute, load

    (td_query,) = run_roles(
        roles,
        inputs,
        {"tdq": jax.ShapeDtypeStruct(inputs["q"].shape, spec.dtype)},
        scratch,
        warpgroups=w,
        registers=tiles.registers,
        grid=(plan.blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )
    return td_query


def _load(plan: Plan, tiles: BackwardTangentTiles, refs: Ref, work: Work, steps: Steps) -> None:
    """Each warpgroup's rows once, then keys and values, each as soon as its slot is free."""
    loader = Loader(plan, tiles, refs, work, pl.ds(0, 4))
    loader.rows()

    def step(i: Array, _: None) -> None:
        rows = loader.block(steps.block(i))
        loader.keys(rows, remainder(i, tiles.key_slots))
        loader.values(rows, remainder(i, tiles.stages))

    for_each(0, steps.visits, step, None)
    for slot in range(tiles.key_slots):
        plgpu.barrier_wait(refs.k_free.at[slot])
    for slot in range(tiles.stages):
        plgpu.barrier_wait(refs.v_free.at[slot])
