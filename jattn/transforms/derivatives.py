"""Attention by its kernels as a function with every derivative, in linear memory.

Four maps of a call are primitives (`calls`), evaluated by kernels (`evaluated`), and what JAX asks
of one is another. With x the operands, J(x) the derivative of attention, and d the gradients of
output and log-sum-exp:

    attention            f(x)                    its tangent along t is J(x) t
    attention_tangent    J(x) t                  transposed, backward
    attention_backward   J(x)ᵀ d                 transposed, the tangent; its tangent along t is
    attention_backward_tangent                   (t ∂) J(x)ᵀ d + J(x)ᵀ td
    attention_second_tangent                     (u ∂) J(x) t: forward mode over forward mode

so that reverse mode is attention, and backward from its output and log-sum-exp; forward over
reverse the tangent of each; reverse over forward, where (u ∂) J(x) t is transposed to
(t ∂) J(x)ᵀ d, and reverse over reverse, where (t ∂) J(x)ᵀ d is transposed to (c ∂) J(x)ᵀ d and
J(x) c, again those four. What is of third order is derived by JAX (`higher_order`).

Output and log-sum-exp, saved beside x, are functions of x: no map has a derivative by them, and
their tangents, which come along, are what a map may use of J(x) t instead of making it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array

from jattn.call.spec import AttentionSpec, Operands
from jattn.transforms import evaluated, formulas, higher_order, sharding
from jattn.transforms.calls import SAVED, Results, bind, primitive
from jattn.transforms.evaluated import tangents_of
from jattn.transforms.folding import Arrays
from jattn.transforms.kernels import Kernels
from jattn.transforms.per_shard import TANGENTS
from jattn.transforms.rematerialisation import named
from jattn.transforms.rows import log_sum_exp

__all__ = ["attend"]

type Primitive = jax.extend.core.Primitive
type Along = tuple[Results, Sequence[Array | None]]
_COTANGENTS = ("d_out", "d_lse")
_OF_OPERANDS = (*SAVED, "t_out", "t_lse", "u_out", "u_lse")  # functions of those that have them


def attend(kernels: Kernels, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
    """Output (B, T, N, D) and log-sum-exp (B, T, N)."""
    arrays = {name: x for name, x in operands._asdict().items() if x is not None}
    found: tuple[Array, Array] = _attend(kernels, spec, arrays)
    return found


# Jitted, so that calls outside `jax.jit` trace and differentiate it once; in line inside of it.
@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _attend(kernels: Kernels, spec: AttentionSpec, arrays: Arrays) -> tuple[Array, Array]:
    out, lse, *_ = bind(_Attention(kernels), spec, sharding.varying_alike(arrays))
    return out, lse


@dataclass(frozen=True)
class _Attention:
    """f(x): output, log-sum-exp, and the same in two numbers, of which the second moves with it."""

    primitive: ClassVar[Primitive] = primitive("attention")
    results: ClassVar[tuple[str, ...]] = ("out", "lse", "top", "rest")

    kernels: Kernels

    def run(self, spec: AttentionSpec, arrays: Arrays) -> Results:
        found: Results = evaluated.forward(self.kernels, spec, arrays)
        return found

    def types(self, spec: AttentionSpec, types: dict[str, Any]) -> None:
        return None

    def jvp(self, spec: AttentionSpec, arrays: Arrays, tangents: Arrays) -> Along:
        out, _, *sums = bind(self, spec, arrays)
        out, (top, rest) = named(out, sums)
        lse = log_sum_exp(self.kernels.unit(spec), spec, top, rest)
        saved = dict(zip(SAVED, (out, top, rest), strict=True))
        t_out, t_lse = _tangent(self.kernels, spec, arrays | saved, tangents)
        return (out, lse, top, rest), (t_out, t_lse, None, t_lse)

    def transposed(
        self, spec: AttentionSpec, arrays: Arrays, linear: tuple[str, ...], cotangents: Any
    ) -> Arrays:
        """By value, in which the output is linear: its gradient, whatever the value."""
        d_out, *others = cotangents
        if linear != ("value",) or any(x is not None for x in others):
            raise NotImplementedError(
                "attention can be transposed by value alone, in which its output is linear: "
                f"not by {', '.join(linear)}, nor through its log-sum-exp"
            )
        key = arrays["key"]
        arrays = arrays | {"value": jnp.zeros((*key.shape[:3], spec.value_dim), key.dtype)}
        out, _, *sums = bind(self, spec, arrays)
        saved = dict(zip(SAVED, (out, *sums), strict=True))
        found = _backward(self.kernels, spec, linear, arrays | saved | {"d_out": d_out})
        return dict(zip(linear, found, strict=True))


def _tangent(
    kernels: Kernels, spec: AttentionSpec, arrays: Arrays, tangents: Arrays
) -> tuple[Array, Array]:
    """J(x) t, of arrays among which are the operands and what is saved."""
    own = {name: x for name, x in arrays.items() if name in (*Operands._fields, *SAVED)}
    t_out, t_lse = bind(_Tangent(kernels), spec, own | _prefixed("t_", tangents))
    return t_out, t_lse


def _prefixed(prefix: str, arrays: Arrays) -> Arrays:
    return {prefix + name: x for name, x in arrays.items()}


def _of(arrays: Arrays, names: Sequence[str]) -> Arrays:
    return {name: arrays[name] for name in names if name in arrays}


@dataclass(frozen=True)
class _Tangent:
    """J(x) t: linear in the tangents t_."""

    primitive: ClassVar[Primitive] = primitive("attention_tangent")
    results: ClassVar[tuple[str, ...]] = TANGENTS

    kernels: Kernels

    def run(self, spec: AttentionSpec, arrays: Arrays) -> Results:
        found: Results = evaluated.tangent(self.kernels, spec, arrays)
        return found

    def types(self, spec: AttentionSpec, types: dict[str, Any]) -> Sequence[Any]:
        return types["out"], types["rest"]

    def jvp(self, spec: AttentionSpec, arrays: Arrays, tangents: Arrays) -> Along:
        found = t_out, t_lse = bind(self, spec, arrays)
        moving = _of(tangents, Operands._fields)
        parts: list[Results] = []
        if along := tangents_of(tangents):
            parts.append(_tangent(self.kernels, spec, arrays, along))
        if moving:
            u_out, u_lse = _results_along(self.kernels, spec, arrays, tangents)
            linear = _prefixed("u_", moving) | {"u_out": u_out, "u_lse": u_lse}
            more = bind(
                _SecondTangent(self.kernels),
                spec,
                arrays | {"t_out": t_out, "t_lse": t_lse} | linear,
            )
            parts.append(more)
        return found, _added(parts)

    def transposed(
        self, spec: AttentionSpec, arrays: Arrays, linear: tuple[str, ...], cotangents: Any
    ) -> Arrays:
        wanted = tuple(name.removeprefix("t_") for name in linear)
        given = zip(_COTANGENTS, cotangents, strict=True)
        arrays = arrays | {name: x for name, x in given if x is not None}
        found = _backward(self.kernels, spec.with_rows(d_bias="t_bias"), wanted, arrays)
        return dict(zip(linear, found, strict=True))


def _results_along(
    kernels: Kernels, spec: AttentionSpec, arrays: Arrays, tangents: Arrays
) -> tuple[Array, Array]:
    """J(x) t for the tangents of the operands: those of what was saved have it."""
    if "out" in tangents and "rest" in tangents:
        return tangents["out"], tangents["rest"]
    return _tangent(kernels, spec.with_rows(), arrays, _of(tangents, Operands._fields))


def _added(parts: list[Results]) -> Sequence[Array | None]:
    if len(parts) < 2:
        return parts[0] if parts else (None, None)
    return [a + b for a, b in zip(*parts, strict=True)]


def _backward(
    kernels: Kernels, spec: AttentionSpec, wanted: tuple[str, ...], arrays: Arrays
) -> Results:
    """J(x)ᵀ d, of arrays among which are operands, what is saved, and cotangents."""
    own = _of(arrays, (*Operands._fields, *SAVED, *_COTANGENTS))
    if "d_out" not in own:
        own["d_out"] = jnp.zeros_like(own["out"])
    return bind(_Backward(kernels, wanted), spec, own)


@dataclass(frozen=True)
class _Backward:
    """J(x)ᵀ d for some of the operands: linear in d_out and d_lse."""

    primitive: ClassVar[Primitive] = primitive("attention_backward")

    kernels: Kernels
    results: tuple[str, ...]

    def run(self, spec: AttentionSpec, arrays: Arrays) -> Results:
        found: Results = evaluated.backward(self.kernels, spec, self.results, arrays)
        return found

    def types(self, spec: AttentionSpec, types: dict[str, Any]) -> None:
        return None

    def jvp(self, spec: AttentionSpec, arrays: Arrays, tangents: Arrays) -> Along:
        found = bind(self, spec, arrays)
        moving = _of(tangents, Operands._fields)
        cotangents = _of(tangents, _COTANGENTS)
        if moving:
            t_out, t_lse = _results_along(self.kernels, spec, arrays, tangents)
            linear = _prefixed("t_", moving | {"out": t_out, "lse": t_lse})
            linear |= _prefixed("t", cotangents)
            of = _BackwardTangent(self.kernels, self.results)
            return found, bind(of, spec, arrays | linear)
        if cotangents:
            own = {name: x for name, x in arrays.items() if name not in _COTANGENTS}
            return found, _backward(self.kernels, spec, self.results, own | cotangents)
        return found, [None] * len(found)

    def transposed(
        self, spec: AttentionSpec, arrays: Arrays, linear: tuple[str, ...], cotangents: Any
    ) -> Arrays:
        t = {name: x for name, x in zip(self.results, cotangents, strict=True) if x is not None}
        found = _tangent(self.kernels, spec.with_rows(t_bias="d_bias"), arrays, t)
        return _of(dict(zip(_COTANGENTS, found, strict=True)), linear)


@dataclass(frozen=True)
class _BackwardTangent:
    """(t ∂) J(x)ᵀ d + J(x)ᵀ td for some of the operands: linear in t_ and td_.

    t_out and t_lse are J(x) t.
    """

    primitive: ClassVar[Primitive] = primitive("attention_backward_tangent")

    kernels: Kernels
    results: tuple[str, ...]

    def run(self, spec: AttentionSpec, arrays: Arrays) -> Results:
        found: Results = evaluated.backward_tangent(self.kernels, spec, self.results, arrays)
        return found

    def types(self, spec: AttentionSpec, types: dict[str, Any]) -> Sequence[Any]:
        return [
            types[name].update(shape=spec.d_bias_shape) if name == "bias" else types[name]
            for name in self.results
        ]

    def jvp(self, spec: AttentionSpec, arrays: Arrays, tangents: Arrays) -> Along:
        found = bind(self, spec, arrays)
        linear = {name: x for name, x in tangents.items() if name.startswith(("t_", "td_"))}
        if linear.keys() <= {"t_out", "t_lse"}:
            linear = {}
        moving = {name: x for name, x in tangents.items() if name not in (*_OF_OPERANDS, *linear)}
        if moving:
            static = (self.kernels, spec, self.results)
            formula = (formulas.backward_tangent, static)
            return found, _by_formula(*formula, arrays, moving | linear, found)
        if not linear:
            return found, [None] * len(found)
        along = tangents_of(linear)
        own = {name: x for name, x in arrays.items() if not name.startswith(("t_", "td_"))}
        if not along:
            own = {name: x for name, x in own.items() if name not in _COTANGENTS}
            own |= {name[1:]: x for name, x in linear.items()}
            return found, _backward(self.kernels, spec, self.results, own)
        if not {"t_out", "t_lse"} <= linear.keys():
            t_out, t_lse = _tangent(self.kernels, spec, own, along)
            linear |= {"t_out": t_out, "t_lse": t_lse}
        return found, bind(self, spec, own | linear)

    def transposed(
        self, spec: AttentionSpec, arrays: Arrays, linear: tuple[str, ...], cotangents: Any
    ) -> Arrays:
        c = {name: x for name, x in zip(self.results, cotangents, strict=True) if x is not None}
        swapped = spec.with_rows(t_bias="d_bias", d_bias="t_bias")
        t_out, t_lse = _tangent(self.kernels, swapped, arrays, c)
        found = {"td_out": t_out, "td_lse": t_lse}
        own = _of(arrays, (*Operands._fields, *SAVED, *_COTANGENTS))
        c = _prefixed("t_", c | {"out": t_out, "lse": t_lse})
        found |= _gradients_along(self.kernels, swapped, own | c, linear)
        return _of(found, linear)


def _gradients_along(
    kernels: Kernels, spec: AttentionSpec, arrays: Arrays, linear: tuple[str, ...]
) -> Arrays:
    """(t ∂) J(x)ᵀ d for the operands whose tangents are named, under those names."""
    names = {name: name[2:] for name in linear if name[2:] in Operands._fields}
    if not names:
        return {}
    found = bind(_BackwardTangent(kernels, tuple(names.values())), spec, arrays)
    return dict(zip(names, found, strict=True))


@dataclass(frozen=True)
class _SecondTangent:
    """(u ∂) J(x) t: linear in u_. u_out and u_lse are J(x) u, t_out and t_lse J(x) t."""

    primitive: ClassVar[Primitive] = primitive("attention_second_tangent")
    results: ClassVar[tuple[str, ...]] = TANGENTS

    kernels: Kernels

    def run(self, spec: AttentionSpec, arrays: Arrays) -> Results:
        used = {name: x for name, x in arrays.items() if name not in _OF_OPERANDS}
        places = tuple(sharding.partition(arrays[name]) for name in ("out", "rest"))
        formula = partial(formulas.second_tangent, self.kernels)
        return evaluated.run(formula, self.kernels, spec, used, TANGENTS, places)

    def types(self, spec: AttentionSpec, types: dict[str, Any]) -> Sequence[Any]:
        return types["out"], types["rest"]

    def jvp(self, spec: AttentionSpec, arrays: Arrays, tangents: Arrays) -> Along:
        found = bind(self, spec, arrays)
        moving = {name: x for name, x in tangents.items() if name not in _OF_OPERANDS}
        if not moving:
            return found, (None, None)
        formula = (formulas.second_tangent, (self.kernels, spec))
        return found, _by_formula(*formula, arrays, moving, found)

    def transposed(
        self, spec: AttentionSpec, arrays: Arrays, linear: tuple[str, ...], cotangents: Any
    ) -> Arrays:
        given = zip(_COTANGENTS, cotangents, strict=True)
        own = {name: x for name, x in arrays.items() if not name.startswith("u_")}
        own |= {name: x for name, x in given if x is not None}
        if "d_out" not in own:
            own["d_out"] = jnp.zeros_like(own["out"])
        return _gradients_along(
            self.kernels, spec.with_rows(t_bias="t_bias", d_bias="u_bias"), own, linear
        )


@dataclass(frozen=True)
class _Formula:
    """A function of arrays by name as one by position."""

    function: Callable[..., Results]
    static: tuple[Any, ...]
    names: tuple[str, ...]

    def __call__(self, *held: Array) -> Results:
        return self.function(*self.static, dict(zip(self.names, held, strict=True)))


def _by_formula(
    function: Callable[..., Results],
    static: tuple[Any, ...],
    arrays: Arrays,
    moving: Arrays,
    like: Results,
) -> Results:
    """The tangent of what a formula makes of the arrays, along those that move."""
    used = {name: x for name, x in arrays.items() if name not in _OF_OPERANDS}
    names = tuple(used)
    at = {names.index(name): x for name, x in moving.items() if name in used}
    formula = _Formula(function, static, names)
    return higher_order.along(formula, tuple(used.values()), at, like)
