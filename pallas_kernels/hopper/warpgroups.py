"""The launch of a kernel whose threads are warpgroups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import Array

__all__ = ["run"]


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
