"""Attention forward on Hopper (sm_90a), Pallas Mosaic GPU.

    S = Q Kᵀ      P = softmax(S)      O = P V      lse = log sum exp S

(Dao, "FlashAttention-2", 2023; Shah et al., "FlashAttention-3", 2024.) A thread block holds W
compute warpgroups of 64 query rows and one that loads. Blocks of keys go right to left:

    loader         Q   K0  K1 V0  K2 V1  K3 V2  ..        next tile's Q K0 ..
    warpgroup 0        [QK0] soft0 [QK1|PV0] soft1 [QK2|PV1] soft2 .. [PVn] write O
    warpgroup 1         [QK0] soft0 [QK1|PV0] soft1 [QK2|PV1] soft2 .. [PVn] write O

In [QKj|PVj-1] both products are in flight; soft j starts when QKj is done, while PVj-1 runs.

Shared memory, with the barriers that guard it (`full`: a copy has landed; `free`: its readers are
done; both exist for each slot of a ring):

    q_smem  (W, 64, H)         q_full[w], q_free[w]
    k_smem  (stages, keys, H)  k_full[slot], k_free[slot]
    v_smem  (stages, keys, D)  v_full[slot], v_free[slot]
    o_smem  (W, 64, D)         waits for its own warpgroup's copies

Readers set every `free` barrier once before they start, so that the loader waits in the same way
each time, and the loader waits once more for each at the end.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.combine import combine
from pallas_kernels.hopper.constant import constant
from pallas_kernels.hopper.masks import Steps, Warpgroup, hide, steps_of
from pallas_kernels.hopper.plan import Plan, Work, make_plan
from pallas_kernels.hopper.seam import Ref, Seam, copyable, padded_width, transforms
from pallas_kernels.hopper.segments import segment_arrays
from pallas_kernels.hopper.softmax import Softmax, across, logits
from pallas_kernels.hopper.tiles import ROWS, Tiles

if TYPE_CHECKING:
    from jattn.spec import AttentionSpec, Operands

__all__ = ["forward"]


def forward(
    spec: AttentionSpec,
    operands: Operands,
    *,
    tiles: Tiles | None = None,
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Output (B, T, N, D) and log-sum-exp (B, T, N) in natural logarithm, float32.

    Args:
      spec: the call; `refusals` must be empty for it.
      operands: its arrays; sinks may be (N,) or one row for each batch row, (B, N).
      tiles: tile shapes to use instead of the table's.
      plan: the whole launch, instead of one made from `tiles`.
      interpret: run on a CPU, thread by thread.
    """
    plan = plan or make_plan(spec, tiles)
    inputs: dict[str, Any] = {
        "q": _copyable(operands.query),
        "k": _copyable(operands.key),
        "v": _copyable(operands.value),
    }
    if spec.has_query_lengths:
        inputs["query_lengths"] = operands.query_lengths
    if spec.has_key_lengths:
        inputs["key_lengths"] = operands.key_lengths
    if spec.has_segments:
        inputs |= segment_arrays(plan, operands)
    sinks = None
    if operands.sinks is not None:
        sinks = jnp.atleast_2d(operands.sinks).astype(jnp.float32)
        if not plan.in_parts:
            inputs["sinks"] = sinks
    out, lse = _launch(plan, inputs, interpret=interpret)
    out, lse = out[..., : spec.queries, :, : spec.value_dim], lse[..., : spec.queries]
    if plan.in_parts:
        return combine(spec, out, lse, sinks)
    return out, jnp.swapaxes(lse, 1, 2)


def _copyable(x: Array) -> Array:
    """x (B, rows, heads, columns), padded where the TMA unit's tiles need it: see `copyable`.

    That is rows of no multiple of 8 and columns of no multiple of 16; all else is read in place.
    """
    rows, columns = x.shape[1], x.shape[3]
    more = (copyable(rows, 8) - rows, copyable(columns, 16 if columns > 64 else 64) - columns)
    return x if more == (0, 0) else jnp.pad(x, ((0, 0), (0, more[0]), (0, 0), (0, more[1])))


def _launch(plan: Plan, inputs: dict[str, Array], *, interpret: bool) -> tuple[Array, Array]:
    spec, tiles, seam = plan.spec, plan.tiles, Seam(interpret)
    rows, columns = inputs["q"].shape[1], inputs["v"].shape[3]
    out_shape: tuple[int, ...] = (spec.batch, rows, spec.heads, columns)
    # Whole tiles: a copy of one dimension is not cut at the end of a row.
    lse_shape: tuple[int, ...] = (spec.batch, spec.heads, plan.query_tiles * plan.queries)
    out_dtype = spec.dtype
    if plan.in_parts:
        out_shape, lse_shape = (plan.splits, *out_shape), (plan.splits, *lse_shape)
        # Without room for a float32 output each part is rounded on its own.
        out_dtype = jnp.float32 if tiles.own_staging else spec.dtype
    if plan.is_scheduled:
        inputs = inputs | {"schedule": constant(plan.schedule())}
    names = [*inputs, "out", "lse"]
    scratch = _scratch(plan, out_dtype, columns)
    if interpret:
        scratch["s_stand_in"] = plgpu.SMEM((tiles.warpgroups, ROWS, tiles.keys), jnp.float32)
        scratch["o_stand_in"] = plgpu.SMEM(
            (tiles.warpgroups, ROWS, padded_width(spec.value_dim)), jnp.float32
        )

    def kernel(*args: Ref) -> None:
        refs = SimpleNamespace(**dict(zip([*names, *scratch], args, strict=True)))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < tiles.warpgroups)
        def _() -> None:
            if tiles.registers:
                plgpu.set_max_registers(tiles.registers[0], action="increase")
            _compute(plan, seam, refs, Warpgroup.of(seam, warpgroup))

        @pl.when(warpgroup == tiles.warpgroups)
        def _() -> None:
            if tiles.registers:
                plgpu.set_max_registers(tiles.registers[1], action="decrease")
            _load(plan, seam, refs)

    out, lse = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(out_shape, out_dtype),
            jax.ShapeDtypeStruct(lse_shape, jnp.float32),
        ],
        scratch_types=list(scratch.values()),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*inputs.values())
    return out, lse


def _scratch(plan: Plan, out_dtype: Any, columns: int) -> dict[str, Any]:
    spec, tiles = plan.spec, plan.tiles
    w, stages = tiles.warpgroups, tiles.stages
    head, value = padded_width(spec.head_dim), padded_width(spec.value_dim)

    def matrix(*shape: int, dtype: Any = spec.dtype, of: int | None = None) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=transforms(of or shape[-1], dtype))

    scratch = {
        "q_smem": matrix(w, ROWS, head),
        "k_smem": matrix(stages, tiles.keys, head),
        "v_smem": matrix(stages, tiles.keys, value),
        "lse_smem": plgpu.SMEM((w, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_arrivals=_copies(plan) + spec.has_segments, num_barriers=w),
        "q_free": plgpu.Barrier(num_barriers=w),
        "k_full": plgpu.Barrier(num_arrivals=1 + spec.has_segments, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=w, num_barriers=stages),
        "v_full": plgpu.Barrier(num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=w, num_barriers=stages),
    }
    if tiles.own_staging:
        scratch["o_smem"] = matrix(w, ROWS, value, dtype=out_dtype, of=columns)
    if tiles.in_turn:
        scratch["turn"] = plgpu.Barrier(num_barriers=w)
    if spec.has_segments:
        scratch["q_segments"] = plgpu.SMEM((w, ROWS), jnp.int32)
        scratch["k_segments"] = plgpu.SMEM((stages, tiles.keys), jnp.int32)
    return scratch


def _each_tile(plan: Plan, refs: Ref, body: Any) -> None:
    """Runs body(work, count) for this block's tiles; count is of key blocks visited before."""
    block = lax.axis_index("block")
    if not plan.is_scheduled:
        body(plan.work(block), jnp.int32(0))
        return
    lax.fori_loop(
        0,
        refs.schedule[block, 0],
        lambda turn, count: body(plan.work(refs.schedule[block, turn + 1]), count),
        jnp.int32(0),
    )


def _load(plan: Plan, seam: Seam, refs: Ref) -> None:
    """The loading warpgroup."""
    spec, tiles = plan.spec, plan.tiles

    def tile(work: Work, count: Array) -> Array:
        steps = steps_of(plan, refs, work)

        def rows(i: Array | int) -> Any:
            return pl.ds((steps.stop - 1 - i) * tiles.keys, tiles.keys)

        def load_k(i: Array) -> None:
            slot = lax.rem(count + i, tiles.stages)
            plgpu.barrier_wait(refs.k_free.at[slot])
            plgpu.copy_gmem_to_smem(
                refs.k.at[work.batch, rows(i), work.kv_head, pl.ds(0, refs.k_smem.shape[-1])],
                refs.k_smem.at[slot],
                refs.k_full.at[slot],
            )
            if spec.has_segments:
                plgpu.copy_gmem_to_smem(
                    refs.key_segments.at[work.batch, rows(i)],
                    refs.k_segments.at[slot],
                    refs.k_full.at[slot],
                )

        def load_v(i: Array | int) -> None:
            slot = lax.rem(count + i, tiles.stages)
            plgpu.barrier_wait(refs.v_free.at[slot])
            plgpu.copy_gmem_to_smem(
                refs.v.at[work.batch, rows(i), work.kv_head, pl.ds(0, refs.v_smem.shape[-1])],
                refs.v_smem.at[slot],
                refs.v_full.at[slot],
            )

        for w in range(tiles.warpgroups):
            _load_q(plan, refs, work, w)
        load_k(jnp.int32(0))

        def step(i: Array, _: None) -> None:
            load_k(i)
            load_v(i - 1)

        lax.fori_loop(1, steps.visits, step, None)
        load_v(steps.visits - 1)
        return count + steps.visits

    _each_tile(plan, refs, tile)
    for w in range(tiles.warpgroups):
        plgpu.barrier_wait(refs.q_free.at[w])
    for slot in range(tiles.stages):
        plgpu.barrier_wait(refs.k_free.at[slot])
        plgpu.barrier_wait(refs.v_free.at[slot])


def _copies(plan: Plan) -> int:
    """Heads that one warpgroup's rows hold, each of which is a copy of its own."""
    return max(1, plan.pack // plan.tiles.warpgroups)


def _q_parts(plan: Plan, work: Work, w: int | Array) -> list[tuple[Any, Any, Any]]:
    """(rows of shared memory, queries, head) of each copy that fills or empties a warpgroup."""
    copies, rows = _copies(plan), min(ROWS, plan.queries)
    first = w * ROWS
    head = work.head + (
        first // plan.queries if isinstance(w, int) else lax.div(first, plan.queries)
    )
    query = work.query + (
        first % plan.queries if isinstance(w, int) else lax.rem(first, plan.queries)
    )
    return [(pl.ds(c * rows, rows), pl.ds(query, rows), head + c) for c in range(copies)]


def _load_q(plan: Plan, refs: Ref, work: Work, w: int) -> None:
    plgpu.barrier_wait(refs.q_free.at[w])
    columns = pl.ds(0, refs.q_smem.shape[-1])
    for rows, queries, head in _q_parts(plan, work, w):
        plgpu.copy_gmem_to_smem(
            refs.q.at[work.batch, queries, head, columns],
            refs.q_smem.at[w, rows],
            refs.q_full.at[w],
        )
    if plan.spec.has_segments:
        start = work.tile * plan.rows + w * ROWS
        plgpu.copy_gmem_to_smem(
            refs.query_segments.at[work.batch, pl.ds(start, ROWS)],
            refs.q_segments.at[w],
            refs.q_full.at[w],
        )


def _compute(plan: Plan, seam: Seam, refs: Ref, warpgroup: Warpgroup) -> None:
    """A compute warpgroup: 64 query rows of each tile."""
    tiles = plan.tiles
    value = refs.v_smem.shape[-1]
    plgpu.barrier_arrive(refs.q_free.at[warpgroup.number])
    for slot in range(tiles.stages):
        plgpu.barrier_arrive(refs.k_free.at[slot])
        plgpu.barrier_arrive(refs.v_free.at[slot])
    if tiles.in_turn:
        pl.when(warpgroup.number == tiles.warpgroups - 1)(
            lambda: plgpu.barrier_arrive(refs.turn.at[0])
        )

    def tile(work: Work, count: Array) -> Array:
        steps = steps_of(plan, refs, work)
        plgpu.barrier_wait(refs.q_full.at[warpgroup.number])
        o, softmax = seam.with_accumulator(
            partial(_attend, plan, seam, refs, warpgroup, work, steps, count),
            (ROWS, value),
            refs.o_stand_in.at[warpgroup.number] if seam.interpret else None,
        )
        _write(plan, seam, refs, warpgroup, work, o, softmax)
        return count + steps.visits

    _each_tile(plan, refs, tile)
    plgpu.wait_smem_to_gmem(0)
    if tiles.in_turn:
        pl.when(warpgroup.number == 0)(lambda: plgpu.barrier_wait(refs.turn.at[0]))


def _attend(
    plan: Plan,
    seam: Seam,
    refs: Ref,
    warpgroup: Warpgroup,
    work: Work,
    steps: Steps,
    count: Array,
    o_acc: Ref,
) -> tuple[Array, Softmax]:
    """O before it is divided, and the softmax, of one tile's 64 rows."""
    spec, tiles = plan.spec, plan.tiles
    q = refs.q_smem.at[warpgroup.number]
    value = refs.v_smem.shape[-1]
    with_scores = partial(
        seam.with_accumulator,
        shape=(ROWS, tiles.keys),
        stand_in=refs.s_stand_in.at[warpgroup.number] if seam.interpret else None,
    )

    def weigh(s: Array, i: Array, softmax: Softmax, *, masked: bool) -> Any:
        """The weights of block i in the operands' dtype, from its product S."""
        x, c = logits(spec, seam.layout(s, plgpu.Layout.WGMMA))
        if masked:
            slot = lax.rem(count + i, tiles.stages)
            x = hide(plan, seam, refs, work, steps, warpgroup, x, i, slot)
        p, softmax, correction = softmax.update(x, c, masked=masked)
        return p.astype(spec.dtype) if tiles.round_early else p, softmax, correction

    def first(s_acc: Ref) -> Any:
        slot = lax.rem(count, tiles.stages)
        seam.matmul_into(s_acc, q, refs.k_smem.at[slot].T)  # S_0 = Q K_0ᵀ
        s = seam.wait(s_acc, in_flight=0)
        p, softmax, _ = weigh(s, jnp.int32(0), Softmax.start(seam), masked=plan.masked)
        plgpu.barrier_arrive(refs.k_free.at[slot])
        if spec.has_key_lengths:
            plgpu.barrier_wait(refs.v_full.at[slot])
            _zero_past_length(plan, refs, work, steps.stop - 1, refs.v_smem.at[slot])
        return p.astype(spec.dtype), softmax

    def step(i: Array, carry: Any, *, masked: bool) -> Any:
        p, softmax = carry
        slot = lax.rem(count + i, tiles.stages)
        before = lax.rem(count + i - 1, tiles.stages)

        def products(s_acc: Ref) -> Any:
            seam.matmul_into(s_acc, q, refs.k_smem.at[slot].T)  # S_i = Q K_iᵀ
            seam.matmul_into(o_acc, p, refs.v_smem.at[before])  # O += P_{i-1} V_{i-1}
            if tiles.in_turn:
                plgpu.barrier_arrive(refs.turn.at[lax.rem(warpgroup.number + 1, tiles.warpgroups)])
            s = seam.wait(s_acc, in_flight=1 if tiles.overlap else 0)
            if not spec.has_segments:
                plgpu.barrier_arrive(refs.k_free.at[slot])
            p_next, softmax_next, correction = weigh(s, i, softmax, masked=masked)
            if spec.has_segments:
                plgpu.barrier_arrive(refs.k_free.at[slot])
            o = seam.wait(o_acc, in_flight=0)
            plgpu.barrier_arrive(refs.v_free.at[before])
            o_acc[...] = o * across(correction, value)
            if spec.has_key_lengths:
                plgpu.barrier_wait(refs.v_full.at[slot])
            # Only now, unless `round_early`: an operand written while a product is in flight.
            return p_next.astype(spec.dtype), softmax_next

        # Between an accumulator's birth and its product no branch may come: ptxas would add a wait.
        plgpu.barrier_wait(refs.k_full.at[slot])
        if not spec.has_key_lengths:
            plgpu.barrier_wait(refs.v_full.at[before])
        if tiles.in_turn:
            plgpu.barrier_wait(refs.turn.at[warpgroup.number])
        return with_scores(products)

    plgpu.barrier_wait(refs.k_full.at[lax.rem(count, tiles.stages)])
    carry = with_scores(first)
    if plan.masked:
        carry = lax.fori_loop(1, steps.clear_from, partial(step, masked=True), carry)
    carry = lax.fori_loop(steps.clear_from, steps.clear_to, partial(step, masked=False), carry)
    if plan.masked_left:
        carry = lax.fori_loop(steps.clear_to, steps.visits, partial(step, masked=True), carry)
    if tiles.own_staging:
        plgpu.barrier_arrive(refs.q_free.at[warpgroup.number])
    p, softmax = carry
    last = lax.rem(count + steps.visits - 1, tiles.stages)
    if not spec.has_key_lengths:
        plgpu.barrier_wait(refs.v_full.at[last])
    seam.matmul_into(o_acc, p, refs.v_smem.at[last])
    o = seam.wait(o_acc, in_flight=0)
    plgpu.barrier_arrive(refs.v_free.at[last])
    return o, softmax


def _zero_past_length(plan: Plan, refs: Ref, work: Work, block: Array | int, v: Ref) -> None:
    """Zeroes the values past the key length in the block that holds it: 0 * NaN is not 0.

    It is the first block that a tile visits, if it visits it at all. Each warpgroup does this for
    itself, since all write the same.
    """
    real = jnp.minimum(refs.key_lengths[work.batch], plan.spec.keys) - block * plan.tiles.keys

    @pl.when(real < plan.tiles.keys)
    def _() -> None:
        key = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=plgpu.Layout.WGMMA)
        v[...] = jnp.where(key < real, v[...], jnp.zeros((), v.dtype))
        plgpu.commit_smem()


def _write(
    plan: Plan, seam: Seam, refs: Ref, warpgroup: Warpgroup, work: Work, o: Array, softmax: Softmax
) -> None:
    """O divided by the sum, and the log-sum-exp, to shared memory and on to their arrays."""
    if "sinks" in vars(refs):
        sink = refs.sinks[work.batch if refs.sinks.shape[0] > 1 else 0, work.head]
        sink = seam.layout(jnp.full((ROWS,), sink), plgpu.Layout.WGMMA.reduce(1))
        softmax, correction = softmax.join(sink)
        o = o * across(correction, o.shape[1])
    factor, lse = softmax.finish()
    if plan.tiles.own_staging:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        o_smem = refs.o_smem.at[warpgroup.number]
    else:
        o_smem = refs.q_smem.at[warpgroup.number, :, pl.ds(0, o.shape[1])]
    o_smem[...] = (o * across(factor, o.shape[1])).astype(o_smem.dtype)
    refs.lse_smem[warpgroup.number] = lse
    plgpu.commit_smem()
    batch = (work.split, work.batch) if plan.in_parts else (work.batch,)
    columns = pl.ds(0, o.shape[1])
    for rows, queries, head in _q_parts(plan, work, warpgroup.number):
        plgpu.copy_smem_to_gmem(o_smem.at[rows], refs.out.at[(*batch, queries, head, columns)])
        plgpu.copy_smem_to_gmem(
            refs.lse_smem.at[warpgroup.number, rows], refs.lse.at[(*batch, head, queries)]
        )
    if not plan.tiles.own_staging:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(refs.q_free.at[warpgroup.number])
