"""`jax.vmap` of a call as a call with a larger batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jattn.call.rows import Rows
from jattn.call.spec import AttentionSpec
from jattn.transforms import sharding

__all__ = ["Arrays", "Kernel", "batched_call", "operand_of"]

type Arrays = dict[str, Array]
type Kernel = Callable[[AttentionSpec, Arrays], tuple[Array, ...]]


def batched_call(
    kernel: Kernel,
    spec: AttentionSpec,
    size: int,
    arrays: Arrays,
    is_batched: dict[str, bool],
    *,
    sums_bias: bool = False,
    directions: int = 1,
) -> tuple[Array, ...]:
    """`jax.vmap` of a call along the first axis of those arrays that are batched, of this size.

    The batch is the first axis of every array, and what is not mapped is repeated along it, but for

    - sinks: those may be (N,), for all rows of the batch, and become (B, N) only where mapped;
    - a bias or mask, which is read where it is: `AttentionSpec.rows` says which row of it.

    directions: those of the larger call.
    """
    if size == 0:
        return _of_no_calls(kernel, spec, arrays, is_batched)
    rows: dict[str, Rows] = {
        name: spec.rows(name).within(size, own=is_batched[name])
        for name in arrays
        if operand_of(name) in ("bias", "mask")
    }
    if sums_bias:
        rows["d_bias"] = spec.rows("d_bias").within(size, own=True)
    folded = {
        name: _folded(name, spec.batch, size, x, is_batched=is_batched[name])
        for name, x in arrays.items()
    }
    shapes: dict[str, Any] = {
        f"{name}_shape": folded[name].shape for name in ("bias", "mask") if name in folded
    }
    larger = replace(
        spec, batch=size * spec.batch, directions=directions, mapped_rows=tuple(rows.items()),
        **shapes,
    )  # fmt: skip
    return tuple(x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in kernel(larger, folded))


def operand_of(name: str) -> str:
    """The operand of which this is a tangent, or the name itself."""
    return name.removeprefix("t_").removeprefix("u_")


def _of_no_calls(
    kernel: Kernel, spec: AttentionSpec, arrays: Arrays, is_batched: dict[str, bool]
) -> tuple[Array, ...]:
    """What comes of mapping over an axis of size 0: as many of what one call gives."""

    def one() -> tuple[Array, ...]:
        own = {
            name: jnp.zeros(x.shape[1:] if is_batched[name] else x.shape, x.dtype)
            for name, x in arrays.items()
        }
        return kernel(spec, sharding.varying_as(own, arrays))

    none = tuple(jnp.zeros((0, *x.shape), x.dtype) for x in jax.eval_shape(one))
    return sharding.varying_as(none, arrays)


def _folded(name: str, batch: int, size: int, x: Array, *, is_batched: bool) -> Array:
    own = x.shape[1:] if is_batched else x.shape
    name = operand_of(name)
    if name in ("bias", "mask"):
        return x.reshape(-1, *own[1:]) if is_batched else x
    if name == "sinks":
        if not is_batched and len(own) == 1:
            return x
        x = x if is_batched else x[None]
        rows = x if len(own) == 2 else x[:, None]
        return jnp.broadcast_to(rows, (size, batch, own[-1])).reshape(size * batch, own[-1])
    if name == "scale" and own[0] == 1:
        if not is_batched:
            return x
        x = jnp.broadcast_to(x, (size, batch))
        own = x.shape[1:]
    x = x if is_batched else jnp.broadcast_to(x, (size, *own))
    return x.reshape(size * batch, *own[1:])
