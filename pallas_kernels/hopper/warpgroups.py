"""The launch of a kernel whose threads are warpgroups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import Array, ShapeDtypeStruct, lax
from jax.experimental import pallas as pl

__all__ = ["Part", "Role", "run", "run_roles"]

type Role = Callable[[], None]


@dataclass(frozen=True)
class Part:
    """A kernel, or part of one: what some of its thread blocks do.

    inputs, results, scratch: arrays, what is written, and shared memory, by name.
    both: names of shared memory that copies know as plain rows (`plain.py`).
    body: given all of these by name, and what says which thread block it is, what it does.
    """

    inputs: dict[str, Array]
    results: dict[str, ShapeDtypeStruct]
    scratch: dict[str, Any]
    both: tuple[str, ...]
    body: Callable[[Any, Any], None]


def run(
    kernel: Callable[..., None], inputs: dict[str, Array], *, interpret: bool, **options: Any
) -> Any:
    """What the kernel writes; `options` are `plgpu.kernel`'s."""
    call = plgpu.kernel(
        kernel,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        **options,
    )
    # `plgpu.kernel` keeps its arguments with the scope of its scratch memory, which
    # `jax.checking_leaks` takes for a leak, whatever the kernel (jax 0.11.2 and 0.12.0.1).
    with jax.check_tracer_leaks(False):
        return call(*inputs.values())


def run_roles(
    roles: Callable[[Any, Array], tuple[Role, Role]],
    inputs: dict[str, Array],
    results: dict[str, ShapeDtypeStruct],
    scratch: dict[str, Any],
    *,
    warpgroups: int,
    registers: tuple[int, int] | None,
    **options: Any,
) -> list[Array]:
    """The results of a kernel whose warpgroups compute, but one that loads for them.

    Args:
      roles: given all that the kernel has by name, and the number of the warpgroup, what it does
        if it computes and what if it loads; what is worked out before is for both.
      inputs: arrays by name.
      results: what is written, by name.
      scratch: shared memory by name.
      warpgroups: how many compute.
      registers: of a thread that computes and of one that loads; None for as many as others.
      **options: `run`'s.
    """
    names = [*inputs, *results, *scratch]

    def kernel(*args: Any) -> None:
        refs = SimpleNamespace(**dict(zip(names, args, strict=True)))
        warpgroup = lax.axis_index("warpgroup")
        compute, load = roles(refs, warpgroup)

        @pl.when(warpgroup < warpgroups)
        def _() -> None:
            if registers:
                plgpu.set_max_registers(registers[0], action="increase")
            compute()

        @pl.when(warpgroup == warpgroups)
        def _() -> None:
            if registers:
                plgpu.set_max_registers(registers[1], action="decrease")
            load()

    found: list[Array] = run(
        kernel,
        inputs,
        out_type=list(results.values()),
        scratch_types=list(scratch.values()),
        num_threads=warpgroups + 1,
        **options,
    )
    return found
