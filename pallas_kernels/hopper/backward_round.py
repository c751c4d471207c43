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
from pallas_kernels.hopper.grid import Grid
from pallas_kernels.hopper.instructions import from_fragments, load_fragment
from pallas_kernels.hopper.plain import in_both_ways, named
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
    shape: rows, and head; of no multiple of 8 rows only where the parts are one tile wide each.
    scale: a number, or (1 or B,) float32.
    words: (B N blocks,) int32, 0 of blocks that were not stored, which are zeros.
    """
    rows, head = shape
    columns = dq.shape[1] // ROWS
    together = 1  # parts in a row of the array
    if columns > ROWS:
        columns = dq_swizzle(head) // 2
        together = head // columns
    parts = head // columns
    blocks = dq.shape[0] * together // (spec.batch * spec.heads * parts)
    grid = Grid((("batch", spec.batch), ("block", blocks), ("head", spec.heads)))
    ragged = rows % 8 != 0
    staged = (parts, ROWS, columns) if ragged else (ROWS, head)
    own = transforms(staged[-1], dtype)
    scratch = {"staging_smem": plgpu.SMEM(staged, dtype, transforms=own)}
    if ragged:
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
        out = refs.out.at[batch, pl.ds(block * ROWS, ROWS), of_head]

        def put(made: Callable[[Array], Array]) -> None:
            loaded = []
            for part in range(parts):
                row, place = (first, part * columns * ROWS) if together > 1 else (first + part, 0)
                loaded.append(load_fragment(refs.dq, row, columns, place))
            for part, x in enumerate(loaded):
                own = (part,) if ragged else (slice(None), pl.ds(part * columns, columns))
                refs.staging_smem[own] = made(x).astype(dtype)

        if words is None:
            put(lambda x: x * factor)
        else:
            stored = refs.words[number] != 0
            pl.when(stored)(partial(put, lambda x: x * factor))
            pl.when(jnp.logical_not(stored))(partial(put, jnp.zeros_like))
        plgpu.commit_smem()
        if not ragged:
            plgpu.copy_smem_to_gmem(refs.staging_rows, out)
        for part in range(parts if ragged else 0):
            own_columns = out.at[:, pl.ds(part * columns, columns)]
            plgpu.copy_smem_to_gmem(refs.staging_rows.at[part], own_columns)
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
