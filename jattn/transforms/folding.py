"""`jax.vmap` of a kernel's call as a call with a larger batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jattn.call.spec import AttentionSpec

__all__ = ["Arrays", "Kernel", "folds_into_batch"]

type Arrays = dict[str, Array]
type Kernel = Callable[[AttentionSpec, Arrays], tuple[Array, ...]]


def folds_into_batch(kernel: Kernel, *, sums_bias: bool = False) -> Kernel:
    """The same function; under `jax.vmap` the mapped axis becomes part of the batch.

    The batch is the first axis of every array. What is not mapped is repeated along it, but for

    - sinks: those may be (N,), for all rows of the batch, and become (B, N) only where mapped;
    - scale: (1,) for all rows, and (B,) only where mapped;
    - a bias or mask: its batch axis may be 1, for all rows. One of T x S is never repeated: the
      mapped axis is gone along in a loop instead.

    sums_bias: the bias's gradient is among the results, which is a sum over all rows where the
      bias has one row for them: then each mapped row needs a bias of its own, or the loop.
    """

    def folding(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        @jax.custom_batching.custom_vmap
        def call(arrays: Arrays) -> tuple[Array, ...]:
            return kernel(spec, arrays)

        @call.def_vmap
        def _(size: int, batched: list[dict[str, bool]], arrays: Arrays) -> tuple[Any, Any]:
            is_batched = batched[0]
            if any(_needs_loop(spec, name, sums_bias, is_batched) for name in arrays):
                shared = {name: x for name, x in arrays.items() if not is_batched[name]}
                mapped = {name: x for name, x in arrays.items() if is_batched[name]}
                each: tuple[Array, ...] = lax.map(lambda own: folding(spec, shared | own), mapped)
                return each, (True,) * len(each)
            folded = {
                name: _fold(name, spec.batch, size, is_batched[name], x)
                for name, x in arrays.items()
            }
            results = folding(_larger(spec, size, folded), folded)
            unfolded = tuple(x.reshape(size, spec.batch, *x.shape[1:]) for x in results)
            return unfolded, (True,) * len(results)

        results: tuple[Array, ...] = call(arrays)
        return results

    return folding


def _needs_loop(
    spec: AttentionSpec, name: str, sums_bias: bool, is_batched: dict[str, bool]
) -> bool:
    """Whether a bias or mask keeps the call from being one with a larger batch."""
    shape = {"bias": spec.bias_shape, "mask": spec.mask_shape}.get(name)
    if shape is None:
        return False
    b, _, t, s = shape
    if is_batched[name] and b == spec.batch:
        return False
    if sums_bias and name == "bias":
        return True
    is_repeated = is_batched[name] or b > 1
    return is_repeated and t > 1 and s > 1


def _larger(spec: AttentionSpec, size: int, folded: Arrays) -> AttentionSpec:
    shapes: dict[str, Any] = {
        f"{name}_shape": folded[name].shape for name in ("bias", "mask") if name in folded
    }
    return replace(spec, batch=size * spec.batch, **shapes)


def _fold(name: str, batch: int, size: int, is_batched: bool, x: Array) -> Array:
    own = x.shape[1:] if is_batched else x.shape
    if name == "sinks":
        if not is_batched and len(own) == 1:
            return x
        x = x if is_batched else x[None]
        rows = x if len(own) == 2 else x[:, None]
        return jnp.broadcast_to(rows, (size, batch, own[-1])).reshape(size * batch, own[-1])
    if name in ("bias", "mask", "scale") and own[0] == 1:
        if not is_batched:
            return x
        x = jnp.broadcast_to(x, (size, batch, *own[1:]))
        own = x.shape[1:]
    x = x if is_batched else jnp.broadcast_to(x, (size, *own))
    return x.reshape(size * batch, *own[1:])
