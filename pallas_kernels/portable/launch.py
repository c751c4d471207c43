"""A kernel's launch: what it reads and writes by name, its programs and their tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import jax
from jax import Array

from pallas_kernels.portable.tiles import Tiles
from pallas_kernels.portable.triton import Ref, call

__all__ = ["Results", "launch"]

type Results = dict[str, Ref]


def launch(
    kernel: Callable[[SimpleNamespace, Results], None],
    inputs: dict[str, Array],
    results: dict[str, jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    tiles: Tiles,
    name: str,
    interpret: bool,
    zeroed: Sequence[str] = (),
) -> dict[str, Array]:
    """Runs `kernel(refs of the inputs, refs of the results)` on every point of the grid.

    grid, zeroed: as `triton.call` has them, results by name.
    """
    given = len(inputs)

    def named(*refs: Ref) -> None:
        own = SimpleNamespace(**dict(zip(inputs, refs[:given], strict=True)))
        kernel(own, dict(zip(results, refs[given:], strict=True)))

    order = list(results)
    found = call(
        named,
        list(results.values()),
        list(inputs.values()),
        grid=grid,
        name=name,
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
        zeroed=[order.index(x) for x in zeroed],
    )
    return dict(zip(results, found, strict=True))
