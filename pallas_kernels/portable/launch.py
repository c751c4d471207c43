"""A kernel's launch: what it reads and writes by name, its programs and their tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import jax
import jax.experimental.pallas.triton as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.portable.tiles import Tiles
from pallas_kernels.portable.triton import Ref, interpreting

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

    A ref is a whole array.

    grid: its first axis changes fastest. It is launched as one axis, the only one that CUDA lets
      grow over 65,535: a batch into which `jax.vmap` is folded may.
    zeroed: the results that are full of zeros before; the rest is undefined.
    """
    zeros = {}
    for result in zeroed:
        # Of this call's own zero: of one, XLA makes the zeros of all calls together.
        zero = jnp.zeros((), results[result].dtype)
        zero, inputs = lax.optimization_barrier((zero, inputs))
        zeros[result] = jnp.broadcast_to(zero, results[result].shape)
    given, order = len(inputs), list(results)

    def body(*refs: Ref) -> None:
        own = SimpleNamespace(**dict(zip(inputs, refs[:given], strict=True)))
        made = dict(zip(results, refs[given + len(zeros) :], strict=True))
        with interpreting(interpret):
            kernel(own, made)

    body.__name__ = name
    found: Sequence[Array] = pl.pallas_call(
        body,
        out_shape=list(results.values()),
        grid=(math.prod(grid),),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        input_output_aliases={given + i: order.index(result) for i, result in enumerate(zeros)},
        interpret=interpret,
        name=name,
    )(*inputs.values(), *zeros.values())
    return dict(zip(results, found, strict=True))
