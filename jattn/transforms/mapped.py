"""A forward call as one primitive, there when JAX asks what a function alone cannot answer.

    jax.vmap of it     one call of a larger batch, before anything is differentiated: a bias for all
                       rows stays one, and its gradient is summed over them where it is made
    derivatives of it  see which operands move, under every transformation: a `jax.custom_vjp` is
                       told only outside of `jax.shard_map`

What it does is in its parameter `call`, traced where the call was made: devices and meshes are read
while tracing.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad, batching, mlir

from jattn.call.spec import AttentionSpec
from jattn.transforms.folding import Arrays, batched_call

__all__ = ["Forward", "mapped"]

type Results = tuple[Array, ...]


class Forward(Protocol):
    """What a call computes; hashable."""

    def run(self, spec: AttentionSpec, arrays: Arrays) -> Results:
        """The results, of arrays by name."""
        ...

    def derivative(self, spec: AttentionSpec, moving: Arrays, fixed: Arrays) -> Results:
        """The same, of all arrays that move and all that do not, differentiable by the former."""
        ...


def mapped(forward: Forward, spec: AttentionSpec, arrays: Arrays) -> Results:
    """The results of `forward.run`."""
    names, held = tuple(arrays), tuple(arrays.values())

    def call(*held: Array) -> Results:
        return forward.run(spec, dict(zip(names, held, strict=True)))

    found: list[Array] = _mapped_p.bind(
        *held, call=jax.make_jaxpr(call)(*held), forward=forward, spec=spec, names=names
    )
    return tuple(found)


def _evaluate(*held: Array, call: Any, **_: Any) -> list[Array]:
    found: list[Array] = jax.extend.core.jaxpr_as_fun(call)(*held)
    return found


def _batched(held: Any, dims: Any, *, forward: Any, spec: Any, names: Any, **_: Any) -> Any:
    """`jax.vmap`: the mapped axis becomes part of the batch."""
    is_batched = {name: dim is not None for name, dim in zip(names, dims, strict=True)}
    arrays = {
        name: x if dim is None else jnp.moveaxis(x, dim, 0)
        for name, x, dim in zip(names, held, dims, strict=True)
    }
    size = next(x.shape[0] for name, x in arrays.items() if is_batched[name])
    found = batched_call(partial(mapped, forward), spec, size, arrays, is_batched)
    return found, [0] * len(found)


def _jvp(primals: Any, tangents: Any, *, forward: Any, spec: Any, names: Any, **_: Any) -> Any:
    arrays = dict(zip(names, primals, strict=True))
    moving = {
        name: t for name, t in zip(names, tangents, strict=True) if not isinstance(t, ad.Zero)
    }
    fixed = {name: x for name, x in arrays.items() if name not in moving}

    def derivative(moving: Arrays) -> Results:
        found: Results = forward.derivative(spec, moving, fixed)
        return found

    found = jax.jvp(derivative, ({name: arrays[name] for name in moving},), (moving,))
    return found


_mapped_p = jax.extend.core.Primitive("attention")
_mapped_p.multiple_results = True
_mapped_p.def_impl(_evaluate)
_mapped_p.def_effectful_abstract_eval(lambda *_, call, **__: (call.out_avals, call.effects))
mlir.register_lowering(_mapped_p, mlir.lower_fun(_evaluate, multiple_results=True))
batching.primitive_batchers[_mapped_p] = _batched
ad.primitive_jvps[_mapped_p] = _jvp
