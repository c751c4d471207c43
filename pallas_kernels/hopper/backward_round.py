"""dQ rounded, from float32 in the order in which the backward kernel's registers held it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels.hopper.backward_tiles import dq_swizzle
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.grid import Grid
from pallas_kernels.hopper.indices import quotient
from pallas_kernels.hopper.instructions import from_fragments, load_fragment
from pallas_kernels.hopper.plain import in_both_ways, named, parts_of, places
from pallas_kernels.hopper.seam import Ref, transforms
from pallas_kernels.hopper.tiles import ROWS
from pallas_kernels.hopper.warpgroups import run

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["in_rows", "rounded"]


def in_rows(spec: AttentionSpec, dq: Array, head: int, words: Array | None = None) -> Array:
    """dq as `rounded` takes it, as (B, rows, N, head) float32."""
    columns = dq.shape[1] // ROWS
    if words is not None:
        visited = jnp.repeat(words, dq.shape[0] // words.shape[0]) != 0
        dq = jnp.where(visited[:, None], dq, 0)
    x = from_fragments(dq, columns)
    x = x.reshape(spec.batch, spec.heads, -1, head // columns, ROWS, columns)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(spec.batch, -1, spec.heads, head)


def rounded(
    spec: AttentionSpec,
    dq: Array,
    shape: tuple[int, int],
    dtype: DTypeLike,
    scale: Array | float,
    words: Array | None = None,
) -> Array:
    """dQ (B, rows, N, head) in this dtype, times the scale.

    dq: (B N blocks parts, 64 columns) float32 in fragment order: of each block of 64 queries, for
      each part of its columns.
    shape: rows, and head. Where rows are no multiple of 8, or the head is less than a matrix's
      columns, only if the parts are one tile wide each.
    scale: a number, or (1 or B,) float32.
    words: int32, one for each block of each head that the kernel had, of 64 queries or more; 0 of
      those that were not stored, which are zeros.
    """
    rows, head = shape
    padded = padded_width(head)
    columns = dq.shape[1] // ROWS
    together = 1  # parts in a row of the array
    if columns > ROWS:
        columns = dq_swizzle(padded) // 2
        together = padded // columns
    parts = padded // columns
    blocks = dq.shape[0] * together // (spec.batch * spec.heads * parts)
    grid = Grid((("batch", spec.batch), ("block", blocks), ("head", spec.heads)))
    in_parts = rows % 8 != 0 or head != padded  # as plain rows, which are cut at both ends
    staged = (parts, ROWS, columns) if in_parts else (ROWS, head)
    own = transforms(staged[-1], dtype)
    scratch = {"staging_smem": plgpu.SMEM(staged, dtype, transforms=own)}
    if in_parts:
        scratch = in_both_ways(scratch, scratch, interpret=False)
    inputs = {"dq": dq} | ({} if isinstance(scale, float) else {"scale": scale})
    if words is not None:
        inputs["words"] = words

    def kernel(*args: Ref) -> None:
        refs = named(scratch, [*inputs, "out", "staging_smem"], args)
        batch, block, of_head = (grid.place()[name] for name in ("batch", "block", "head"))
        factor = scale
        if not isinstance(scale, float):
            factor = refs.scale[batch if scale.shape[0] > 1 else 0]
        number = (batch * spec.heads + of_head) * blocks + block
        first = number * (parts // together)
        place = (batch, pl.ds(block * ROWS, ROWS), of_head)

        def put(made: Callable[[Array], Array]) -> None:
            loaded = []
            for part in range(parts):
                row, start = (first, part * columns * ROWS) if together > 1 else (first + part, 0)
                loaded.append(load_fragment(refs.dq, row, columns, start))
            for part, x in enumerate(loaded):
                own = (part,) if in_parts else (slice(None), pl.ds(part * columns, columns))
                refs.staging_smem[own] = made(x).astype(dtype)

        if words is None:
            put(lambda x: x * factor)
        else:
            of_word = spec.batch * spec.heads * blocks // words.shape[0]
            stored = refs.words[quotient(number, of_word)] != 0
            pl.when(stored)(partial(put, lambda x: x * factor))
            pl.when(jnp.logical_not(stored))(partial(put, jnp.zeros_like))
        plgpu.commit_smem()
        staging = refs.staging_rows
        staged_parts = parts_of(staging) if in_parts else [staging]
        for to, part in places(refs.out, place, staged_parts, batch * 0):
            plgpu.copy_smem_to_gmem(part, to)
        plgpu.wait_smem_to_gmem(0)

    made: Array = run(
        kernel,
        inputs,
        out_type=jax.ShapeDtypeStruct((spec.batch, rows, spec.heads, head), dtype),
        scratch_types=list(scratch.values()),
        **grid.launch,
        num_threads=1,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=False,
    )
    return made
