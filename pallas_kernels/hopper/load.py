"""The loading warpgroup of the forward kernel: queries, keys and values into their rings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper import bias, dropout, folded_bias
from pallas_kernels.hopper.indices import for_each, quotient, remainder
from pallas_kernels.hopper.masks import Steps, steps_of
from pallas_kernels.hopper.plain import columns_of, parts_in
from pallas_kernels.hopper.seam import Ref, Seam
from pallas_kernels.hopper.taken import Note, take
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from pallas_kernels.hopper.plan import Plan, Work

__all__ = ["copies", "load", "query_parts", "query_slot"]

LEAD = 2  # blocks of keys that are still to be loaded when the next tile is taken


def load(plan: Plan, seam: Seam, refs: Ref) -> None:
    """Keys go one block ahead of values, also from a tile to the next of a list."""
    tiles = plan.tiles
    # With fewer slots than two tiles need, the rest wait for outputs that need what is loaded here.
    early = min(tiles.warpgroups, tiles.query_slots - tiles.warpgroups)

    def queries(work: Work, turn: Array | int, which: range) -> None:
        for w in which:
            _load_q(plan, refs, work, turn, w)

    def rest_of(work: Work, count: Array, turn: Array | int, after: Work | None) -> Array:
        steps = steps_of(plan, refs, work)

        def step(i: Array, _: None) -> None:
            _load_k(plan, refs, work, steps.block(i), count + i)
            _load_v(plan, refs, work, steps.block(i - 1), count + i - 1)

        for_each(1, steps.visits, step, None)
        done = count + steps.visits
        if after is not None:
            queries(after, turn + 1, range(early))
            _load_k(plan, refs, after, steps_of(plan, refs, after).block(0), done)
        _load_v(plan, refs, work, steps.block(steps.visits - 1), done - 1)
        if after is not None:
            queries(after, turn + 1, range(early, tiles.warpgroups))
        return done

    def tile(turn: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        count, index = carry
        index_after = plan.listed(refs, turn + 1)  # long before it is used
        return rest_of(plan.work(index), count, turn, plan.work(index_after)), index_after

    def taken(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, turn, _ = carry
        now, after = (Note(plan, refs, x) for x in (turn, turn + 1))
        work, steps = now.work, steps_of(plan, refs, now.work, now.ranges)

        def step(i: Array, _: None) -> None:
            _load_k(plan, refs, work, steps.block(i), count + i)
            _load_v(plan, refs, work, steps.block(i - 1), count + i - 1)

        # What is taken late is left to others that are done before.
        late = jnp.maximum(steps.visits - LEAD, 1)
        for_each(1, late, step, None)
        take(plan, seam, refs, turn + 1)
        for_each(late, steps.visits, step, None)
        done = count + steps.visits
        queries(after.work, turn + 1, range(early))
        later = steps_of(plan, refs, after.work, after.ranges)
        _load_k(plan, refs, after.work, later.block(0), done)
        _load_v(plan, refs, work, steps.block(steps.visits - 1), done - 1)
        queries(after.work, turn + 1, range(early, tiles.warpgroups))
        return done, turn + 1, after.number

    def first_one() -> tuple[Work, Steps, Array]:
        if plan.counted:
            take(plan, seam, refs, 0)
            note = Note(plan, refs, 0)
            return note.work, steps_of(plan, refs, note.work, note.ranges), note.number
        number = plan.listed(refs, 0)
        return plan.work(number), steps_of(plan, refs, plan.work(number)), number

    first, steps, index = first_one()
    queries(first, 0, range(tiles.warpgroups))
    _load_k(plan, refs, first, steps.block(0), jnp.int32(0))
    if plan.counted:
        start = (jnp.int32(0), jnp.int32(0), index)
        lax.while_loop(lambda carry: carry[2] < np.int32(plan.works), taken, start)
    elif plan.is_scheduled:
        tile_count = refs.schedule[lax.axis_index("block"), 0]
        for_each(0, tile_count, tile, (jnp.int32(0), index))
    else:
        rest_of(first, jnp.int32(0), 0, None)
    for slot in range(tiles.query_slots):
        plgpu.barrier_wait(refs.q_free.at[slot])
    for slot in range(tiles.stages):
        plgpu.barrier_wait(refs.k_free.at[slot])
        plgpu.barrier_wait(refs.v_free.at[slot])
    (folded_bias if plan.folds else bias).drain(plan, refs)
    dropout.drain(plan, refs)


def query_slot(plan: Plan, turn: Array | int, w: Array | int) -> Any:
    """Where a warpgroup's queries of its turn-th tile are."""
    w_count, slots = plan.tiles.warpgroups, plan.tiles.query_slots
    if isinstance(turn, int) and turn == 0:
        return w
    if slots == 2 * w_count:
        return turn % 2 * w_count + w
    return remainder(turn * w_count + w, slots)


def copies(plan: Plan) -> int:
    """Copies of one warpgroup's rows: of each head that it holds, or each query of all of them."""
    if plan.heads_in_rows:
        return plan.queries
    return max(1, plan.pack // plan.tiles.warpgroups)


def query_parts(plan: Plan, work: Work, w: int | Array) -> list[tuple[Any, Any, Any]]:
    """(rows of shared memory, queries, heads) of each copy that fills or empties a warpgroup."""
    if plan.heads_in_rows:
        heads = pl.ds(work.head, plan.pack)
        return [
            (pl.ds(t * plan.pack, plan.pack), work.query + t, heads) for t in range(plan.queries)
        ]
    rows = min(ROWS, plan.queries)
    first = w * ROWS
    if isinstance(w, int):
        head, query = first // plan.queries, first % plan.queries
    else:
        head, query = quotient(first, plan.queries), remainder(first, plan.queries)
    return [
        (pl.ds(c * rows, rows), pl.ds(work.query + query, rows), work.head + head + c)
        for c in range(copies(plan))
    ]


def _load_q(plan: Plan, refs: Ref, work: Work, turn: Array | int, w: int) -> None:
    slot = query_slot(plan, turn, w)
    # Of a warpgroup's own: a thread must see every phase of a barrier that it waits for.
    full = refs.q_full.at[(0 if isinstance(turn, int) else turn % 2 * plan.tiles.warpgroups) + w]
    plgpu.barrier_wait(refs.q_free.at[slot])
    for rows, queries, head in query_parts(plan, work, w):
        parts = [piece.at[slot, rows] for piece in refs.q_rows]
        _copy(plan, refs, "q", work, (queries, head), parts, full)
    if plan.spec.has_segments:
        start = work.tile * plan.rows + w * ROWS
        plgpu.copy_gmem_to_smem(
            refs.query_segments.at[work.batch, pl.ds(start, ROWS)], refs.q_segments.at[slot], full
        )
    bias.load_rows(plan, refs, work, w, full)


def _load_k(plan: Plan, refs: Ref, work: Work, block: Array | int, count: Array) -> None:
    slot = remainder(count, plan.tiles.stages)
    rows = pl.ds(block * plan.tiles.keys, plan.tiles.keys)
    plgpu.barrier_wait(refs.k_free.at[slot])
    parts = [piece.at[slot] for piece in refs.k_rows]
    _copy(plan, refs, "k", work, (rows, work.kv_head), parts, refs.k_full.at[slot])
    if plan.spec.has_segments:
        plgpu.copy_gmem_to_smem(
            refs.key_segments.at[work.batch, rows],
            refs.k_segments.at[remainder(count, refs.k_segments.shape[0])],
            refs.k_full.at[slot],
        )
    (folded_bias if plan.folds else bias).load_block(plan, refs, work, block, count)
    dropout.load_block(plan, refs, block, count)


def _load_v(plan: Plan, refs: Ref, work: Work, block: Array | int, count: Array) -> None:
    slot = remainder(count, plan.tiles.stages)
    rows = pl.ds(block * plan.tiles.keys, plan.tiles.keys)
    plgpu.barrier_wait(refs.v_free.at[slot])
    parts = parts_in(refs.v_rows, slot)
    _copy(plan, refs, "v", work, (rows, work.kv_head), parts, refs.v_full.at[slot])


def _copy(
    plan: Plan,
    refs: Ref,
    name: str,
    work: Work,
    where: tuple[Any, Any],
    parts: list[Ref],
    full: Ref,
) -> None:
    """Rows and a head of q, k or v, from the half that has them, into parts of shared memory."""
    rows, head = where

    def copy(array: Ref, rows: Any, head: Any) -> None:
        found = columns_of(tuple(parts), array.shape[-1], work.batch * 0)
        for part, columns in zip(parts, found, strict=True):
            plgpu.copy_gmem_to_smem(array.at[work.batch, rows, head, columns], part, full)

    if not hasattr(refs, "second"):
        copy(getattr(refs, name), rows, head)
        return
    half = (plan.spec.queries if name == "q" else plan.spec.keys) // 2
    second = (rows.start >= half).astype(jnp.int32)
    within = pl.ds(rows.start - second * half, rows.size)
    own, i = refs.second[0], 0 if name == "q" else 2
    first = own * refs.first_heads[i] + refs.first_heads[i + 1]
    is_own = second == own

    @pl.when(is_own)
    def _() -> None:
        copy(getattr(refs, f"own_{name}"), within, head + first)

    @pl.when(jnp.logical_not(is_own))
    def _() -> None:
        copy(getattr(refs, name), within, head)
