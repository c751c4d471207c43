"""A compute warpgroup's part of one visit of the Hopper backward kernel: one block of queries.

    Sᵀ = K Qᵀ     Pᵀ = exp(Sᵀ - lse)       dV += Pᵀ dO
    dPᵀ = V dOᵀ   dSᵀ = Pᵀ (dPᵀ - D)       dK += dSᵀ Q       dQ = dS K

`backward_kernel.py` draws who does what when.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from math import gcd
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper import backward_bias
from pallas_kernels.hopper.backward_block import HIGH, LOW, ROW, ROW_TERM, WGMMA, Block
from pallas_kernels.hopper.backward_claims import known_claim, put_dq
from pallas_kernels.hopper.backward_tiles import dq_columns
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.dropout import kept
from pallas_kernels.hopper.indices import remainder
from pallas_kernels.hopper.row_terms import row_sums
from pallas_kernels.hopper.seam import Ref
from pallas_kernels.hopper.softmax import LOG2E, across, logits
from pallas_kernels.hopper.tiles import ROWS

__all__ = ["meet", "release", "visit_block"]


def _fold(block: Block, warpgroup: Array | int, slot: Array) -> None:
    """dO and D of a block times what the low part of the log-sum-exp takes from P.

        P = f P'      dV = P'ᵀ (f dO)      dSᵀ = P'ᵀ (V (f dO)ᵀ - f D)      f = 2^-low

    So that P', which knows the high part alone, does for P.
    """
    spec, seam, refs = block.spec, block.seam, block.refs
    by_hand = block.tiles.values_first  # then Pallas puts no barriers around loads and stores

    @pl.when(warpgroup == 0)
    def _() -> None:
        for row in range(0, block.tiles.queries, ROWS):
            rows = pl.ds(row, ROWS)
            factor = jnp.exp2(-seam.load(refs.rows_smem.at[slot, LOW, rows], ROW))
            row_term = refs.rows_smem.at[slot, ROW_TERM, rows]
            folded_term = seam.load(row_term, ROW) * factor
            if by_hand:  # several threads hold a row's
                plgpu.commit_smem()
            row_term[...] = folded_term
            value = refs.do_smem.shape[-1]
            width = gcd(value, 64)
            for part, column in product(block.parts(refs.do_smem, slot), range(0, value, width)):
                do = part.at[rows, pl.ds(column, width)]
                folded = seam.load(do, WGMMA).astype(jnp.float32) * across(factor, width)
                if by_hand:
                    plgpu.commit_smem()
                do[...] = folded.astype(spec.dtype)
        plgpu.commit_smem()

    meet(block)


def _make_row_terms(block: Block, warpgroup: Array | int, slot: Array) -> None:
    """D = rowsum(O dO) of a block's queries: 64 of them by each warpgroup."""
    seam, refs, queries = block.seam, block.refs, block.tiles.queries
    rows = pl.ds(warpgroup * ROWS if queries > ROWS else 0, ROWS)  # else by both, the same
    row_term = row_sums(
        seam,
        [x.at[rows] for x in block.parts(refs.out_smem, slot)],
        [x.at[rows] for x in block.parts(refs.do_smem, slot)],
    )
    refs.rows_smem.at[slot, ROW_TERM, rows][...] = row_term
    if queries > ROWS:
        meet(block)


def release(block: Block, n: Array, some: Array) -> None:
    """The n-th visit's slot is free, if there was one."""

    @pl.when(some)
    def _() -> None:
        plgpu.barrier_arrive(block.refs.free.at[remainder(n, block.tiles.stages)])


def meet(block: Block) -> None:
    """Both compute warpgroups are here, and what they committed to shared memory is."""
    refs = block.refs
    if block.tiles.values_first:
        block.seam.meet(block.tiles.warpgroups, refs.both)
        return
    plgpu.barrier_arrive(refs.both)
    plgpu.barrier_wait(refs.both)


class _Visit(NamedTuple):
    """One block of queries of one head, to a compute warpgroup.

    mine: the rows of its 64 keys in a tile's.
    hidden: a zero that the compiler cannot know. Without it each wgmma's descriptor of K and V is
      kept in two registers, 32 in all, which then spill.
    k, v: this warpgroup's 64 keys; like q and do in pieces, if all is.
    n: it is the n-th of the thread block's.
    h, at: the head, counted from the first, and the block of queries.
    """

    warpgroup: Array | int
    n: Array
    slot: Array
    mine: Any
    hidden: Array
    k: Ref
    v: Ref
    q: Ref
    do: Ref
    h: Array
    at: Array
    first_query: Array


def _visit_at(block: Block, warpgroup: Array | int, n: Array, h: Array, i: Array) -> _Visit:
    """Visit i of head h, the n-th of the tile's."""
    tiles, refs = block.tiles, block.refs
    if block.turn is not None:
        n += block.turn.visited
    slot = remainder(n, tiles.stages)
    mine = pl.ds(warpgroup * ROWS, ROWS)
    hidden = lax.shift_right_logical(n, np.int32(30))
    k, v = (
        block.rows_of(smem, block.keys_at((warpgroup + hidden) * ROWS))
        for smem in (refs.k_smem, refs.v_smem)
    )
    q, do = refs.q_smem.at[slot], refs.do_smem.at[slot]
    h, at = block.located(h, i)
    return _Visit(warpgroup, n, slot, mine, hidden, k, v, q, do, h, at, at * tiles.queries)


def _weights(
    block: Block,
    visit: _Visit,
    dv_acc: Ref,
    s_acc: Ref,
    dp_acc: Ref,
    *,
    masked: bool,
) -> tuple[Array, Array]:
    """P and dS of a visit; adds to dV, if values come first.

    A late dK of the visit before is done once this one's first products are started.
    """
    spec, seam, refs, slot = block.spec, block.seam, block.refs, visit.slot
    first, own = block.tiles.values_first, visit.warpgroup
    seam.inner_into(s_acc, visit.k, visit.q)  # Sᵀ = K Qᵀ
    seam.inner_into(dp_acc, visit.v, visit.do)  # dPᵀ = V dOᵀ
    if "out_smem" in vars(refs):
        _make_row_terms(block, own, slot)
    capped, has_bias = spec.logits_soft_cap is not None, spec.bias_shape is not None
    early: Array | None = None
    started = 0
    if block.tiles.late:
        seam.drain(2)
        release(block, visit.n - 1, visit.n > 0)
        early = block.row(refs.rows_smem.at[slot, HIGH])
    s = seam.wait(s_acc, in_flight=0 if capped else 1)
    x, c = logits(spec, block.scale, s)
    if has_bias:
        lse = block.row(refs.rows_smem.at[slot, HIGH])
        p = jnp.exp2((backward_bias.added(block, own, slot, x, c) - lse) * LOG2E)
        if spec.has_query_lengths:  # of a query past one, the bias may be no number
            p = jnp.where(lse < jnp.inf, p, 0.0)
    else:
        lse = block.row(refs.rows_smem.at[slot, HIGH]) if early is None else early
        exponent = x * c - lse
        if block.tiles.joined:
            exponent -= block.row(refs.rows_smem.at[slot, LOW])
        if masked:  # a choice made of P would keep both, P and what it was made of, in registers
            exponent = block.hide(exponent, own * ROWS, visit.first_query, slot, -np.inf)
        if block.tiles.in_parts and not (masked and spec.has_segments):
            p, started = seam.powers_into(dv_acc, exponent, visit.do)  # dV += Pᵀ dO
        else:
            p = jnp.exp2(exponent)
    if masked and has_bias:
        p = block.hide(p, own * ROWS, visit.first_query, slot)
    drops, keys = spec.dropout_rate > 0, (own + visit.hidden) * ROWS
    if drops and capped:
        p = block.marked(p, keys, slot)
    unseen, slope = p == 0, p
    if capped:
        slope = p * (1 - x * x)  # d tanh(y) = 1 - tanh² y
        if masked and block.tiles.joined and not drops:  # where what is unseen would spill
            slope = jnp.where(unseen, 0.0, slope)
            unseen = slope == 0
        p = (kept(p) if drops else p).astype(spec.dtype)
    elif (first or masked) and not started:  # else its products hold it
        seam.hold(p, visit.hidden)
    if first and not started:
        seam.matmul_into(dv_acc, p.astype(spec.dtype), visit.do)
        started = 1
    dp = seam.wait(dp_acc, in_flight=started)
    row_term = block.row(refs.rows_smem.at[slot, ROW_TERM])
    if drops and capped:
        ds = kept(slope) * dp - jnp.abs(slope) * row_term
    elif drops:
        p = block.kept(p, keys, slot)
        ds = p * dp - slope * row_term
    else:
        ds = slope * (dp - row_term)
    if masked or has_bias:  # a hidden value may be so large that dP is infinite
        ds = jnp.where(unseen, 0.0, ds)
    return p.astype(spec.dtype), ds.astype(spec.dtype)


def visit_block(
    block: Block,
    warpgroup: Array | int,
    accumulator: Any,
    dk_acc: Ref,
    dv_acc: Ref,
    n: Array,
    h: Array,
    i: Array,
    *,
    masked: bool,
    folds: bool,
) -> None:
    """Visit i of head h, the n-th of the tile's: one block of queries.

    masked: it needs an element mask.
    folds: low parts of its log-sum-exps may count.
    """
    tiles, seam, refs = block.tiles, block.seam, block.refs
    visit = _visit_at(block, warpgroup, n, h, i)
    free = refs.free.at[visit.slot]
    plgpu.barrier_wait(refs.full.at[visit.slot])
    if folds and not tiles.joined:
        pl.when(block.in_two)(partial(_fold, block, warpgroup, visit.slot))
    weights = partial(_weights, block, visit, dv_acc, masked=masked)
    shape = (ROWS, tiles.queries)
    p, ds = accumulator("s", shape, lambda s_acc: accumulator("dp", shape, partial(weights, s_acc)))
    if not block.makes_dq:
        if not tiles.values_first:
            seam.matmul_into(dv_acc, p, visit.do)
        seam.matmul_into(dk_acc, ds, visit.q)  # dK += dSᵀ Q
        seam.drain(0)
        plgpu.barrier_arrive(free)
        return
    ds_smem = refs.ds_smem.at[remainder(visit.n, 2)]
    ds_smem[visit.mine] = ds
    if tiles.values_first:
        meet(block)
    else:
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.both)
        seam.matmul_into(dv_acc, p, visit.do)
        plgpu.barrier_wait(refs.both)
    _make_dq(block, visit, accumulator, dk_acc, ds, ds_smem)
    if tiles.late:
        return
    seam.wait(dk_acc, in_flight=0)
    plgpu.barrier_arrive(free)


def _make_dq(
    block: Block,
    visit: _Visit,
    accumulator: Any,
    dk_acc: Ref,
    ds: Array,
    ds_smem: Ref,
) -> None:
    """This warpgroup's share of the block's dQ, on its way while dK is computed."""
    spec, tiles, seam, refs = block.spec, block.tiles, block.seam, block.refs
    warpgroup = visit.warpgroup
    by_columns = tiles.queries == ROWS
    dq_smem: Any = None
    dq_rows: Any = None
    if tiles.in_fragments and isinstance(warpgroup, int):
        shares = dq_columns(padded_width(refs.k.shape[3]))
        own, before = shares[warpgroup], shares[0]
    elif isinstance(warpgroup, int):
        dq_smem, dq_rows = (getattr(refs, f"dq{warpgroup}_{name}") for name in ("smem", "rows"))
        own, before = dq_smem.shape[1], refs.dq0_smem.shape[1]
    else:
        if tiles.in_fragments:
            own = refs.dq.shape[1] // ROWS
        else:
            dq_smem, dq_rows = refs.dq_smem.at[warpgroup], refs.dq_rows.at[warpgroup]
            own = dq_smem.shape[1]
        before = own
    columns = pl.ds(warpgroup * before, own)

    def products(dq_acc: Ref) -> Array:
        if by_columns:
            every = slice(None)
            if block.turn is not None:
                every = block.keys_at(visit.hidden * ROWS, tiles.keys)
            own_k: Ref = refs.k_smem.at[every, columns] if not tiles.pieces else None
            if tiles.pieces:
                width = refs.k_smem.shape[-1]
                first, count = warpgroup * (before // width), own // width
                own_k = refs.k_smem.at[first if count == 1 else pl.ds(first, count), every]
            seam.turned_into(dq_acc, ds_smem, own_k)  # dQ = dS K
        else:
            seam.turned_into(dq_acc, ds_smem.at[:, visit.mine], refs.k_smem)
        own_ds = ds_smem.at[visit.mine] if tiles.shared_ds else ds
        seam.matmul_into(dk_acc, own_ds, visit.q, in_registers=not tiles.shared_ds)  # dK += dSᵀ Q
        return seam.wait(dq_acc, in_flight=1)

    claimed = known_claim(block, visit.n) if tiles.first_stores else None
    dq = accumulator("dq", (ROWS, own), products)
    if tiles.in_fragments:
        place = (block.batch * spec.heads + block.first_head + visit.h) * refs.rows.shape[2]
        part, first = place + visit.at, 0
        if isinstance(warpgroup, int):
            first = warpgroup * before * ROWS
        else:
            part = part * tiles.warpgroups + warpgroup
        if tiles.in_turns:  # what the claim says need not be kept in registers, where 64 has none
            parts = 1 if isinstance(warpgroup, int) else tiles.warpgroups
            own_part = jnp.int32(0) if isinstance(warpgroup, int) else warpgroup
            put_dq(block, visit.n, dq, own_part, first, claimed=claimed, parts=parts)
        elif tiles.first_stores:
            put_dq(block, visit.n, dq, part, first, claimed=claimed)
        else:
            seam.add_fragment(dq, refs.dq, part, first)
        return
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if tiles.once:
        dq = (dq * block.dq_scale).astype(spec.dtype)
    dq_smem[...] = dq
    plgpu.commit_smem()
    gmem = refs.dq.at[block.batch, :, block.first_head + visit.h]
    if by_columns:
        gmem = gmem.at[pl.ds(visit.first_query, tiles.queries), columns]
    else:
        gmem = gmem.at[pl.ds(visit.first_query + warpgroup * ROWS, ROWS)]
    if tiles.once:
        plgpu.copy_smem_to_gmem(dq_rows, gmem)
    else:
        seam.add(dq_smem, gmem)
