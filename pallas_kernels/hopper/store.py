"""The end of a tile: O divided by the sum, on its way out, and the rows' maxima and sums.

These leave from registers: there is no barrier and no copy for them, as there would be on a way
through shared memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.hopper import instructions
from pallas_kernels.hopper.dropout import kept_factor
from pallas_kernels.hopper.from_registers import store_rows
from pallas_kernels.hopper.load import query_parts
from pallas_kernels.hopper.masks import Warpgroup
from pallas_kernels.hopper.plain import columns_of
from pallas_kernels.hopper.seam import Ref, Seam
from pallas_kernels.hopper.softmax import Softmax, across
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from pallas_kernels.hopper.plan import Plan, Work

__all__ = ["store"]


def store(
    plan: Plan,
    seam: Seam,
    refs: Ref,
    warpgroup: Warpgroup,
    work: Work,
    slot: Any,
    o: Array,
    softmax: Softmax,
) -> None:
    """Through a staging of the own, or the slot of the queries, which may be filled afterwards."""
    number = warpgroup.number
    sink = None
    if "sinks" in vars(refs):
        sink = refs.sinks[work.batch if refs.sinks.shape[0] > 1 else 0, work.head]
        sink = seam.layout(jnp.full((ROWS,), sink), plgpu.Layout.WGMMA.reduce(1))
    softmax, more = softmax.ended(seam)
    factor = softmax.factor(sink, natural=plan.spec.bias_shape is not None)
    if more is not None:
        factor *= more
    if plan.spec.dropout_rate > 0:
        factor *= kept_factor(plan.spec)
    batch = (work.split, work.batch) if plan.in_parts else (work.batch,)
    o = (o * across(factor, o.shape[1])).astype(refs.out.dtype)
    if plan.tiles.from_registers and not seam.interpret:
        _store_rows(plan, refs, work, number, o)
        _store_sums(plan, seam, refs, warpgroup, work, batch, softmax)
        return
    if plan.tiles.own_staging or plan.tiles.from_registers:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem, rows_of, slot = refs.o_smem, refs.o_rows, number
    else:
        smem, rows_of = refs.q_smem, refs.q_rows
    pieces = _as_wide_as(seam, smem, o)
    smem, rows_of = smem[: len(pieces)], rows_of[: len(pieces)]
    for piece, to in zip(pieces, smem, strict=True):
        to[slot] = piece
    plgpu.commit_smem()
    for rows, queries, head in query_parts(plan, work, number):
        found = columns_of(rows_of, refs.out.shape[-1], work.batch * 0)
        for piece, columns in zip(rows_of, found, strict=True):
            out = refs.out.at[(*batch, queries, head, columns)]
            plgpu.copy_smem_to_gmem(piece.at[slot, rows], out)
    _store_sums(plan, seam, refs, warpgroup, work, batch, softmax)  # beside O's copies
    if smem[0] is refs.q_smem[0]:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store_rows(plan: Plan, refs: Ref, work: Work, number: Array, o: Array) -> None:
    """O straight from registers."""
    query, rows = work.query + number * ROWS, refs.out.shape[1]
    limit = None if rows % plan.queries == 0 else rows - query
    store_rows(o, refs.out.at[work.batch, pl.ds(query, ROWS), work.head], limit)


def _as_wide_as(seam: Seam, parts: tuple[Ref, ...], o: Array) -> list[Array]:
    """O cut into the pieces by which it leaves."""
    found: list[Array] = []
    start = 0
    while start < o.shape[1]:
        width = parts[len(found)].shape[-1]
        found.append(seam.padded(o[:, start : start + width], width))
        start += width
    return found


def _store_sums(
    plan: Plan,
    seam: Seam,
    refs: Ref,
    warpgroup: Warpgroup,
    work: Work,
    batch: tuple[Array, ...],
    softmax: Softmax,
) -> None:
    """The rows' maxima and sums. Past the last query there is room for those of a whole tile."""
    parts = query_parts(plan, work, warpgroup.number)

    def place(part: int, i: Any) -> tuple[Any, ...]:
        _, queries, head = parts[part]
        return (*batch, queries, i, head) if plan.heads_in_rows else (*batch, head, i, queries)

    if seam.interpret:
        for part, (rows, _, _) in enumerate(parts):
            for i, x in enumerate((softmax.m, softmax.l)):
                refs.sums[place(part, i)] = x[rows.start : rows.start + rows.size]
        return
    size = refs.sums.shape[-1]  # between a row's two numbers; a part comes after both of another
    instructions.store_pairs(
        softmax.m, softmax.l, refs.sums.at[place(0, slice(None))],
        rows=parts[0][0].size, parts=len(parts), step=2 * size, between=size,
    )  # fmt: skip
