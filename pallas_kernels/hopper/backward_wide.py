"""Attention backward on Hopper (sm_90a) for wide heads: head dims that sum to more than 256.

    Sᵀ = K Qᵀ          Pᵀ = exp(Sᵀ - lse)              dV = Pᵀ dO
    dPᵀ = V dOᵀ        dSᵀ = Pᵀ (dPᵀ - D)              dK = dSᵀ Q        dQ = dS K

D being the row term, rowsum(O dO) less the gradient of the log-sum-exp. One warpgroup's registers
hold dK or dV of 64 keys, not both. So a thread block has one tile of 64 keys, and its two compute
warpgroups have roles: `value` makes P and dV, `key` makes dS and dK; each makes some columns of dQ.
The value role does so one step late (its first step with a dS of zeros), so that it never waits for
its own P to come back as dS.

    loader    K V Q0 dO0  Q1        dO1             Q2      dO2             ..
    value     [S0] P0 [dV0]  [S1] P1 [dV1 dQ0] [S2] P2 [dV2 dQ1] [S3] ..          write dV
                                          add dQ0           add dQ1
    key       [dP0]  dS0 [dK0 dQ0]  [dP1]  dS1 [dK1 dQ1]  [dP2] ..                write dK
                              add dQ0               add dQ1

Shared memory, with the barriers that guard it (`full`: its content is there; `free`: its readers
are done; both for each slot of a ring):

    k_smem, v_smem          (64, H), (64, D)   kv_full; done: both roles are
    q_smem, lse_smem        (slots, 64, H)     q_full[slot], q_free[slot]
    do_smem, row_term_smem     (slots, 64, D)     do_full[slot], do_free[slot]
    p_smem                  (2, 64, 64)        p_full[slot], p_free[slot]: holds Pᵀ, and then
                                               ds_full[slot]: dSᵀ in its place
    dq_smem                 (2, 64, 64)        waits for its own warpgroup's copy
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.backward_block import WGMMA, Block, banded, each
from pallas_kernels.hopper.backward_tiles import BackwardTiles
from pallas_kernels.hopper.seam import Ref, Seam, transforms
from pallas_kernels.hopper.softmax import logits
from pallas_kernels.hopper.tiles import ROWS, SHARED_MEMORY

if TYPE_CHECKING:
    from jattn.spec import AttentionSpec

__all__ = ["launch"]

VALUE, KEY, LOADER = range(3)  # the warpgroups
RING = 2  # slots of P and dS
PIECE = 64  # columns of dQ that are made and added at once


def launch(
    spec: AttentionSpec,
    tiles: BackwardTiles,
    inputs: dict[str, Array],
    dq: Ref,
    *,
    interpret: bool,
) -> tuple[Array, Array]:
    """dK (B, S, K, H) and dV (B, S, K, D); adds the unscaled dQ to `dq` (B, T, N, H) float32."""
    seam = Seam(interpret)
    head, value = inputs["k"].shape[3], inputs["v"].shape[3]
    if banded(spec):
        inputs = inputs | {"index": jnp.arange(ROWS, dtype=jnp.int32)}
    scratch = _scratch(spec, head, value)
    if interpret:
        pieces = {f"dq{i}": PIECE for i in range(head // PIECE)}
        for name, columns in ({"s": ROWS, "dp": ROWS, "dk": head, "dv": value} | pieces).items():
            scratch[f"{name}_stand_in"] = plgpu.SMEM((ROWS, columns), jnp.float32)
    names = [*inputs, "dq", "dk", "dv", *scratch]

    def kernel(*args: Ref) -> None:
        refs = SimpleNamespace(**dict(zip(names, args, strict=True)))
        if "visitors" in inputs and not interpret:
            shape = (spec.batch, spec.heads, inputs["lse"].shape[2] // ROWS, 2)
            refs.turns = pl.get_global(plgpu.SemaphoreType.REGULAR(shape))
        warpgroup = lax.axis_index("warpgroup")
        block = WideBlock(spec, tiles, seam, refs)

        @pl.when(warpgroup == VALUE)
        def _() -> None:
            plgpu.set_max_registers(240, action="increase")
            _value_role(block)

        @pl.when(warpgroup == KEY)
        def _() -> None:
            plgpu.set_max_registers(240, action="increase")
            _key_role(block)

        @pl.when(warpgroup == LOADER)
        def _() -> None:
            plgpu.set_max_registers(24, action="decrease")
            _load(block)

    rows = inputs["k"].shape[1]
    dk, dv = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((spec.batch, rows, spec.kv_heads, columns), spec.dtype)
            for columns in (head, value)
        ],
        scratch_types=list(scratch.values()),
        grid=(spec.batch, inputs["ranges"].shape[1], spec.kv_heads),
        grid_names=("batch", "tile", "head"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*inputs.values(), dq)
    return dk, dv


def _slots(head: int, value: int) -> tuple[int, int]:
    """Of q_smem and do_smem: two and two where they fit, else two and one."""
    # Head dim 256, causal at 16k: 351 TFLOP/s with one and one, 472 with two and one.
    once = (2 * (head + value) + RING * ROWS + 2 * PIECE * 2) * ROWS * 2
    return 2, 2 if once + (head + value) * ROWS * 2 <= SHARED_MEMORY else 1


def _scratch(spec: AttentionSpec, head: int, value: int) -> dict[str, Any]:
    q_slots, do_slots = _slots(head, value)

    def matrix(*shape: int, dtype: Any = spec.dtype) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], dtype))

    def ring(slots: int, arrivals: int) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots)

    scratch = {
        "k_smem": matrix(ROWS, head),
        "v_smem": matrix(ROWS, value),
        "q_smem": matrix(q_slots, ROWS, head),
        "do_smem": matrix(do_slots, ROWS, value),
        "lse_smem": plgpu.SMEM((q_slots, ROWS), jnp.float32),
        "row_term_smem": plgpu.SMEM((do_slots, ROWS), jnp.float32),
        "p_smem": matrix(RING, ROWS, ROWS),
        "dq_smem": matrix(2, ROWS, PIECE, dtype=jnp.float32),
        "kv_full": plgpu.Barrier(num_arrivals=2 + banded(spec) + spec.has_segments),
        "q_full": ring(q_slots, 2 + spec.has_segments),
        "q_free": ring(q_slots, 2),
        "do_full": ring(do_slots, 2),
        "do_free": ring(do_slots, 2),
        "p_full": ring(RING, 1),
        "p_free": ring(RING, 1),
        "ds_full": ring(RING, 1),
        "done": plgpu.Barrier(num_arrivals=2),
    }
    if banded(spec):
        scratch["index_smem"] = plgpu.SMEM((ROWS,), jnp.int32)
    if spec.has_segments:
        scratch["q_segments"] = plgpu.SMEM((q_slots, ROWS), jnp.int32)
        scratch["k_segments"] = plgpu.SMEM((ROWS,), jnp.int32)
    return scratch


class WideBlock(Block):
    """A thread block whose visits are counted through all heads of the group: steps."""

    def __init__(self, spec: AttentionSpec, tiles: BackwardTiles, seam: Seam, refs: Ref) -> None:
        super().__init__(spec, tiles, seam, refs)
        # A tile without visits adds its zero to some block that exists.
        first = jnp.minimum(self.visits.first, refs.dq.shape[1] // ROWS - 1)
        self.visits = self.visits._replace(first=first)
        self.steps = self.visits.count * spec.group
        self.key_start = self.tile * ROWS
        # Tiles in step would add to the same dQ at once. Without a mask each begins one block later
        # than its neighbour; with one they begin at different blocks anyway.
        rotated = not (banded(spec) or spec.has_segments or self.in_turns)
        self.rotation = lax.rem(self.tile, jnp.maximum(self.visits.count, 1)) if rotated else 0

    def place(self, n: Array) -> tuple[Array, Array]:
        """Head of the group and visit of step n."""
        h, i, count = jnp.int32(0), n, jnp.maximum(self.visits.count, 1)
        if self.spec.group > 1:
            h, i = lax.div(n, count), lax.rem(n, count)
        i = i + self.rotation
        return h, i - jnp.where(i >= count, count, 0)

    def queries(self, n: Array) -> tuple[Array, Any]:
        """Query head and rows of step n."""
        h, i = self.place(n)
        return self.kv_head * self.spec.group + h, pl.ds((self.visits.first + i) * ROWS, ROWS)

    def accumulator(self, body: Any, name: str, columns: int) -> Any:
        """body(accumulator of 64 rows), zero at first."""
        stand_in = getattr(self.refs, f"{name}_stand_in") if self.seam.interpret else None
        return self.seam.with_accumulator(body, (ROWS, columns), stand_in)

    def dq_pieces(self, role: int) -> range:
        """First columns of the role's pieces of dQ; products' columns come by 64."""
        head = self.refs.k_smem.shape[1]
        middle = head // 128 * 64
        return range(0, middle, PIECE) if role == VALUE else range(middle, head, PIECE)

    def add_dq(
        self,
        role: int,
        n: Array,
        slot: Array,
        *,
        when_started_before: Callable[[], None],
        when_made: Callable[[], None],
    ) -> None:
        """dQ of step n: a piece is on its way to global memory while the next is made.

        Of step -1 it is zero, and is added to step 0's block, out of turn.
        The callbacks run once the products started before, and those of dQ, are done.
        """
        refs, seam = self.refs, self.seam
        pieces = self.dq_pieces(role)

        def make(accs: tuple[Ref, ...]) -> None:
            if len(accs) < len(pieces):
                first = pieces[len(accs)]

                def product(acc: Ref) -> None:
                    k = refs.k_smem.at[:, pl.ds(first + PIECE * _hidden_zero(n), PIECE)]
                    seam.matmul_into(acc, refs.p_smem.at[slot].T, k)
                    make((*accs, acc))

                self.accumulator(product, f"dq{first // PIECE}", PIECE)
                return
            seam.drain(len(accs))
            when_started_before()
            for j, acc in enumerate(accs):
                behind = len(accs) - 1 - j
                dq = seam.wait(acc, in_flight=behind)
                if not behind:
                    when_made()
                if self.in_turns and not j:
                    take_turn()
                write(pieces[j], dq)
            if not accs:
                when_made()

        def take_turn() -> None:
            h, i = self.place(n)
            head = self.kv_head * self.spec.group + h
            pl.when(is_step)(lambda: self.take_turn(jnp.int32(role), head, h, i))

        def write(first: int, dq: Array) -> None:
            smem = refs.dq_smem.at[role]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            smem[...] = dq
            plgpu.commit_smem()
            head, rows = self.queries(n)
            seam.add(smem, refs.dq.at[self.batch, rows, head, pl.ds(first, PIECE)])

        is_step, n = n >= 0, jnp.maximum(n, 0)
        make(())

    def end_turn(self, role: int) -> None:
        """Lets the next tile add to the last step's block."""
        if self.in_turns and self.dq_pieces(role):
            head = self.kv_head * self.spec.group + self.spec.group - 1
            self.pass_on(jnp.int32(role), head, self.visits.count - 1)


def _load(block: WideBlock) -> None:
    """K and V once, then Q, dO and what belongs to their rows, each as soon as its slot is free."""
    spec, refs, batch, kv_head = block.spec, block.refs, block.batch, block.kv_head
    keys = pl.ds(block.key_start, ROWS)
    plgpu.copy_gmem_to_smem(refs.k.at[batch, keys, kv_head], refs.k_smem, refs.kv_full)
    plgpu.copy_gmem_to_smem(refs.v.at[batch, keys, kv_head], refs.v_smem, refs.kv_full)
    if banded(spec):
        plgpu.copy_gmem_to_smem(refs.index, refs.index_smem, refs.kv_full)
    if spec.has_segments:
        plgpu.copy_gmem_to_smem(refs.key_segments.at[batch, keys], refs.k_segments, refs.kv_full)
    q_slots, do_slots = refs.q_smem.shape[0], refs.do_smem.shape[0]

    def fetch(n: Array) -> None:
        head, rows = block.queries(n)
        slot = lax.rem(n, q_slots)
        full = refs.q_full.at[slot]
        plgpu.barrier_wait(refs.q_free.at[slot])
        plgpu.copy_gmem_to_smem(refs.q.at[batch, rows, head], refs.q_smem.at[slot], full)
        plgpu.copy_gmem_to_smem(refs.lse.at[batch, head, rows], refs.lse_smem.at[slot], full)
        if spec.has_segments:
            ids = refs.query_segments.at[batch, rows]
            plgpu.copy_gmem_to_smem(ids, refs.q_segments.at[slot], full)
        slot = lax.rem(n, do_slots)
        full = refs.do_full.at[slot]
        plgpu.barrier_wait(refs.do_free.at[slot])
        plgpu.copy_gmem_to_smem(refs.do.at[batch, rows, head], refs.do_smem.at[slot], full)
        plgpu.copy_gmem_to_smem(
            refs.row_term.at[batch, head, rows], refs.row_term_smem.at[slot], full
        )

    each(0, block.steps, fetch)
    for slot in range(q_slots):
        plgpu.barrier_wait(refs.q_free.at[slot])
    for slot in range(do_slots):
        plgpu.barrier_wait(refs.do_free.at[slot])


def _hidden_zero(n: Array) -> Array:
    """A zero that the compiler cannot know: what is computed with it stays inside the loop."""
    return lax.shift_right_logical(n, 24)


def _start(block: WideBlock) -> None:
    refs = block.refs
    for free, smem in (refs.q_free, refs.q_smem), (refs.do_free, refs.do_smem):
        for slot in range(smem.shape[0]):
            plgpu.barrier_arrive(free.at[slot])
    plgpu.barrier_wait(refs.kv_full)


def _value_role(block: WideBlock) -> None:
    """P and dV of the tile, and its columns of dQ, one step late."""
    spec, seam, refs = block.spec, block.seam, block.refs
    q_slots, do_slots = refs.q_smem.shape[0], refs.do_smem.shape[0]

    def over_tile(dv_acc: Ref, s_acc: Ref) -> Array:
        def scores(n: Array) -> None:
            """S of step n, started; past the last step it is of what there is, and not used."""
            slot = lax.rem(n, q_slots)

            @pl.when(n < block.steps)
            def _() -> None:
                plgpu.barrier_wait(refs.q_full.at[slot])

            s_acc[...] = seam.layout(jnp.zeros((ROWS, ROWS), jnp.float32), WGMMA)
            k = refs.k_smem.at[pl.ds(ROWS * _hidden_zero(n), ROWS)]
            seam.matmul_into(s_acc, k, refs.q_smem.at[slot].T)

        def step(n: Array) -> None:
            q_slot, do_slot, slot = lax.rem(n, q_slots), lax.rem(n, do_slots), lax.rem(n, RING)
            s = seam.wait(s_acc, in_flight=0)
            lse = block.row(refs.lse_smem.at[q_slot])
            x, c = logits(spec, s)
            p = jnp.exp2(x * c - lse)
            if block.masked:
                first_query = (block.visits.first + block.place(n)[1]) * ROWS
                p = block.hide(p, 0, first_query, q_slot)
            plgpu.barrier_arrive(refs.q_free.at[q_slot])
            # What dP is multiplied by: the derivative of the logits' softmax, and of their cap.
            factor = p if spec.logits_soft_cap is None else p * (1 - x * x)
            p = p.astype(spec.dtype)
            plgpu.barrier_wait(refs.p_free.at[slot])
            refs.p_smem[slot] = factor.astype(spec.dtype)
            plgpu.barrier_arrive(refs.p_full.at[slot])
            plgpu.barrier_wait(refs.do_full.at[do_slot])
            seam.matmul_into(dv_acc, p, refs.do_smem.at[do_slot])
            do_free = refs.do_free.at[do_slot]
            late_dq(n - 1, lambda: plgpu.barrier_arrive(do_free), lambda: scores(n + 1))

        def late_dq(n: Array, after_dv: Callable[[], None], after_dq: Callable[[], None]) -> None:
            """dQ of step n; of step -1 it is of a dS that is zero."""
            slot = lax.rem(n + RING, RING)
            plgpu.barrier_wait(refs.ds_full.at[slot])
            block.add_dq(VALUE, n, slot, when_started_before=after_dv, when_made=after_dq)

        scores(jnp.int32(0))
        each(0, block.steps, step)
        seam.drain(0)
        late_dq(block.steps - 1, lambda: None, lambda: None)
        block.end_turn(VALUE)
        return seam.wait(dv_acc, in_flight=0)

    _start(block)
    dv = block.accumulator(
        lambda dv_acc: block.accumulator(partial(over_tile, dv_acc), "s", ROWS),
        "dv",
        refs.v_smem.shape[1],
    )
    _finish(block, dv, refs.v_smem, refs.dv)
    for slot in range(RING):
        plgpu.barrier_wait(refs.p_free.at[slot])


def _key_role(block: WideBlock) -> None:
    """dS and dK of the tile, and its columns of dQ."""
    spec, seam, refs = block.spec, block.seam, block.refs
    q_slots, do_slots = refs.q_smem.shape[0], refs.do_smem.shape[0]

    def over_tile(dk_acc: Ref) -> Array:
        def step(n: Array) -> None:
            q_slot, do_slot, slot = lax.rem(n, q_slots), lax.rem(n, do_slots), lax.rem(n, RING)
            q, do, p_smem = refs.q_smem.at[q_slot], refs.do_smem.at[do_slot], refs.p_smem.at[slot]

            def product(dp_acc: Ref) -> Array:
                v = refs.v_smem.at[pl.ds(ROWS * _hidden_zero(n), ROWS)]
                seam.matmul_into(dp_acc, v, do.T)
                return seam.wait(dp_acc, in_flight=0)

            plgpu.barrier_wait(refs.do_full.at[do_slot])
            dp = block.accumulator(product, "dp", ROWS)
            row_term = block.row(refs.row_term_smem.at[do_slot])
            plgpu.barrier_arrive(refs.do_free.at[do_slot])
            plgpu.barrier_wait(refs.p_full.at[slot])
            p = seam.load(p_smem, WGMMA)
            ds = (p.astype(jnp.float32) * (dp - row_term)).astype(spec.dtype)
            p_smem[...] = ds
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs.ds_full.at[slot])
            plgpu.barrier_wait(refs.q_full.at[q_slot])
            seam.matmul_into(dk_acc, ds, q)
            block.add_dq(
                KEY,
                n,
                slot,
                when_started_before=lambda: plgpu.barrier_arrive(refs.q_free.at[q_slot]),
                when_made=lambda: plgpu.barrier_arrive(refs.p_free.at[slot]),
            )

        each(0, block.steps, step)
        block.end_turn(KEY)
        return seam.wait(dk_acc, in_flight=0)

    _start(block)
    # dS of the step before the first, which the value role's late dQ begins with.
    last = refs.p_smem.at[RING - 1]
    last[...] = jnp.zeros((ROWS, ROWS), spec.dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.ds_full.at[RING - 1])
    for slot in range(RING):
        plgpu.barrier_arrive(refs.p_free.at[slot])
    dk = block.accumulator(over_tile, "dk", refs.k_smem.shape[1])
    _finish(block, dk * spec.scale, refs.k_smem, refs.dk)


def _finish(block: WideBlock, gradient: Array, smem: Ref, gmem: Ref) -> None:
    """Writes the role's gradient, in the place of an operand that both roles are done with."""
    plgpu.barrier_arrive(block.refs.done)
    plgpu.barrier_wait(block.refs.done)
    smem[...] = gradient.astype(block.spec.dtype)
    plgpu.commit_smem()
    rows = pl.ds(block.key_start, ROWS)
    plgpu.copy_smem_to_gmem(smem, gmem.at[block.batch, rows, block.kv_head])
    plgpu.wait_smem_to_gmem(0)
