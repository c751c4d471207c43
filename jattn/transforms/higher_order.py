"""Derivatives of third order and beyond: functions that JAX differentiates, as a primitive.

    the tangent of a function, along whatever moves           linear in what moves
    its transpose, the tangents of both, and so on            by `jax.jvp` and `jax.vjp` of it

As a function alone it would be differentiated wherever a rule is asked for it, which JAX does even
where `stop_gradient` discards the result. As a primitive it is traced when it is lowered, if it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad, batching, mlir

from jattn.transforms import sharding

__all__ = ["along"]

type Results = tuple[Array, ...]
type Types = tuple[Any, ...]
type Function = Callable[..., Results]  # of arrays by position, and hashable


def along(
    function: Function, held: Sequence[Array], moving: dict[int, Array], like: Sequence[Array]
) -> Results:
    """The tangent of the function at `held`, along the arrays that move, by position.

    like: arrays of its results' types.
    """
    at = tuple(moving)
    arrays = (*held, *moving.values())
    return _bind(_Along(function, at), arrays, len(at), tuple(map(jax.typeof, like)))


@dataclass(frozen=True)
class _Along:
    """The tangent of a function along its arguments at these positions, which are the last."""

    function: Function
    at: tuple[int, ...]

    def __call__(self, *held: Array) -> Results:
        arrays, tangents = held[: -len(self.at)], held[-len(self.at) :]

        def moved(*moving: Array) -> Results:
            own = dict(zip(self.at, moving, strict=True))
            return self.function(*(own.get(i, x) for i, x in enumerate(arrays)))

        found: Results = jax.jvp(moved, tuple(arrays[i] for i in self.at), tangents)[1]
        return tuple(found)


@dataclass(frozen=True)
class _Transposed:
    """A function that is linear in its last arguments, transposed; some results have cotangents.

    types: of those arguments.
    of: the results, by position, whose cotangents are the last arguments.
    """

    function: Function
    types: tuple[Any, ...]
    of: tuple[int, ...]

    def __call__(self, *held: Array) -> Results:
        arrays, cotangents = held[: -len(self.of)], held[-len(self.of) :]

        def linear(*moving: Array) -> Results:
            found = self.function(*arrays, *moving)
            return tuple(found[i] for i in self.of)

        zeros = tuple(
            sharding.placed(jnp.zeros(x.shape, x.dtype), x.sharding.spec) for x in self.types
        )
        _, pull = jax.vjp(linear, *sharding.varying_as(zeros, held))
        return tuple(pull(tuple(cotangents)))


@dataclass(frozen=True)
class _Mapped:
    """`jax.vmap` of a function."""

    function: Function
    dims: tuple[int | None, ...]
    size: int

    def __call__(self, *held: Array) -> Results:
        mapped = jax.vmap(self.function, self.dims, axis_size=self.size)
        found: Results = mapped(*held)
        return found


def _bind(
    function: Function, held: Sequence[Array], linear: int, types: tuple[Any, ...]
) -> Results:
    found: list[Array] = _derived_p.bind(*held, function=function, linear=linear, types=types)
    return tuple(found)


def _evaluate(*held: Array, function: Function, **_: Any) -> Results:
    return function(*held)


_jitted = partial(jax.jit, static_argnames=("function", "linear", "types"))(_evaluate)


def _jvp(primals: Any, tangents: Any, *, function: Any, linear: int, types: Any) -> Any:
    found = _bind(function, primals, linear, types)
    moving = {i: t for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)}
    first = len(primals) - linear
    if min(moving) >= first:
        own = [ad.instantiate_zeros(t) for t in tangents[first:]]
        return found, _bind(function, (*primals[:first], *own), linear, types)
    return found, along(function, primals, moving, found)


def _transposed(cotangents: Any, *held: Any, function: Any, linear: int, types: Any) -> Any:
    first = len(held) - linear
    given = {i: x for i, x in enumerate(cotangents) if not isinstance(x, ad.Zero)}
    asked = [x.aval if ad.is_undefined_primal(x) else jax.typeof(x) for x in held[first:]]
    if not given:
        return [None] * first + [ad.Zero(x) for x in asked]
    of = _Transposed(function, tuple(asked), tuple(given))
    found = _bind(of, (*held[:first], *given.values()), len(given), tuple(asked))
    undefined = map(ad.is_undefined_primal, held[first:])
    return [None] * first + [x if own else None for x, own in zip(found, undefined, strict=True)]


def _batched(held: Any, dims: Any, *, function: Any, linear: int, types: Any) -> Any:
    size = next(x.shape[d] for x, d in zip(held, dims, strict=True) if d is not None)
    mapped = _Mapped(function, tuple(dims), size)
    found = jax.make_jaxpr(mapped)(*held).out_avals
    return _bind(mapped, held, linear, tuple(found)), [0] * len(found)


_derived_p = jax.extend.core.Primitive("attention_derivative")
_derived_p.multiple_results = True
_derived_p.def_impl(lambda *held, **how: _jitted(*held, **how))
_derived_p.def_abstract_eval(lambda *_, types, **__: list(types))
mlir.register_lowering(_derived_p, mlir.lower_fun(_evaluate, multiple_results=True))
batching.primitive_batchers[_derived_p] = _batched
ad.primitive_jvps[_derived_p] = _jvp
ad.primitive_transposes[_derived_p] = _transposed
