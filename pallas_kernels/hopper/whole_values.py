"""Values of any number of keys in tiles as one matrix, so that P V is one product of all columns.

Copies in tiles end at a multiple of 8 rows. Here those of an array end at its last such multiple,
to which Mosaic rounds for them; the last block of keys, with zeros behind, is an array of its own.
Columns are rounded down as well: what is past the last multiple of 64 is a piece of plain rows.

    176 columns    v_smem 128, in tiles    v1_smem 64, of which 16 are zero      O | O1

    v_here    barriers as `v_full` has, of 8 bytes: Pallas hands its own to no copy of this kind
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.hopper.indices import quotient, remainder
from pallas_kernels.hopper.instructions import await_copy, copy_in_tiles, make_barriers
from pallas_kernels.hopper.piece_widths import has_whole_values, value_columns
from pallas_kernels.hopper.seam import Ref

if TYPE_CHECKING:
    from pallas_kernels.hopper.plan import Plan, Work

__all__ = ["await_values", "copied_here", "copy_values", "last_block", "prepare", "scratch"]


def copied_here(plan: Plan) -> bool:
    """Whether values are copied by `copy_values`: else they are pieces, or tiles by the array's."""
    spec = plan.spec
    return (
        not plan.in_parts
        and has_whole_values(spec)
        and (spec.keys % 8 > 0 or len(value_columns(spec)) > 1)
    )


def last_block(plan: Plan, value: Array) -> dict[str, Array]:
    """The last block's array by name, if the keys are no multiple of 8."""
    keys, size = plan.spec.keys, plan.tiles.keys
    if keys % 8 == 0:
        return {}
    rest = value[:, keys // size * size :]
    return {"v_end": jnp.pad(rest, ((0, 0), (0, -rest.shape[1] % 8), (0, 0), (0, 0)))}


def scratch(plan: Plan) -> dict[str, Any]:
    """The barriers, for a GPU; interpreted, copies are cut wherever an array ends."""
    return {"v_here": plgpu.SMEM((2 * plan.tiles.stages,), jnp.int32)}


def prepare(plan: Plan, refs: Ref) -> None:
    """Before all else, by all warpgroups."""
    if "v_here" in vars(refs):
        warpgroups = plan.tiles.warpgroups
        make_barriers(refs.v_here, warpgroups + 3, 128 * (warpgroups + 1))


def copy_values(plan: Plan, refs: Ref, work: Work, block: Array | int, slot: Array) -> None:
    """Starts the copy of a block of values, of what is in tiles."""
    keys, to = plan.tiles.keys, refs.v_smem[0].at[slot]

    def copy(array: Ref, first: Any) -> None:
        if "v_here" in vars(refs):
            copy_in_tiles(array, to, refs.v_here, slot, work.batch, first, work.kv_head)
        else:
            columns = pl.ds(0, to.shape[-1])
            rows = array.at[work.batch, pl.ds(first, keys), work.kv_head, columns]
            plgpu.copy_gmem_to_smem(rows, to, refs.v_full.at[slot])

    if "v_end" not in vars(refs):
        copy(refs.v, block * jnp.int32(keys))
        return
    is_last = block == plan.spec.keys // keys
    pl.when(is_last)(lambda: copy(refs.v_end, work.batch * 0))
    pl.when(jnp.logical_not(is_last))(lambda: copy(refs.v, block * jnp.int32(keys)))


def await_values(plan: Plan, refs: Ref, block: Array) -> None:
    """Waits for a block of values, by the number of blocks visited before it."""
    stages = plan.tiles.stages
    slot = remainder(block, stages)
    if "v_here" in vars(refs):
        await_copy(refs.v_here, slot, remainder(quotient(block, stages), 2))
    if "v_here" not in vars(refs) or len(refs.v_smem) > 1:
        plgpu.barrier_wait(refs.v_full.at[slot])
