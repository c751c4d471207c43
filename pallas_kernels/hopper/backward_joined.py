"""All gradients of a short call in one launch: nothing is filled before, nor rounded after.

    thread blocks     0 1 2 ..              the kernel of dK and dV, four products a visit
                      .. blocks - 1         the kernel of dQ, three

Where all of these run at a time, seven products take no longer than the five of the kernel that
adds to dQ, whose zeros, float32 sums and rounding are launches of their own, 1 to 2 us each. No two
thread blocks add to one number: gradients are bitwise the same each time.

The row term of the shortest is made here too, from O and dO, by each of both kernels.

Low parts of log-sum-exps are subtracted from every logit: asking whether they count is two launches
more.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper import backward_kernel, backward_queries
from pallas_kernels.hopper.backward_block import grid_of
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.seam import Ref
from pallas_kernels.hopper.warpgroups import Part, run

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands
    from pallas_kernels.hopper.backward_cut import BackwardTiles

__all__ = ["launch"]


def launch(
    spec: AttentionSpec,
    operands: Operands,
    tiles: BackwardTiles,
    inputs: dict[str, Array],
    *,
    unscaled: float | None,
    interpret: bool,
) -> dict[str, Array]:
    """dk and dv, as `key_gradients` says, and dq (B, T, N, H) in the call's dtype.

    inputs: those of the kernel of dK and dV.
    unscaled: what dS K is multiplied by instead of the scale.
    """
    dims = (padded_width(inputs[name].shape[3]) for name in "qv")
    own = replace(backward_queries.choose_query_tiles(spec, *dims), pieces=tiles.pieces)
    of_keys = backward_kernel.part_of(spec, tiles, inputs, unscaled=None, interpret=interpret)
    of_queries, more = backward_queries.part_of(
        spec, operands, inputs, own, unscaled=unscaled, interpret=interpret
    )
    assert own.warpgroups == tiles.warpgroups
    grid = grid_of(spec, tiles)
    parts = (of_keys, of_queries)
    arrays = {id(x): x for part in parts for x in part.inputs.values()}
    at = {key: i for i, key in enumerate(arrays)}
    places = [{name: at[id(x)] for name, x in part.inputs.items()} for part in parts]
    results = of_keys.results | of_queries.results
    scratch = _scratch(parts, interpret=interpret)
    count = len(arrays)
    parts = (replace(of_keys, inputs={}), replace(of_queries, inputs={}))  # no tracer is kept

    def kernel(*args: Ref) -> None:
        made = dict(zip(results, args[count:], strict=False))
        shared = args[count + len(results) :]
        number = lax.axis_index("block")

        def refs_of(which: int) -> Ref:
            part = parts[which]
            given = {name: args[i] for name, i in places[which].items()}
            own = {name: made[name] for name in part.results}
            return SimpleNamespace(
                **given, **own, **_named(parts, which, shared, interpret=interpret)
            )

        @pl.when(number < grid.count)
        def _() -> None:
            parts[0].body(refs_of(0), lambda: grid.at(number))

        @pl.when(number >= grid.count)
        def _() -> None:
            parts[1].body(refs_of(1), number - grid.count)

    found = run(
        kernel,
        {str(i): x for i, x in enumerate(arrays.values())},
        out_type=list(results.values()),
        scratch_types=scratch,
        grid=(grid.count + more,),
        grid_names=("block",),
        num_threads=tiles.warpgroups + 1,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )
    return dict(zip(results, found, strict=True))


def _scratch(parts: tuple[Part, ...], *, interpret: bool) -> list[Any]:
    """One array of shared memory that is any part's, in each of its views, and all barriers."""
    if interpret:  # which knows no such array
        return [x for part in parts for x in part.scratch.values()]
    barriers = [x for part in parts for x in part.scratch.values() if not _is_memory(x)]
    return [plgpu.RefUnion(*(view for part in parts for view in _views(part))), *barriers]


def _is_memory(kind: Any) -> bool:
    """Whether it is an array in shared memory, not a barrier."""
    return getattr(kind, "memory_space", None) == plgpu.SMEM


def _views(part: Part) -> list[list[Any]]:
    """A part's shared memory as products know it, and as copies do where that is another."""
    memory = {name: x for name, x in part.scratch.items() if _is_memory(x)}
    views = [list(memory.values())]
    if part.both:
        for name in part.both:
            tiles = memory[name]
            memory[name] = plgpu.SMEM(tiles.shape, tiles.dtype, transforms=tiles.transforms[1:])
        views.append(list(memory.values()))
    return views


def _named(
    parts: tuple[Part, ...], which: int, refs: tuple[Ref, ...], *, interpret: bool
) -> dict[str, Ref]:
    """A part's shared memory by name; `x_rows` is what copies name `x_smem`."""
    before = [x for part in parts[:which] for x in part.scratch.values()]
    scratch = parts[which].scratch
    if interpret:
        own = dict(zip(scratch, refs[len(before) :], strict=False))
        rows = own
    else:
        first = sum(len(_views(part)) for part in parts[:which])
        views = list(refs[0])[first : first + len(_views(parts[which]))]
        skipped = 1 + sum(not _is_memory(x) for x in before)
        memory = [name for name, x in scratch.items() if _is_memory(x)]
        barriers = [name for name, x in scratch.items() if not _is_memory(x)]
        own = dict(zip(barriers, refs[skipped:], strict=False))
        rows = dict(zip(memory, views[-1], strict=True))
        own |= dict(zip(memory, views[0], strict=True))
    named = {
        name.removesuffix("smem") + "rows": x for name, x in rows.items() if name.endswith("_smem")
    }
    return own | named
