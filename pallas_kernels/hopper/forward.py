"""Attention forward on Hopper (sm_90a), Pallas Mosaic GPU.

    S = Q Kᵀ      P = softmax(S)      O = P V      lse = log sum exp S

(Dao, "FlashAttention-2", 2023; Shah et al., "FlashAttention-3", 2024.) A thread block holds W
compute warpgroups of 64 query rows (`compute.py`) and one that loads (`load.py`). Blocks of keys go
right to left. A block computes one tile, or several by a list or from a counter (`taken.py`), then
without a pause between them:

    loader         Q  K0   K1 V0   K2 V1   ..    Q' K0' Vn  K1' V0' ..
    warpgroup 0       [QK0] soft0 [QK1|PV0] soft1 [QK2|PV1] .. [Q'K0'|PVn] soft0' [Q'K1'|P'V0'] ..
    warpgroup 1         [QK0] soft0 [QK1|PV0] soft1 [QK2|PV1] .. [Q'K0'|PVn] soft0' [Q'K1'|P'V0'] ..
                                                                         write O

In [QKj|PVj-1] both products are in flight; soft j needs QKj alone, but ptxas has most of it wait
for PVj-1 too: it is the other warpgroups' products that run beside it. A list ends with a tile of
which only Q'K0' is computed, for nobody.

Shared memory, with the barriers that guard it (`full`: a copy has landed; `free`: its readers are
done):

    q_smem  (slots, 64, H)         q_full[turn % 2, w], q_free[slot]    slot = (W turn + w) % slots
    k_smem  (stages, keys, H)      k_full[slot], k_free[slot]
    v_smem  (stages, keys, D)      v_full[slot], v_free[slot]
    o_smem  (W, 64, D)             waits for its own warpgroup's copies; or O goes out through the
                                   slot of its Q

Each of them may be several pieces, next to each other (`plain.py`), of which P V is one product
(`wide_products.py`).

Readers set every `free` barrier once before they start, so that the loader waits in the same way
each time, and the loader waits once more for each at the end.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.combine import combine
from pallas_kernels.hopper import bias, dropout, folded_bias
from pallas_kernels.hopper.bias_form import form_of
from pallas_kernels.hopper.compute import compute, value_columns
from pallas_kernels.hopper.constant import constant
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.dense_mask import mask_arrays
from pallas_kernels.hopper.load import copies, load
from pallas_kernels.hopper.masks import Warpgroup
from pallas_kernels.hopper.piece_widths import (
    in_pieces,
    is_latent,
    parts_in_pieces,
    value_pieces,
    whole_or_pieces,
)
from pallas_kernels.hopper.plain import in_both_ways, named, piece_matrices, pieces
from pallas_kernels.hopper.plan import Plan, make_plan
from pallas_kernels.hopper.seam import Ref, Seam, copyable, transforms
from pallas_kernels.hopper.seam import matrix as matrix_of
from pallas_kernels.hopper.segments import segment_arrays
from pallas_kernels.hopper.softmax import unit
from pallas_kernels.hopper.taken import NOTES, WORDS, id_slots, longest_first
from pallas_kernels.hopper.tiles import ROWS, Tiles
from pallas_kernels.hopper.warpgroups import run
from pallas_kernels.portable.triton import load as load_at

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands

__all__ = ["forward", "in_tiles", "takes_halves"]


def forward(
    spec: AttentionSpec,
    operands: Operands,
    *,
    tiles: Tiles | None = None,
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Output (B, T, N, D) in the call's dtype; and `top` and `rest` (B, T, N) float32.

    These are the keys' log-sum-exp, the sinks left out: top `unit` + rest; -inf and 0 of a row that
    sees no key.

    Args:
      spec: the call; `refusals` must be empty for it.
      operands: its arrays; sinks may be (N,) or one row for each batch row, (B, N).
      tiles: tile shapes to use instead of the table's.
      plan: the whole launch, instead of one made from `tiles`.
      interpret: run on a CPU, thread by thread.
    """
    plan = plan or make_plan(spec, tiles, halves=operands.halves is not None)
    if operands.halves is not None:
        assert _takes_halves(plan)
    matrices = {"q": operands.query, "k": operands.key, "v": operands.value}
    inputs: dict[str, Any] = matrices
    if not _by_rows(plan):
        inputs = {name: in_tiles(x) for name, x in matrices.items()}
    if operands.halves is not None:
        own = operands.halves
        inputs |= {"own_q": own.query, "own_k": own.key, "own_v": own.value}
        inputs |= {"second": own.second, "first_heads": own.heads}
    if spec.has_query_lengths:
        inputs["query_lengths"] = operands.query_lengths
    if spec.has_key_lengths:
        inputs["key_lengths"] = operands.key_lengths
    if spec.has_query_offset:
        inputs["query_offset"] = operands.query_offset
    if spec.has_segments:
        inputs |= segment_arrays(plan, operands)
        if plan.longest_first:
            inputs["order"] = longest_first(inputs["ranges"])
    elif plan.counted:
        ends = np.array([[*pair, *clear] for pair, clear in plan.ranges()], np.int32)
        inputs["ranges"] = constant(ends[None])
    if spec.mask_shape is not None:
        inputs |= mask_arrays(plan, operands)
    if operands.scale is not None:
        inputs["scale"] = operands.scale
    inputs |= dropout.dropout_inputs(plan, operands)
    inputs |= bias.bias_arrays(plan, operands)
    if plan.folds:
        inputs |= folded_bias.arrays(plan, inputs["bias"])
    sinks = None
    if operands.sinks is not None:
        sinks = jnp.atleast_2d(operands.sinks).astype(jnp.float32)
        if not plan.in_parts:
            inputs["sinks"] = sinks
    if plan.counted:
        out, sums = _counted(plan, inputs, interpret=interpret)
    else:
        out, sums = _launch(plan, inputs, interpret=interpret)
    if plan.in_parts:
        return combine(
            spec, out, {"sums": sums}, partial(_ends, plan),
            unit=unit(spec), sinks=sinks, interpret=interpret,
            written=partial(_is_written, plan) if plan.share else None,
        )  # fmt: skip
    out = out[..., : spec.queries, :, : spec.value_dim]
    if plan.heads_in_rows:
        top, total = (sums[..., i, :] for i in range(2))
    else:
        top, total = (jnp.swapaxes(sums[..., i, : spec.queries], -2, -1) for i in range(2))
    return out, top, jnp.log(jnp.where(total == 0, 1, total))


def _ends(plan: Plan, refs: Ref, at: tuple[Array, ...], there: Array | None) -> tuple[Array, Array]:
    """What `combine` asks for: maxima of parts and the logarithms of their sums."""
    part, batch, query, head = at
    before, after = (query, head) if plan.heads_in_rows else (head, query)
    top = load_at(refs.sums, (part, batch, before, 0, after), there, -jnp.inf)
    total = load_at(refs.sums, (part, batch, before, 1, after), there)
    return top, jnp.log(jnp.where(total == 0.0, 1.0, total))


def _is_written(plan: Plan, at: tuple[Array, ...]) -> Array:
    """Whether rows have this part, where shares are even."""
    first, stop = plan.part(at[1], at[0])
    return first < stop


def takes_halves(spec: AttentionSpec) -> bool:
    """Whether each half of the queries, and of the keys, can be in an array of its own.

    That is where no copy is of both halves, and no array is padded.
    """
    return _takes_halves(make_plan(spec, halves=True))


def _takes_halves(plan: Plan) -> bool:
    spec = plan.spec
    halves = spec.queries % (2 * ROWS) == 0 and spec.keys % (2 * plan.tiles.keys) == 0
    dims = (spec.head_dim, spec.value_dim)
    whole = all(padded_width(x) == x for x in dims)
    in_place = not _by_rows(plan) or is_latent(spec)
    return halves and whole and plan.pack == 1 and in_place and not plan.heads_in_rows


def _by_rows(plan: Plan) -> bool:
    """Whether matrices are copied as plain rows, but for outputs that are parts."""
    return parts_in_pieces(plan.spec) if plan.in_parts else in_pieces(plan.spec)


def in_tiles(x: Array) -> Array:
    """x (B, rows, heads, columns), padded where the TMA unit's tiles need it: see `copyable`.

    That is rows of no multiple of 8 and columns of fewer than 64 or no multiple of 16; all else is
    read in place.
    """
    rows, columns = x.shape[1], x.shape[3]
    more = (copyable(rows, 8) - rows, padded_width(columns) - columns)
    return x if more == (0, 0) else jnp.pad(x, ((0, 0), (0, more[0]), (0, 0), (0, more[1])))


def _counted(plan: Plan, inputs: dict[str, Array], *, interpret: bool) -> tuple[Array, Array]:
    """What the kernel writes, beside a word that counts the tiles that are taken."""

    def run(refs: tuple[Ref, ...]) -> None:
        counter, *results = refs
        found = _launch(plan, inputs | {"counter": counter}, interpret=interpret)
        for ref, x in zip(results, found, strict=True):
            ref[...] = x

    results = [jnp.zeros(x.shape, x.dtype) for x in _results(plan, inputs)]
    # Not by `new_ref`, whose effect cannot be partitioned.
    _, out, sums = pl.run_state(run)((jnp.zeros(1, jnp.int32), *results))
    return out, sums


def _results(plan: Plan, inputs: dict[str, Array]) -> list[jax.ShapeDtypeStruct]:
    """What the kernel writes."""
    spec = plan.spec
    rows, columns = inputs["q"].shape[1], inputs["v"].shape[3]
    if "own_q" in inputs:
        rows = spec.queries
    out_shape: tuple[int, ...] = (spec.batch, rows, spec.heads, columns)
    # Whole tiles: a copy of one dimension is not cut at the end of a row.
    row_shape: tuple[int, ...] = (spec.batch, spec.heads, 2, plan.query_tiles * plan.queries)
    if plan.heads_in_rows:
        row_shape = (spec.batch, spec.queries, 2, spec.heads)
    out_dtype = spec.dtype
    if plan.in_parts:  # in tiles, whose pieces in float32 would be two
        out_shape = (spec.batch, copyable(rows, 8), spec.heads, padded_width(columns))
        out_shape, row_shape = (plan.splits, *out_shape), (plan.splits, *row_shape)
        out_dtype = jnp.float32
    return [
        jax.ShapeDtypeStruct(out_shape, out_dtype),
        jax.ShapeDtypeStruct(row_shape, jnp.float32),
    ]


def _launch(plan: Plan, inputs: dict[str, Array], *, interpret: bool) -> tuple[Array, Array]:
    tiles, seam = plan.tiles, Seam(interpret)
    out_type = _results(plan, inputs)
    out_dtype, columns = out_type[0].dtype, out_type[0].shape[-1]
    if plan.is_scheduled and not plan.counted:
        inputs = inputs | {"schedule": constant(plan.schedule())}
    names = [*inputs, "out", "sums"]
    by_rows = _by_rows(plan)
    scratch = _scratch(plan, out_dtype, columns, interpret=interpret)
    if by_rows:
        tiled = ("b_smem", *(["o_smem"] if plan.in_parts else []))
        matrices = [name for name in scratch if name.endswith("_smem") and name not in tiled]
        scratch = in_both_ways(scratch, matrices, interpret=interpret)
    if interpret:
        o_columns = value_columns(plan, scratch["v_smem"])
        for name, count in (("s", tiles.keys), ("o", o_columns)):
            shape = (tiles.warpgroups, ROWS, count)
            scratch[f"{name}_stand_in"] = plgpu.SMEM(shape, jnp.float32)

    def kernel(*args: Ref) -> None:
        refs = named(scratch, [*names, *scratch], args)
        for name in [f"{x}_{kind}" for x in "qko" for kind in ("smem", "rows")]:
            if name in vars(refs):
                setattr(refs, name, pieces(refs, name))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < tiles.warpgroups)
        def _() -> None:
            if tiles.registers:
                plgpu.set_max_registers(tiles.registers[0], action="increase")
            if plan.folds:
                folded = folded_bias.is_folded(refs)
                own = partial(compute, plan, seam, refs, Warpgroup(warpgroup))
                pl.when(folded)(partial(own, folded=True))
                pl.when(jnp.logical_not(folded))(own)
            else:
                compute(plan, seam, refs, Warpgroup(warpgroup))

        @pl.when(warpgroup == tiles.warpgroups)
        def _() -> None:
            if tiles.registers:
                plgpu.set_max_registers(tiles.registers[1], action="decrease")
            load(plan, seam, refs)

    out, sums = run(
        kernel,
        inputs,
        out_type=out_type,
        scratch_types=list(scratch.values()),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=tiles.warpgroups + 1,
        # Rows of wgmma's layout are reduced without shared memory.
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            unsafe_no_auto_barriers=_needs_no_barriers(plan) and not interpret,
        ),
        interpret=interpret,
    )
    return out, sums


def _needs_no_barriers(plan: Plan) -> bool:
    """Whether no thread reads shared memory that threads write: values past a length are such."""
    spec = plan.spec
    plain = plan.lengths_known and spec.bias_shape is None and spec.dropout_rate == 0
    return plain and (plan.tiles.own_staging or plan.tiles.from_registers)


def _scratch(
    plan: Plan, out_dtype: Any, columns: int, *, interpret: bool = False
) -> dict[str, Any]:
    spec, tiles = plan.spec, plan.tiles
    w, stages, segments = tiles.warpgroups, tiles.stages, spec.has_segments
    by_rows = _by_rows(plan)
    head, value = (whole_or_pieces(x, pieces=by_rows) for x in (spec.head_dim, spec.value_dim))
    count, width = value_pieces(spec) if by_rows else (1, value[0])

    def matrix(name: str, *shape: int, widths: tuple[int, ...]) -> dict[str, Any]:
        if by_rows:
            return piece_matrices(name, shape, widths, spec.dtype)
        own = transforms(widths[0], spec.dtype)
        return {f"{name}_smem": plgpu.SMEM((*shape, widths[0]), spec.dtype, transforms=own)}

    q_arrivals = copies(plan) * len(head) + segments + (form_of(spec) == "rows")
    scratch = {
        **matrix("q", tiles.query_slots, ROWS, widths=head),
        **matrix("k", stages, tiles.keys, widths=head),
        "v_smem": matrix_of(spec.dtype, stages, *([count] if by_rows else []), tiles.keys, width),
        "q_full": plgpu.Barrier(num_arrivals=q_arrivals, num_barriers=2 * w),
        "q_free": plgpu.Barrier(num_barriers=tiles.query_slots),
        "k_full": plgpu.Barrier(
            num_arrivals=len(head) + segments + plan.folds, num_barriers=stages
        ),
        "k_free": plgpu.Barrier(num_arrivals=w, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=count, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=w, num_barriers=stages),
    }
    if plan.folds:
        scratch |= folded_bias.scratch(plan)
    scratch |= bias.scratch(plan) | dropout.scratch(plan)
    staged = tiles.own_staging or (tiles.from_registers and interpret)
    if staged and by_rows and not plan.in_parts:
        scratch |= matrix("o", w, ROWS, widths=value)
    elif staged:
        own = transforms(columns, out_dtype)
        scratch["o_smem"] = plgpu.SMEM((w, ROWS, columns), out_dtype, transforms=own)
    if tiles.in_turn:
        scratch["turn"] = plgpu.Barrier(num_barriers=w)
    if spec.has_segments:
        scratch["q_segments"] = plgpu.SMEM((tiles.query_slots, ROWS), jnp.int32)
        slots = id_slots(stages) if plan.counted else stages
        scratch["k_segments"] = plgpu.SMEM((slots, tiles.keys), jnp.int32)
    if plan.counted:
        scratch["notes"] = plgpu.SMEM((NOTES * WORDS,), jnp.int32)
        scratch["told"] = plgpu.Barrier(num_barriers=NOTES)
    return scratch
