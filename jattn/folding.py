"""`jax.vmap` of a kernel's call as a call with a larger batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jattn.spec import AttentionSpec, Operands

__all__ = ["Attention", "folds_into_batch"]

type Attention = Callable[[AttentionSpec, Operands], tuple[Array, Array]]


def folds_into_batch(attention: Attention) -> Attention:
    """The same function; under `jax.vmap` the mapped axis becomes part of the batch.

    What is not mapped is repeated along it, sinks excepted: those may be (N,), for all rows of the
    batch, and become (B, N) only where they are mapped.
    """

    def folding(spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
        @jax.custom_batching.custom_vmap
        def call(operands: Operands) -> tuple[Array, Array]:
            return attention(spec, operands)

        @call.def_vmap
        def _(size: int, batched: list[Operands], operands: Operands) -> tuple[Any, Any]:
            larger = replace(spec, batch=size * spec.batch)
            folded: dict[str, Any] = {
                name: None if x is None else _fold(name, spec.batch, size, bool(is_batched), x)
                for name, x, is_batched in zip(Operands._fields, operands, batched[0], strict=True)
            }
            out, lse = folding(larger, Operands(**folded))
            shape = (size, spec.batch)
            return (
                (out.reshape(*shape, *out.shape[1:]), lse.reshape(*shape, *lse.shape[1:])),
                (True, True),
            )

        out, lse = call(operands)
        return out, lse

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
