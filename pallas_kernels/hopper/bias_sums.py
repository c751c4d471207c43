"""The Hopper kernel for the gradient of a bias that batch rows or heads share.

    d_bias = sum over what shares it of dS      S = Q Kᵀ      P = exp(S + bias - lse)
                                                dP = dO Vᵀ    dS = P (dP - D)

A thread block has a tile of the gradient, 128 queries by `keys`, and makes S and dP of each that
shares it in turn, so that the sum stays in float32 registers and is rounded once, in a fixed order.
That is two products more than the other gradients need, whose operands come from L2: the wider the
tile, the fewer times. The tile of the bias is read once, and the sum goes out through it.

    loader         bias  Q0 dO0  K0 V0 chunk 0  chunk 1 ..  Q1 dO1  K1 V1 chunk 0 ..
    warpgroup 0                    [S|dP]  +dS  [S|dP]  +dS ..        [S|dP]  +dS     write
    warpgroup 1                      [S|dP]  +dS  [S|dP]  +dS ..        [S|dP]  +dS     write

Warpgroups take turns: one's products start when the other's S is done, so that they run beside its
softmax; and each has queries of its own, which the next sharer's replace when it is done with them.

Shared memory, with the barriers that guard it (`full`: a copy has landed; `free`: its readers are
done), for 2 warpgroups and chunks of 64 keys:

    b_smem                    (chunks, 128, 64)                   b_full
    q_smem, do_smem           (sharers, 128, H), (.., 128, D)     q_full[2 slot + w], q_free[..]
    rows_smem                 (sharers, 2, 3, 64)
    k_smem, v_smem            (stages, 64, H), (stages, 64, D)    k_full[slot], k_free[slot]
    nothing                                                       turn[w]

Where thread blocks are few beside what shares the bias, each tile is shared out to `parts` of them,
whose sums are added afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.backward_block import HIGH, LOW, ROW_TERM
from pallas_kernels.hopper.bias import whole
from pallas_kernels.hopper.bias_form import d_bias_sharers
from pallas_kernels.hopper.constant import constant
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.indices import divided, for_each, quotient, remainder
from pallas_kernels.hopper.masks import Steps, Warpgroup, hide, steps_of
from pallas_kernels.hopper.plan import Plan, Work
from pallas_kernels.hopper.seam import Ref, Seam, matrix, ring, transforms
from pallas_kernels.hopper.segments import segment_arrays
from pallas_kernels.hopper.softmax import LN2, LOG2E, across, logits, scale_of
from pallas_kernels.hopper.sum_tiles import (
    CHUNK,
    QUERIES,
    WARPGROUPS,
    SumTiles,
    choose_sum_tiles,
)
from pallas_kernels.hopper.tiles import ROWS, Tiles
from pallas_kernels.hopper.visits import edge_padded
from pallas_kernels.hopper.warpgroups import run

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands

__all__ = ["launch"]

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # one value a query
REGISTERS = 240, 24  # of a compute and of the loading thread, see `tiles`

type Sums = tuple[Array, ...]


def launch(
    spec: AttentionSpec,
    operands: Operands,
    inputs: dict[str, Array],
    *,
    tiles: SumTiles | None = None,
    interpret: bool,
) -> Array:
    """The gradient (rows, N or 1, T, S) in the bias's dtype, T and S in sizes that can be copied.

    inputs: as `backward_queries.launch` takes them, with log-sum-exps natural; and `dq`, which is
      not read: this kernel runs when it is made.
    """
    seam = Seam(interpret)
    head, value = inputs["q"].shape[3], inputs["v"].shape[3]
    tiles = tiles or choose_sum_tiles(spec)
    plan = Plan(spec, Tiles(WARPGROUPS, CHUNK, 1, query_slots=1), pack=1, splits=1, blocks=1)
    assert operands.bias is not None
    rows, heads, _ = d_bias_sharers(spec)
    key_tiles = -(-spec.keys // tiles.keys)
    inputs = {name: inputs[name] for name in ("q", "k", "v", "do", "rows", "dq")}
    inputs |= {"bias": whole(spec, operands.bias), "zero": constant(np.zeros(1, np.int32))}
    for name in ("query_lengths", "key_lengths", "query_offset"):
        if getattr(operands, name) is not None:
            inputs[name] = getattr(operands, name)
    if spec.has_segments:
        inputs |= segment_arrays(plan, operands)
        inputs["key_segments"] = edge_padded(operands.key_segments, key_tiles * tiles.keys)
    if operands.scale is not None:
        inputs["scale"] = operands.scale
    scratch = _scratch(spec, tiles, head, value)
    scratch |= seam.stand_ins(dict.fromkeys(("s", "dp"), (WARPGROUPS, ROWS, CHUNK)))
    if tiles.parts > 1:
        whole_tiles = plan.query_tiles * QUERIES, key_tiles * tiles.keys
        out_type = jax.ShapeDtypeStruct((tiles.parts, rows, heads, *whole_tiles), jnp.float32)
    else:
        shape = (rows, heads, *inputs["bias"].shape[2:])
        out_type = jax.ShapeDtypeStruct(shape, spec.bias_dtype)
    names = [*inputs, "d_bias", *scratch]

    def kernel(*args: Ref) -> None:
        refs = SimpleNamespace(**dict(zip(names, args, strict=True)))
        warpgroup = lax.axis_index("warpgroup")
        tile = Tile.of(plan, tiles, seam, refs, key_tiles)

        @pl.when(warpgroup < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            tile.compute(Warpgroup(warpgroup))

        @pl.when(warpgroup == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS[1], action="decrease")
            tile.load()

    found: Array = run(
        kernel,
        inputs,
        out_type=out_type,
        scratch_types=list(scratch.values()),
        grid=(rows * heads * plan.query_tiles * key_tiles * tiles.parts,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )
    return found.sum(axis=0).astype(spec.bias_dtype) if tiles.parts > 1 else found


def _scratch(spec: AttentionSpec, tiles: SumTiles, head: int, value: int) -> dict[str, Any]:
    own, stages, dtype = tiles.sharers, tiles.stages, spec.dtype
    assert spec.bias_dtype is not None
    scratch = {
        "b_smem": plgpu.SMEM(
            (tiles.chunks, QUERIES, CHUNK),
            spec.bias_dtype,
            transforms=transforms(padded_width(spec.keys), spec.bias_dtype),
        ),
        "q_smem": matrix(dtype, own, QUERIES, head),
        "do_smem": matrix(dtype, own, QUERIES, value),
        "k_smem": matrix(dtype, stages, CHUNK, head),
        "v_smem": matrix(dtype, stages, CHUNK, value),
        "rows_smem": plgpu.SMEM((own, WARPGROUPS, 3, ROWS), jnp.float32),
        "b_full": plgpu.Barrier(num_arrivals=tiles.chunks),
        "q_full": ring(own * WARPGROUPS, 3 + spec.has_segments),
        "q_free": ring(own * WARPGROUPS, 1),
        "k_full": ring(stages, 2 + spec.has_segments),
        "k_free": ring(stages, WARPGROUPS),
        "turn": ring(WARPGROUPS, 1),
    }
    if spec.has_segments:
        scratch["q_segments"] = plgpu.SMEM((own, WARPGROUPS, ROWS), jnp.int32)
        scratch["k_segments"] = plgpu.SMEM((stages, CHUNK), jnp.int32)
    return scratch


@dataclass(frozen=True)
class Tile:
    """A tile of the gradient, and those of its sharers that are this thread block's.

    first_query, first_key: where it begins.
    first, count: its sharers, of all heads of one batch row after another.
    """

    plan: Plan
    tiles: SumTiles
    seam: Seam
    refs: Ref
    part: Array
    own_row: Array
    own_head: Array
    first_query: Array
    first_key: Array
    first: Array
    count: Array

    @staticmethod
    def of(plan: Plan, tiles: SumTiles, seam: Seam, refs: Ref, key_tiles: int) -> Tile:
        """That of this thread block: side by side are tiles of one head."""
        _, heads, sharers = d_bias_sharers(plan.spec)
        rest, part = divided(lax.axis_index("block"), tiles.parts)
        rest, j = divided(rest, key_tiles)
        rest, i = divided(rest, plan.query_tiles)
        # The longest of a causal call come first.
        i = plan.query_tiles - 1 - i
        own_row, own_head = divided(rest, heads)
        first, stop = (quotient((part + k) * sharers, tiles.parts) for k in range(2))
        at = i * QUERIES, j * tiles.keys
        return Tile(plan, tiles, seam, refs, part, own_row, own_head, *at, first, stop - first)

    def work(self, n: Array) -> Work:
        """The n-th sharer's."""
        spec = self.plan.spec
        heads = spec.heads if self.refs.bias.shape[1] == 1 else 1
        turn, head = divided(self.first + n, heads)
        head = self.own_head + head
        batch = spec.rows("d_bias").member(self.own_row, turn)
        tile = quotient(self.first_query, QUERIES)
        kv_head = quotient(head, spec.group)
        return Work(batch, head, kv_head, self.first_query, jnp.int32(0), tile)

    def sees(self, work: Work) -> tuple[Array, Array]:
        """Whether some query of a sharer's tile sees a key of it, and whether all see all."""
        steps = steps_of(self.plan, self.refs, work)
        start = quotient(self.first_key, CHUNK)
        stop = start + self.tiles.chunks
        none = jnp.asarray(steps.empty)
        some = ~none & (start < steps.stop) & (stop > steps.stop - steps.visits)
        clear = (stop <= steps.stop - steps.clear_from) & (start >= steps.stop - steps.clear_to)
        return some, some & clear

    def for_each_sharer[State](
        self, visit: Callable[..., State], state: State
    ) -> tuple[Array, State]:
        """State = visit(turn, sharer, state, masked=) of all that see some of the tile.

        Turns are counted from 0. With them comes the last state.
        """
        plan, zero = self.plan, jnp.int32(0)
        if not plan.masked:
            clear_step = self._step(visit, masked=False)
            return self.count, for_each(0, self.count, clear_step, state)
        if plan.lengths_known:
            some, clear = self.sees(self.work(zero))
            for masked, turns in ((True, some & ~clear), (False, clear)):
                count = jnp.where(turns, self.count, zero)
                state = for_each(0, count, self._step(visit, masked=masked), state)
            return jnp.where(some, self.count, zero), state

        def one(n: Array, carried: tuple[Array, State]) -> tuple[Array, State]:
            turns = self.sees(self.work(n))[0].astype(jnp.int32)

            def step(_: Array, carried: tuple[Array, State]) -> tuple[Array, State]:
                turn, state = carried
                return turn + 1, visit(turn, n, state, masked=True)

            return for_each(0, turns, step, carried)

        return for_each(0, self.count, one, (zero, state))

    @staticmethod
    def _step[State](
        visit: Callable[..., State], *, masked: bool
    ) -> Callable[[Array, State], State]:
        """A step in which the turn is the sharer's number."""
        return lambda n, state: visit(n, n, state, masked=masked)

    def load(self) -> None:
        """The bias's tile once, then each sharer's operands, as soon as their slots are free."""
        spec, refs, tiles = self.plan.spec, self.refs, self.tiles
        bias_row = spec.rows("bias").row(self.work(jnp.int32(0)).batch)
        queries = pl.ds(self.first_query, QUERIES)
        for c in range(tiles.chunks):
            at = (bias_row, self.own_head, queries, pl.ds(self.first_key + c * CHUNK, CHUNK))
            plgpu.copy_gmem_to_smem(refs.bias.at[at], refs.b_smem.at[c], refs.b_full)
        self.for_each_sharer(self._fetch, jnp.int32(0))
        for slot in range(tiles.sharers * WARPGROUPS):
            plgpu.barrier_wait(refs.q_free.at[slot])
        for slot in range(tiles.stages):
            plgpu.barrier_wait(refs.k_free.at[slot])

    def _fetch(self, turn: Array, n: Array, state: Array, *, masked: bool) -> Array:
        """A sharer's on their way; beside one alone, what needs none of its slots comes before."""
        refs, tiles, work = self.refs, self.tiles, self.work(n)
        early = min(tiles.stages, tiles.chunks) - 1 if tiles.sharers == 1 else 0
        for c in range(tiles.chunks):
            if c == early:
                self._fetch_queries(work, remainder(turn, tiles.sharers))
            slot = remainder(turn * tiles.chunks + c, tiles.stages)
            full, keys = refs.k_full.at[slot], pl.ds(self.first_key + c * CHUNK, CHUNK)
            plgpu.barrier_wait(refs.k_free.at[slot])
            for gmem, smem in ((refs.k, refs.k_smem), (refs.v, refs.v_smem)):
                own = gmem.at[work.batch, keys, work.kv_head]
                plgpu.copy_gmem_to_smem(own, smem.at[slot], full)
            if self.plan.spec.has_segments:
                ids = refs.key_segments.at[work.batch, keys]
                plgpu.copy_gmem_to_smem(ids, refs.k_segments.at[slot], full)
        return state

    def _fetch_queries(self, work: Work, slot: Array) -> None:
        refs, size = self.refs, self.refs.rows.shape[-1]
        for w in range(WARPGROUPS):
            full = refs.q_full.at[slot * WARPGROUPS + w]
            plgpu.barrier_wait(refs.q_free.at[slot * WARPGROUPS + w])
            rows, mine = pl.ds(work.query + w * ROWS, ROWS), pl.ds(w * ROWS, ROWS)
            for gmem, smem in ((refs.q, refs.q_smem), (refs.do, refs.do_smem)):
                own = gmem.at[work.batch, rows, work.head]
                plgpu.copy_gmem_to_smem(own, smem.at[slot, mine], full)
            block = quotient(work.query, size) + w * ROWS // size
            own = refs.rows.at[work.batch, work.head, block, :, pl.ds(w * ROWS % size, ROWS)]
            plgpu.copy_gmem_to_smem(own, refs.rows_smem.at[slot, w], full)
            if self.plan.spec.has_segments:
                ids = refs.query_segments.at[work.batch, pl.ds(work.query + w * ROWS, ROWS)]
                plgpu.copy_gmem_to_smem(ids, refs.q_segments.at[slot, w], full)

    def compute(self, warpgroup: Warpgroup) -> None:
        """The sum of this warpgroup's 64 queries, and its way to the gradient."""
        refs, tiles, seam = self.refs, self.tiles, self.seam
        number = warpgroup.number
        for slot in range(tiles.sharers):
            plgpu.barrier_arrive(refs.q_free.at[slot * WARPGROUPS + number])
        for slot in range(tiles.stages):
            plgpu.barrier_arrive(refs.k_free.at[slot])
        pl.when(number == WARPGROUPS - 1)(lambda: plgpu.barrier_arrive(refs.turn.at[0]))
        plgpu.barrier_wait(refs.b_full)

        def visit(turn: Array, n: Array, sums: Sums, *, masked: bool) -> Sums:
            return self._plus(warpgroup, turn, n, sums, masked=masked)

        zero = seam.layout(jnp.zeros((ROWS, CHUNK), jnp.float32), WGMMA)
        _, sums = self.for_each_sharer(visit, (zero,) * tiles.chunks)
        pl.when(number == 0)(lambda: plgpu.barrier_wait(refs.turn.at[0]))
        self._store(warpgroup, sums)

    def _plus(
        self, warpgroup: Warpgroup, turn: Array, n: Array, sums: Sums, *, masked: bool
    ) -> Sums:
        """The sums and what a sharer adds to each chunk's."""
        spec, refs, tiles, seam = self.plan.spec, self.refs, self.tiles, self.seam
        work = self.work(n)
        scale = scale_of(spec, refs, work.batch)
        q_slot = remainder(turn, tiles.sharers)
        number = warpgroup.number
        following = remainder(number + 1, WARPGROUPS)
        plgpu.barrier_wait(refs.q_full.at[q_slot * WARPGROUPS + number])
        mine = pl.ds(warpgroup.number * ROWS, ROWS)
        # As the element mask looks for segment ids: those of this sharer.
        its = SimpleNamespace(**vars(refs))
        if spec.has_segments:
            its.q_segments = refs.q_segments.at[q_slot]

        def row(which: int) -> Array:
            smem = refs.rows_smem.at[q_slot, warpgroup.number, which]
            return across(seam.load(smem, ROW), CHUNK)

        def added(slot: Array, c: int, total: Array, s_acc: Ref, dp_acc: Ref) -> Array:
            # A zero that the compiler cannot know: else it keeps each product's address of rows.
            hidden = (turn * tiles.chunks + c) * refs.zero[0]
            own = pl.ds((warpgroup.number + hidden) * ROWS, ROWS)
            seam.matmul_into(s_acc, refs.q_smem.at[q_slot, own], refs.k_smem.at[slot].T)
            seam.matmul_into(dp_acc, refs.do_smem.at[q_slot, own], refs.v_smem.at[slot].T)
            s = seam.layout(seam.wait(s_acc, in_flight=1), WGMMA)
            plgpu.barrier_arrive(refs.turn.at[following])
            x, base = logits(spec, scale, s)
            factor = base * LN2
            x = x if factor == 1.0 else x * factor
            x = x + seam.widened(seam.load(refs.b_smem.at[c, mine], WGMMA))
            if masked:
                alone = Steps(quotient(self.first_key, CHUNK) + c + 1, 1, 0, 0, empty=False)
                x = hide(self.plan, seam, its, work, alone, warpgroup, x, 0, slot)
            p = jnp.exp2((x - row(HIGH)) * LOG2E - row(LOW))
            row_term = row(ROW_TERM)
            dp = seam.layout(seam.wait(dp_acc, in_flight=0), WGMMA)
            plgpu.barrier_arrive(refs.k_free.at[slot])
            if c == tiles.chunks - 1:
                plgpu.barrier_arrive(refs.q_free.at[q_slot * WARPGROUPS + number])
            # A hidden value may be so large that dP is infinite.
            if tiles.chunks > 2:  # an addition in place would spill
                return total + jnp.where(p == 0, 0.0, p * (dp - row_term))
            return jnp.where(p == 0, total, total + p * (dp - row_term))

        found = []
        for c, total in enumerate(sums):
            slot = remainder(turn * tiles.chunks + c, tiles.stages)
            plgpu.barrier_wait(refs.k_full.at[slot])
            plgpu.barrier_wait(refs.turn.at[number])
            found.append(self._accumulated(warpgroup, partial(added, slot, c, total)))
        return tuple(found)

    def _accumulated(self, warpgroup: Warpgroup, body: Callable[[Ref, Ref], Array]) -> Array:
        """body of the accumulators of S and dP."""
        seam, shape = self.seam, (ROWS, CHUNK)
        stand_ins: list[Any] = [None, None]
        if seam.interpret:
            own = (self.refs.s_stand_in, self.refs.dp_stand_in)
            stand_ins = [x.at[warpgroup.number] for x in own]
        found: Array = seam.with_accumulator(
            lambda s: seam.with_accumulator(partial(body, s), shape, stand_ins[1]),
            shape,
            stand_ins[0],
        )
        return found

    def _store(self, warpgroup: Warpgroup, sums: Sums) -> None:
        refs, spec = self.refs, self.plan.spec
        rows = pl.ds(self.first_query + warpgroup.number * ROWS, ROWS)
        mine = pl.ds(warpgroup.number * ROWS, ROWS)
        places = [pl.ds(self.first_key + c * CHUNK, CHUNK) for c in range(self.tiles.chunks)]
        if self.tiles.parts > 1:
            for keys, total in zip(places, sums, strict=True):
                refs.d_bias[self.part, self.own_row, self.own_head, rows, keys] = total
            return
        assert spec.bias_dtype is not None
        for c, total in enumerate(sums):
            refs.b_smem[c, mine] = total.astype(spec.bias_dtype)
        plgpu.commit_smem()
        for c, keys in enumerate(places):
            # One wholly past the end would come to lie upon the first where there are no others.
            inside = (rows.start < refs.d_bias.shape[2]) & (keys.start < refs.d_bias.shape[3])
            pl.when(inside)(partial(self._send, refs.b_smem.at[c, mine], rows, keys))
        plgpu.wait_smem_to_gmem(0)

    def _send(self, smem: Ref, rows: Any, keys: Any) -> None:
        gmem = self.refs.d_bias.at[self.own_row, self.own_head, rows, keys]
        plgpu.copy_smem_to_gmem(smem, gmem)
