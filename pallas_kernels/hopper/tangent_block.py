"""A thread block of the tangents' kernels of query rows: `tangent` and `backward_tangent`.

It has W compute warpgroups of 64 rows, whose arrays are copied once, and one that loads keys,
values and their tangents, block by block, through rings:

    q_smem, tq_smem    (W, 64, H)            rows_full[w]
    do_smem, tdo_smem  (W, 64, D)            rows_full[w]
    rows_smem          (W, numbers, 64)      rows_full[w]
    k_smem, tk_smem    (key slots, keys, H)  k_full[slot], k_free[slot]
    v_smem, tv_smem    (stages, keys, D)     v_full[slot], v_free[slot]

What is not among the inputs, as a tangent that is 0, has no place either, and is not copied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from jattn.call.masking import past_zeroed
from pallas_kernels.hopper.constant import constant
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.forward import in_tiles
from pallas_kernels.hopper.plan import Plan, Work
from pallas_kernels.hopper.seam import Ref, matrix, ring
from pallas_kernels.hopper.segments import segment_arrays
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands
    from pallas_kernels.hopper.backward_tangent_tiles import BackwardTangentTiles
    from pallas_kernels.hopper.tangent_tiles import TangentTiles

    type RowTiles = TangentTiles | BackwardTangentTiles

__all__ = [
    "Loader",
    "inputs_of",
    "matrices",
    "plan_of",
    "present",
    "rings",
    "row_numbers",
    "segment_memory",
]

OWN = ("q", "tq", "do", "tdo")
KEYS, VALUES = ("k", "tk"), ("v", "tv")


def plan_of(spec: AttentionSpec, tiles: RowTiles) -> Plan:
    """A thread block for each tile."""
    plan = Plan(spec, tiles, pack=1, splits=1, blocks=1)
    return replace(plan, blocks=plan.works)


def present(operands: Operands, x: Array | None) -> Array | None:
    """What weights of 0 are multiplied by, along the keys: 0 * NaN is not 0."""
    if x is None or operands.key_lengths is None:
        return x
    return past_zeroed(x, operands.key_lengths)


def row_numbers(*numbers: Array, rows: int) -> list[Array]:
    """Each (B, T, N) as (B, N, rows): the log-sum-exp, and what else there is of a row.

    The first is infinite of rows that do not exist, which have no weight; the others are 0.
    """
    fills = (jnp.inf, *[0] * (len(numbers) - 1))
    more = ((0, 0), (0, 0), (0, rows - numbers[0].shape[1]))
    return [
        jnp.pad(jnp.swapaxes(x, 1, 2), more, constant_values=fill)
        for x, fill in zip(numbers, fills, strict=True)
    ]


def inputs_of(
    plan: Plan, operands: Operands, arrays: dict[str, Array | None], *numbers: Array
) -> dict[str, Array]:
    """By name: of the arrays those that are there, and what else the call has.

    rows: (B, N, numbers, rows of whole tiles), as a copy of one dimension is not cut at its end.
    zero: a 0 that the compiler cannot know.
    """
    inputs = {name: in_tiles(x) for name, x in arrays.items() if x is not None}
    whole = plan.query_tiles * plan.queries
    inputs["rows"] = jnp.stack(row_numbers(*numbers, rows=whole), axis=2)
    inputs["zero"] = constant(np.zeros(1, np.int32))
    for name in ("query_lengths", "key_lengths", "query_offset", "scale"):
        if getattr(operands, name) is not None:
            inputs[name] = getattr(operands, name)
    if plan.spec.has_segments:
        inputs |= segment_arrays(plan, operands)
    return inputs


def matrices(plan: Plan, tiles: RowTiles, inputs: dict[str, Array]) -> dict[str, Any]:
    """Shared memory of the inputs that are matrices."""
    spec, w = plan.spec, tiles.warpgroups
    head, value = padded_width(spec.head_dim), padded_width(spec.value_dim)
    shapes = {
        **dict.fromkeys(("q", "tq"), (w, ROWS, head)),
        **dict.fromkeys(("do", "tdo"), (w, ROWS, value)),
        **dict.fromkeys(KEYS, (tiles.key_slots, tiles.keys, head)),
        **dict.fromkeys(VALUES, (tiles.stages, tiles.keys, value)),
    }
    return {f"{x}_smem": matrix(spec.dtype, *shapes[x]) for x in shapes if x in inputs}


def rings(plan: Plan, tiles: RowTiles, inputs: dict[str, Array]) -> dict[str, Any]:
    """The barriers of what is copied."""

    def count(names: tuple[str, ...]) -> int:
        return sum(name in inputs for name in names)

    w, ids = tiles.warpgroups, plan.spec.has_segments
    return {
        "rows_full": ring(w, count(OWN) + 1 + ids),
        "k_full": ring(tiles.key_slots, count(KEYS) + ids),
        "k_free": ring(tiles.key_slots, w),
        "v_full": ring(tiles.stages, count(VALUES)),
        "v_free": ring(tiles.stages, w),
    }


def segment_memory(plan: Plan, tiles: RowTiles) -> dict[str, Any]:
    """Shared memory of the ids of segments, copied with queries and with keys."""
    if not plan.spec.has_segments:
        return {}
    return {
        "q_segments": plgpu.SMEM((tiles.warpgroups, ROWS), jnp.int32),
        "k_segments": plgpu.SMEM((tiles.key_slots, tiles.keys), jnp.int32),
    }


@dataclass(frozen=True)
class Loader:
    """The warpgroup that loads; `numbers` are which of a row's it copies."""

    plan: Plan
    tiles: RowTiles
    refs: Ref
    work: Work
    numbers: slice | pl.Slice

    def rows(self) -> None:
        """Each compute warpgroup's own, once."""
        refs, batch, head = self.refs, self.work.batch, self.work.head
        for w in range(self.tiles.warpgroups):
            full, rows = refs.rows_full.at[w], pl.ds(self.work.query + w * ROWS, ROWS)
            self.copy(OWN, rows, head, w, full)
            numbers = refs.rows.at[batch, head, self.numbers, rows]
            plgpu.copy_gmem_to_smem(numbers, refs.rows_smem.at[w], full)
            if self.plan.spec.has_segments:
                ids = refs.query_segments.at[batch, rows]
                plgpu.copy_gmem_to_smem(ids, refs.q_segments.at[w], full)

    def block(self, number: Array) -> Any:
        """The rows of a block of keys."""
        return pl.ds(number * self.tiles.keys, self.tiles.keys)

    def keys(self, rows: Any, slot: Array) -> None:
        """A block of keys and their tangents, as soon as the slot is free."""
        refs = self.refs
        full = refs.k_full.at[slot]
        plgpu.barrier_wait(refs.k_free.at[slot])
        self.copy(KEYS, rows, self.work.kv_head, slot, full)
        if self.plan.spec.has_segments:
            ids = refs.key_segments.at[self.work.batch, rows]
            plgpu.copy_gmem_to_smem(ids, refs.k_segments.at[slot], full)

    def values(self, rows: Any, slot: Array) -> None:
        """A block of values and their tangents, likewise."""
        plgpu.barrier_wait(self.refs.v_free.at[slot])
        self.copy(VALUES, rows, self.work.kv_head, slot, self.refs.v_full.at[slot])

    def copy(self, names: tuple[str, ...], rows: Any, head: Array, slot: Any, full: Ref) -> None:
        """Those of the matrices that are there."""
        own = vars(self.refs)
        for name in names:
            if name in own:
                smem = own[f"{name}_smem"]
                its = own[name].at[self.work.batch, rows, head, pl.ds(0, smem.shape[-1])]
                plgpu.copy_gmem_to_smem(its, smem.at[slot], full)
