"""The Hopper backward kernel for head dims up to 128: one kernel, five products.

    Sᵀ = K Qᵀ          Pᵀ = exp(Sᵀ - lse)              dV = Pᵀ dO
    dPᵀ = V dOᵀ        dSᵀ = Pᵀ (dPᵀ - D)              dK = dSᵀ Q        dQ = dS K

D being the row term, rowsum(O dO) less the gradient of the log-sum-exp.

(Dao, "FlashAttention-2", 2023, algorithm 2.) A thread block holds one tile of keys, 64 rows for
each of its two compute warpgroups, and goes over the blocks of queries that see some of them, head
by head of the group, or over its share of these. dK and dV stay in registers; dQ is added to a
float32 array in global memory, or written where the tile holds all keys there are.

    loader         K V Q0 dO0  Q1 dO1  Q2 dO2 ..
    warpgroup 0    [S|dP] P [dV] dS > [dQ|dK] add dQ  [S|dP] P [dV] dS > ..      write dK dV
    warpgroup 1    [S|dP] P [dV] dS > [dQ|dK] add dQ  [S|dP] P [dV] dS > ..      write dK dV

P is computed while dP's product runs, dS while dV's does (for some tiles P and dS before dV). At >
both warpgroups' dS are in shared memory; each makes one half of the block's dQ, or about that many
of its columns, which is added while dK is computed: from the registers, in the order in which they
hold it (`instructions.py`), or by way of shared memory.

Where dK is late, it is waited for when the next visit's S and dP are started.

Where every block of queries is visited, by few tiles, and of documents, the first to visit one
stores its dQ, and no zeros are made (`backward_claims.py`). Where gradients must be the same each
time they add to it one after another (`backward_turns.py`), or dQ has a kernel of its own.

Shared memory, with the barriers that guard it (`full`: a copy has landed; `free`: its readers are
done; both for each slot of a ring):

    k_smem, v_smem (128, H), (128, D)                              kv_full
    q_smem, do_smem (stages, queries, H or D), rows_smem           full[slot], free[slot]
    (in pieces: (2, 128, 64), (stages, 2, queries, 64))
    ds_smem        (2, 128, queries)                               both: warpgroups are here
    dq_smem        for each, half of a block's dQ            waits for its own warpgroup's copy
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd
from typing import TYPE_CHECKING, Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper import backward_bias, backward_mask
from pallas_kernels.hopper.backward_block import (
    Block,
    Turn,
    each,
    grid_of,
    key_gradients,
)
from pallas_kernels.hopper.backward_claims import claim, claims_none, publish
from pallas_kernels.hopper.backward_list import each_listed, schedule
from pallas_kernels.hopper.backward_step import meet, release, visit_block
from pallas_kernels.hopper.backward_sums import Gradient, sums_of_keys
from pallas_kernels.hopper.backward_tiles import BackwardTiles, by_rows, dq_columns, dq_swizzle
from pallas_kernels.hopper.backward_turns import end_turn, ends_none, take_turn
from pallas_kernels.hopper.bias_form import form_of, has_ring
from pallas_kernels.hopper.constant import constant
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.dropout import kept_factor, words_head
from pallas_kernels.hopper.indices import remainder
from pallas_kernels.hopper.plain import in_both_ways, named, piece_shape
from pallas_kernels.hopper.seam import Ref, Seam, transforms
from pallas_kernels.hopper.tiles import ROWS
from pallas_kernels.hopper.visits import tiles_that_visit
from pallas_kernels.hopper.warpgroups import Part, run

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["fragments", "launch", "part_of"]


def launch(
    spec: AttentionSpec,
    tiles: BackwardTiles,
    inputs: dict[str, Array],
    dq: Ref | None = None,
    *,
    words: Ref | None = None,
    words_of_sums: Ref | None = None,
    unscaled: float | None = None,
    interpret: bool,
) -> tuple[Array, ...]:
    """dK and dV, as `key_gradients` says; and dQ (B, T, N, H) in the call's dtype if `tiles.once`.

    Or dQ unscaled and in fragments, as below, if `tiles.first_stores`; `words` are then zeros, one
    for each block of queries of each head, int32.

    Adds the unscaled dQ to `dq` if there is one: (B, T, N, H) float32, or if `tiles.in_fragments`
    (B N blocks parts, 64 columns) for each part of a block's columns, in fragment order.

    words_of_sums: of dK and dV, if `tiles.adds`, as `backward_sums.py` has them; these are last.
    unscaled: what dS K is multiplied by instead of the scale, in a dQ that is returned.
    """
    grid = grid_of(spec, tiles)
    if tiles.listed:
        inputs = inputs | {"schedule": constant(schedule(spec, tiles, grid))}
    if dq is not None:
        inputs = inputs | {"dq": dq}
    if words is not None:
        inputs = inputs | {"words_of_dq": words}
    if words_of_sums is not None:
        inputs = inputs | {"words_of_sums": words_of_sums}
    part = part_of(spec, tiles, inputs, unscaled=unscaled, interpret=interpret)
    scratch = in_both_ways(part.scratch, part.both, interpret=interpret)
    names = [*part.inputs, *part.results, *scratch]

    def kernel(*args: Ref) -> None:
        part.body(named(scratch, names, args), grid.place)

    found: tuple[Array, ...] = run(
        kernel,
        part.inputs,
        out_type=list(part.results.values()),
        scratch_types=list(scratch.values()),
        **({"grid": (tiles.listed,), "grid_names": ("block",)} if tiles.listed else grid.launch),
        num_threads=tiles.warpgroups + 1,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=tiles.values_first and not interpret
        ),
        interpret=interpret,
    )
    return found


def part_of(
    spec: AttentionSpec,
    tiles: BackwardTiles,
    inputs: dict[str, Array],
    *,
    unscaled: float | None,
    interpret: bool,
) -> Part:
    """The kernel as `launch` says, whose thread blocks are asked for their place in the grid.

    inputs: those of `launch`, with what else it is given.
    """
    seam = Seam(interpret)
    w, queries = tiles.warpgroups, tiles.queries
    head, value = (padded_width(inputs[name].shape[3]) for name in "kv")
    grid = grid_of(spec, tiles)
    known = tiles.in_turns and "tiles_before" not in inputs
    if known and (tiles.upward or spec.band.lower is not None):
        ends = tiles_that_visit(spec, queries=queries, keys=tiles.keys)
        inputs = inputs | {"tiles_before": constant(ends[1 if tiles.upward else 0][None])}
    takes_output = "out" in inputs
    scratch = _scratch(
        spec, tiles, head, value, makes_dq=not tiles.apart, takes_output=takes_output
    )
    widths = {"s": queries, "dp": queries, "dq": head, "dk": head, "dv": value}
    scratch |= seam.stand_ins({name: (w, ROWS, columns) for name, columns in widths.items()})
    results = dict(zip(("dk", "dv"), key_gradients(spec, tiles, inputs), strict=True))
    if tiles.once:
        results["dq"] = jax.ShapeDtypeStruct(inputs["q"].shape, spec.dtype)
    if tiles.first_stores:
        results["dq"] = jax.ShapeDtypeStruct(fragments(tiles, inputs), jnp.float32)
    both: tuple[str, ...] = ()
    if by_rows(spec, tiles):
        both = ("q_smem", "k_smem", "v_smem", "do_smem", *(["dq_smem"] if tiles.once else []))
        both += ("out_smem",) if takes_output else ()
    if tiles.adds:
        results["sums"] = sums_of_keys(spec, tiles, inputs)
        scratch["arrived_smem"] = plgpu.SMEM((w + 1,), jnp.int32)

    shares = dq_columns(head)
    uneven = queries == ROWS and not tiles.apart and shares[0] != shares[1]

    def body(refs: Ref, place: Callable[[], dict[str, Array]]) -> None:
        def block_at(place: dict[str, Array], turn: Turn | None = None) -> Block:
            block = Block(spec, tiles, seam, refs, place, turn)
            if unscaled is not None:
                block.dq_scale = unscaled
            if spec.dropout_rate > 0:
                block.dq_scale = block.dq_scale * kept_factor(spec)
            return block

        # With dropout ptxas spills half as much again if this comes behind the branch to the
        # warpgroups, without it somewhat less.
        only = block_at(place()) if spec.dropout_rate > 0 else None
        warpgroup = lax.axis_index("warpgroup")

        def every_tile(each_tile: Callable[[Block, Callable[[], None]], None]) -> Array:
            """each_tile(the tile, what is called where the next may be looked up), one by one.

            Returns how many blocks of queries were visited in all.
            """
            if tiles.listed:
                return each_listed(refs, grid, block_at, each_tile)
            block = only or block_at(place())
            each_tile(block, lambda: None)
            visited: Array = block.visits.count * block.heads
            return visited

        def compute(number: Array | int) -> None:
            plgpu.set_max_registers(240, action="increase")
            _start(tiles, refs)
            every_tile(lambda block, ends: _compute(block, number, ends))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup < w)
        def _() -> None:
            if uneven:  # shares of their own size, so a text for each warpgroup
                lax.cond(warpgroup == 0, partial(compute, 0), partial(compute, 1))
            else:
                compute(warpgroup)

        @pl.when(warpgroup == w)
        def _() -> None:
            plgpu.set_max_registers(24, action="decrease")
            if tiles.in_turns:
                ends_none(tiles, seam, refs)
            elif tiles.first_stores:
                claims_none(tiles, seam, refs)
            visited = every_tile(_load)
            _finish(tiles, seam, refs, visited)

    return Part(inputs, results, scratch, both, body)


def fragments(tiles: BackwardTiles, inputs: dict[str, Array]) -> tuple[int, int]:
    """The shape of dQ in fragment order."""
    b, n, blocks, _, queries = inputs["rows"].shape
    head = padded_width(inputs["q"].shape[3])
    first, second = dq_columns(head)
    if queries == ROWS and first != second:  # one after the other
        return b * n * blocks, queries * head
    return b * n * blocks * tiles.warpgroups, queries * head // tiles.warpgroups


def _scratch(
    spec: AttentionSpec,
    tiles: BackwardTiles,
    head: int,
    value: int,
    *,
    makes_dq: bool,
    takes_output: bool = False,
) -> dict[str, Any]:
    w, stages, queries = tiles.warpgroups, tiles.stages, tiles.queries

    def matrix(*shape: int, dtype: Any = spec.dtype, swizzle: int | None = None) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], dtype, swizzle))

    def operand(*shape: int, swizzle: int | None = None) -> Any:
        if tiles.pieces:
            shape = (*shape[:-2], *piece_shape(*shape[-2:], swizzle=swizzle))
        return matrix(*shape, swizzle=swizzle)

    # Both operands of a product have one swizzle, and columns of dQ are shared in whole tiles.
    swizzle = dq_swizzle(head) if makes_dq and queries == ROWS else None
    slots = 2 if tiles.listed else 1  # tiles of keys
    operands = {
        "k": operand(slots * tiles.keys, head, swizzle=swizzle),
        "v": operand(slots * tiles.keys, value),
        "q": operand(stages, queries, head, swizzle=swizzle),
        "do": operand(stages, queries, value),
    }
    if takes_output:
        operands["out"] = operand(stages, queries, value)
    both = 2  # copies of two matrices
    if tiles.pieces:
        both = sum(operands[name].shape[-3] for name in "kv")
    once_a_tile = both + spec.has_segments + (spec.dropout_rate > 0)
    arrivals = both + 1 + spec.has_segments + (spec.dropout_rate > 0) + has_ring(spec)
    if takes_output:
        arrivals += operands["out"].shape[-3] if tiles.pieces else 1
    of_mask = backward_mask.scratch(spec, tiles)
    arrivals += len(of_mask) + tiles.first_stores
    vectors = 3 + (form_of(spec) == "rows")
    vectors += tiles.first_stores
    scratch = {
        **{f"{name}_smem": x for name, x in operands.items()},
        "rows_smem": plgpu.SMEM((stages, vectors, queries), jnp.float32),
        "kv_full": plgpu.Barrier(num_arrivals=once_a_tile, num_barriers=slots),
        "full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=w, num_barriers=stages),
        "both": plgpu.Barrier(num_arrivals=w),
    }
    if tiles.listed:
        scratch["kv_free"] = plgpu.Barrier(num_arrivals=w, num_barriers=slots)
    if makes_dq:
        scratch["ds_smem"] = matrix(2, tiles.keys, queries, swizzle=swizzle)
        shares = dq_columns(head) if queries == ROWS else (head, head)
        dtype = spec.dtype if tiles.once else jnp.float32
        if tiles.in_fragments:
            pass
        elif shares[0] == shares[1]:
            scratch["dq_smem"] = matrix(w, ROWS, shares[0], dtype=dtype)
        else:
            # Tiles that begin where the second's columns do.
            own = min(128, gcd(*shares) * jnp.dtype(dtype).itemsize)
            for number, columns in enumerate(shares):
                scratch[f"dq{number}_smem"] = matrix(ROWS, columns, dtype=dtype, swizzle=own)
    scratch |= backward_bias.scratch(spec, tiles) | of_mask
    if spec.dropout_rate > 0:
        scratch["words_smem"] = plgpu.SMEM((stages, 2, queries), jnp.uint32)
        scratch["dropout_keys"] = plgpu.SMEM((tiles.keys,), jnp.uint32)
    if spec.has_segments:
        scratch["q_segments"] = plgpu.SMEM((stages, queries), jnp.int32)
        scratch["k_segments"] = plgpu.SMEM((tiles.keys,), jnp.int32)
    return scratch


def _start(tiles: BackwardTiles, refs: Ref) -> None:
    """All slots are free."""
    for slot in range(tiles.stages):
        plgpu.barrier_arrive(refs.free.at[slot])
    if tiles.listed:
        for slot in range(2):
            plgpu.barrier_arrive(refs.kv_free.at[slot])


def _finish(tiles: BackwardTiles, seam: Seam, refs: Ref, visited: Array) -> None:
    """Waits until all slots are free again, in the order of visits where that matters."""
    for slot in range(tiles.stages):
        if tiles.first_stores:
            n = visited + np.int32(slot)
            plgpu.barrier_wait(refs.free.at[remainder(n, tiles.stages)])
            (end_turn if tiles.in_turns else publish)(tiles, seam, refs, n)
        else:
            plgpu.barrier_wait(refs.free.at[slot])
    if tiles.listed:
        for slot in range(2):
            plgpu.barrier_wait(refs.kv_free.at[slot])


def _load(block: Block, ends: Callable[[], None]) -> None:
    """The loading warpgroup."""
    spec, tiles, refs = block.spec, block.tiles, block.refs
    batch, visit = block.batch, block.visits
    keys = pl.ds(block.tile * tiles.keys, tiles.keys)
    before: Array | int = 0
    full = refs.kv_full.at[0]
    if block.turn is not None:
        before, full = block.turn.visited, refs.kv_full.at[block.turn.slot]
        plgpu.barrier_wait(refs.kv_free.at[block.turn.slot])
    for gmem, smem in ((refs.k, refs.k_rows), (refs.v, refs.v_rows)):
        block.load(gmem, (batch, keys, block.kv_head), smem, full)
    if spec.has_segments:
        plgpu.copy_gmem_to_smem(refs.key_segments.at[batch, keys], refs.k_segments, full)
    if spec.dropout_rate > 0:
        plgpu.copy_gmem_to_smem(refs.dropout_words.at[keys], refs.dropout_keys, full)

    def fetch(n: Array) -> None:
        h, at = block.located(*block.visit(n if block.turn is None else n - before))
        head = block.first_head + h
        queries = pl.ds(at * tiles.queries, tiles.queries)
        slot = remainder(n, tiles.stages)
        plgpu.barrier_wait(refs.free.at[slot])
        if tiles.first_stores:
            (end_turn if tiles.in_turns else publish)(tiles, block.seam, refs, n)

        def copy(source: Ref, place: Ref) -> None:
            plgpu.copy_gmem_to_smem(source, place.at[slot], refs.full.at[slot])

        def copy_matrix(source: Ref, place: Ref) -> None:
            block.load(source, (batch, queries, head), place, refs.full.at[slot], slot)

        copy_matrix(refs.q, refs.q_rows)
        vectors = refs.rows_smem.at[slot, pl.ds(0, refs.rows.shape[3])]
        plgpu.copy_gmem_to_smem(refs.rows.at[batch, head, at], vectors, refs.full.at[slot])
        copy_matrix(refs.do, refs.do_rows)
        if "out_smem" in vars(refs):
            copy_matrix(refs.out, refs.out_rows)
        if spec.dropout_rate > 0:
            copy(refs.words.at[batch, words_head(spec, head), at], refs.words_smem)
        if spec.has_segments:
            copy(refs.query_segments.at[batch, queries], refs.q_segments)
        backward_bias.copies(block, copy, head, at)
        if "w_smem" in vars(refs):
            copy(
                backward_mask.words_at(spec, tiles, refs, batch, head, block.tile, at), refs.w_smem
            )
        if tiles.first_stores:
            (take_turn if tiles.in_turns else claim)(block, n, head, at)

    each(before, before + visit.count * block.heads, fetch)
    ends()


def _compute(block: Block, warpgroup: Array | int, ends: Callable[[], None]) -> None:
    """A compute warpgroup: 64 keys of the tile."""
    tiles, seam, refs = block.tiles, block.seam, block.refs
    plgpu.barrier_wait(refs.kv_full.at[0 if block.turn is None else block.turn.slot])
    accumulator = partial(_accumulator, seam, refs, warpgroup)
    shapes = [(ROWS, padded_width(x.shape[3])) for x in (refs.k, refs.v)]
    dk, dv = accumulator(
        "dk", shapes[0],
        lambda dk: accumulator(
            "dv", shapes[1],
            lambda dv: _visit_all(block, warpgroup, accumulator, dk, dv),
        ),
    )  # fmt: skip
    ends()
    if not (tiles.in_fragments or tiles.listed):
        plgpu.wait_smem_to_gmem(0)
    if block.makes_dq:  # both warpgroups' dQ read all of k_smem
        meet(block)
    mine = block.keys_at(warpgroup * ROWS)
    if block.spec.dropout_rate > 0:
        dk, dv = (x * kept_factor(block.spec) for x in (dk, dv))
    dk = dk * block.scale
    row = block.tile * tiles.keys + warpgroup * ROWS

    def mine_of(matrix: Ref) -> list[Ref]:
        return [part.at[mine] for part in block.parts(matrix)]

    block.store(
        row,
        Gradient(dk, mine_of(refs.k_smem), mine_of(refs.k_rows), "dk"),
        Gradient(dv, mine_of(refs.v_smem), mine_of(refs.v_rows), "dv"),
    )
    if block.turn is not None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(refs.kv_free.at[block.turn.slot])


def _accumulator(
    seam: Seam,
    refs: Ref,
    warpgroup: Array | int,
    name: str,
    shape: tuple[int, int],
    body: Any,
) -> Any:
    stand_in = None
    if seam.interpret:
        stand_in = getattr(refs, f"{name}_stand_in").at[warpgroup, :, pl.ds(0, shape[1])]
    return seam.with_accumulator(body, shape, stand_in)


def _visit_all(
    block: Block,
    warpgroup: Array | int,
    accumulator: Any,
    dk_acc: Ref,
    dv_acc: Ref,
) -> tuple[Array, Array]:
    """Every visit of the tile in every head of the group; dK and dV."""
    seam, visit = block.seam, block.visits
    step = partial(visit_block, block, warpgroup, accumulator, dk_acc, dv_acc)

    def masked() -> Array:
        # Where low parts count every visit is, so that the loop of most has less to do.
        return jnp.where(block.in_two, visit.count, visit.masked)

    def all_clear(loop: Any) -> None:
        if block.tiles.queries == ROWS or not block.tiles.in_fragments:
            loop(0, visit.count, masked=False, folds=True)
            return
        some = jnp.where(block.in_two, visit.count, 0)  # in one loop there are too few registers
        loop(0, some, masked=False, folds=True)
        loop(some, visit.count, masked=False, folds=False)

    def over_blocks(start: Any, stop: Any, **kind: bool) -> None:
        def one(n: Array) -> None:
            h, i = block.visit(n)
            step(n, h, i, **kind)

        each(start * block.heads, stop * block.heads, one)

    def over_head(h: Array) -> None:
        def loop(start: Any, stop: Any, **kind: bool) -> None:
            each(start, stop, lambda i: step(h * visit.count + i, h, i, **kind))

        if not block.masked:
            all_clear(loop)
            return
        some = masked()
        loop(0, some, masked=True, folds=True)
        loop(some, visit.count, masked=False, folds=False)

    if block.tiles.in_turns and not block.masked:
        all_clear(over_blocks)
    elif block.tiles.in_turns and (block.spec.band.lower is not None or block.spec.has_segments):
        # Those at both ends need a mask.
        ends = visit.clear_from, visit.clear_to
        if not block.tiles.upward:
            ends = visit.count - visit.clear_to, visit.count - visit.clear_from
        start, stop = (jnp.where(block.in_two, visit.count, x) for x in ends)
        over_blocks(0, start, masked=True, folds=True)
        over_blocks(start, stop, masked=False, folds=False)
        over_blocks(stop, visit.count, masked=True, folds=True)
    elif block.tiles.upward:
        over_blocks(0, masked(), masked=True, folds=True)
        over_blocks(masked(), visit.count, masked=False, folds=False)
    elif block.tiles.heads_inner:
        clear = visit.count - masked()
        over_blocks(0, clear, masked=False, folds=False)
        over_blocks(clear, visit.count, masked=True, folds=True)
    elif block.heads == 1:
        over_head(jnp.int32(0))
    else:
        each(0, block.heads, over_head)
    dk, dv = (seam.wait(acc, in_flight=0) for acc in (dk_acc, dv_acc))
    if block.tiles.late:
        total = visit.count * block.heads
        release(block, total - 1, total > 0)
    return dk, dv
