"""`jax.vmap` of a kernel's call as a call with a larger batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jattn.spec import AttentionSpec

__all__ = ["Arrays", "Kernel", "folds_into_batch"]

type Arrays = dict[str, Array]
type Kernel = Callable[[AttentionSpec, Arrays], tuple[Array, ...]]


def folds_into_batch(kernel: Kernel) -> Kernel:
    """The same function; under `jax.vmap` the mapped axis becomes part of the batch.

    The batch is the first axis of every array. What is not mapped is repeated along it, sinks
    excepted: those may be (N,), for all rows of the batch, and become (B, N) only where they are
    mapped.
    """

    def folding(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        @jax.custom_batching.custom_vmap
        def call(arrays: Arrays) -> tuple[Array, ...]:
            return kernel(spec, arrays)

        @call.def_vmap
        def _(size: int, batched: list[dict[str, bool]], arrays: Arrays) -> tuple[Any, Any]:
            larger = replace(spec, batch=size * spec.batch)
            folded = {
                name: _fold(name, spec.batch, size, batched[0][name], x)
                for name, x in arrays.items()
            }
            results = folding(larger, folded)
            unfolded = tuple(x.reshape(size, spec.batch, *x.shape[1:]) for x in results)
            return unfolded, (True,) * len(results)

        results: tuple[Array, ...] = call(arrays)
        return results

    return folding


def _fold(name: str, batch: int, size: int, is_batched: bool, x: Array) -> Array:
    own = x.shape[1:] if is_batched else x.shape
    if name == "sinks":
        if not is_batched and len(own) == 1:
            return x
        x = x if is_batched else x[None]
        rows = x if len(own) == 2 else x[:, None]
        return jnp.broadcast_to(rows, (size, batch, own[-1])).reshape(size * batch, own[-1])
    x = x if is_batched else jnp.broadcast_to(x, (size, *own))
    return x.reshape(size * batch, *own[1:])
