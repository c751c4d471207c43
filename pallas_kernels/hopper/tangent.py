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

Shared memory and its barriers are those of `tangent_block`, with three numbers a row, and

    o_smem             (W, 64, D)            o_full[w]      or O comes, and tO goes, through Q's
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.hopper.backward import in_two
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.indices import for_each, remainder
from pallas_kernels.hopper.masks import Warpgroup, steps_of
from pallas_kernels.hopper.plan import Plan, Work
from pallas_kernels.hopper.seam import Ref, Seam, matrix, ring
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
from pallas_kernels.hopper.tangent_rows import Rows
from pallas_kernels.hopper.tangent_tiles import TangentTiles, choose_tangent_tiles
from pallas_kernels.hopper.tangent_visits import Order, order_of
from pallas_kernels.hopper.tiles import ROWS
from pallas_kernels.hopper.warpgroups import Role, run_roles

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
    plan = plan_of(spec, tiles)
    moves_logits = tangents.query is not None or tangents.key is not None
    arrays = {
        "q": operands.query,
        "tq": tangents.query,
        "k": operands.key,
        "tk": tangents.key,
        "v": present(operands, operands.value) if moves_logits else None,
        "tv": present(operands, tangents.value),
        "out": rows.out,
    }
    high, low = in_two(rows.top, rows.rest * LOG2E)
    own = jnp.zeros_like(high) if rows.of_sinks is None else rows.of_sinks
    inputs = inputs_of(plan, operands, arrays, high, low, own)
    t_out, mu = _launch(plan, tiles, inputs, interpret=interpret)
    t_out = t_out[:, : spec.queries, :, : spec.value_dim]
    return t_out, jnp.swapaxes(mu[..., : spec.queries], 1, 2)


def _launch(
    plan: Plan, tiles: TangentTiles, inputs: dict[str, Array], *, interpret: bool
) -> list[Array]:
    spec, seam, w = plan.spec, Seam(interpret), tiles.warpgroups
    widths = {"s": tiles.keys, "ts": tiles.keys, "o": padded_width(spec.value_dim)}
    scratch = _scratch(plan, tiles, inputs)
    scratch |= seam.stand_ins({x: (w, ROWS, size) for x, size in widths.items()})
    whole = (spec.batch, spec.heads, plan.query_tiles * plan.queries)
    results = {
        "t_out": jax.ShapeDtypeStruct(inputs["out"].shape, spec.dtype),
        "mu": jax.ShapeDtypeStruct(whole, jnp.float32),
    }

    def roles(refs: Ref, warpgroup: Array) -> tuple[Role, Role]:
        work = plan.work(lax.axis_index("block"))
        moves = "tq" in inputs or "tk" in inputs
        order = order_of(plan, steps_of(plan, refs, work), moves_logits=moves)

        def compute() -> None:
            scale = scale_of(spec, refs, work.batch)
            Rows(plan, tiles, seam, refs, Warpgroup(warpgroup), work, order, scale).compute()

        return compute, partial(_load, plan, tiles, refs, work, order)

    return run_roles(
        roles,
        inputs,
        results,
        scratch,
        warpgroups=w,
        registers=tiles.registers,
        grid=(plan.blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )


def _scratch(plan: Plan, tiles: TangentTiles, inputs: dict[str, Array]) -> dict[str, Any]:
    spec, w = plan.spec, tiles.warpgroups
    scratch = matrices(plan, tiles, inputs)
    scratch |= {
        "rows_smem": plgpu.SMEM((w, 3, ROWS), jnp.float32),
        "mu_smem": plgpu.SMEM((w, ROWS), jnp.float32),
        **rings(plan, tiles, inputs),
        "o_full": ring(w, 1),
    }
    if tiles.own_staging:
        scratch["o_smem"] = matrix(spec.dtype, w, ROWS, padded_width(spec.value_dim))
    return scratch | segment_memory(plan, tiles)


def _load(plan: Plan, tiles: TangentTiles, refs: Ref, work: Work, order: Order) -> None:
    """Each warpgroup's rows once, then keys and values, each as soon as its slot is free."""
    loader = Loader(plan, tiles, refs, work, slice(None))
    loader.rows()

    def step(i: Array, _: None) -> None:
        rows, slot = loader.block(order.block(i)), remainder(i, tiles.stages)
        loader.keys(rows, slot)
        loader.values(rows, slot)

    def sweep(i: Array, _: None) -> None:
        loader.keys(loader.block(order.steps.block(i)), remainder(i, tiles.stages))

    if plan.masked:
        for_each(0, order.sweep, sweep, None)
    for_each(0, order.steps.visits, step, None)
    for slot in range(tiles.stages):
        plgpu.barrier_wait(refs.k_free.at[slot])
        plgpu.barrier_wait(refs.v_free.at[slot])
