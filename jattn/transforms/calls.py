"""A call's maps as primitives: forward, backward, and the tangents of both.

What JAX asks of each is one rule here, and what the map itself has to say to it is its own:

    jax.vmap        one call of a larger batch, before anything is differentiated: a bias for all
                    rows stays one, and its gradient is summed over them where it is made; over
                    tangents alone, a batch that says so
    derivatives     see which arrays move, under every transformation, and are again such maps
    lowering        evaluates the map where the call was made: devices and meshes are read while it
                    is traced. A map whose types are known without is traced only then, so that one
                    that is made to be transposed, or under `stop_gradient`, costs nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad, batching, mlir

from jattn.call.spec import AttentionSpec, Operands
from jattn.transforms.constants import none_folded
from jattn.transforms.folding import Arrays, batched_call
from jattn.transforms.per_shard import partitioned_call

__all__ = ["SAVED", "Map", "Results", "bind", "primitive"]

SAVED = ("out", "top", "rest")  # what forward leaves beside its operands

type Results = tuple[Array, ...]
type Cotangents = list[Array | None]


class Map(Protocol):
    """One of a call's maps; hashable."""

    @property
    def primitive(self) -> jax.extend.core.Primitive: ...

    @property
    def results(self) -> tuple[str, ...]:
        """The names of what it gives."""
        ...

    def run(self, spec: AttentionSpec, arrays: Arrays) -> Results:
        """The results, of arrays by name."""
        ...

    def types(self, spec: AttentionSpec, types: dict[str, Any]) -> Sequence[Any] | None:
        """The results' types, of the arrays'; None if it has to be traced to know them."""
        ...

    def jvp(
        self, spec: AttentionSpec, arrays: Arrays, tangents: Arrays
    ) -> tuple[Results, Sequence[Array | None]]:
        """The results, and their tangents along those of the arrays that move. May not raise: it is
        asked for under `stop_gradient` too.
        """
        ...


class Linear(Map, Protocol):
    """One that is linear in some of its arrays."""

    def transposed(
        self, spec: AttentionSpec, arrays: Arrays, linear: tuple[str, ...], cotangents: Cotangents
    ) -> Arrays:
        """The cotangents of those arrays, those of the results being given."""
        ...


def bind(of: Map, spec: AttentionSpec, arrays: Arrays) -> Results:
    """The results of `of.run`."""
    names, held = tuple(arrays), tuple(arrays.values())
    types = of.types(spec, dict(zip(names, map(jax.typeof, held), strict=True)))
    if types is None:
        parameters = {"call": jax.make_jaxpr(partial(_run, of, spec, names))(*held), "inside": None}
    else:
        parameters = {"call": None, "inside": partitioned_call()}
    found: list[Array] = of.primitive.bind(*held, of=of, spec=spec, names=names, **parameters)
    return tuple(found)


def primitive(name: str) -> jax.extend.core.Primitive:
    """The primitive of a kind of map."""
    made = jax.extend.core.Primitive(name)
    made.multiple_results = True
    made.def_impl(_evaluate_alone)
    made.def_effectful_abstract_eval(_types)
    mlir.register_lowering(made, none_folded(mlir.lower_fun(_evaluate, multiple_results=True)))
    batching.primitive_batchers[made] = _batched
    ad.primitive_jvps[made] = _jvp
    ad.primitive_transposes[made] = _transposed
    return made


@none_folded
def _run(of: Map, spec: AttentionSpec, names: tuple[str, ...], *held: Array) -> Results:
    return of.run(spec, dict(zip(names, held, strict=True)))


def _evaluate(*held: Array, of: Any, spec: Any, names: Any, call: Any, **_: Any) -> Sequence[Array]:
    if call is None:
        return _run(of, spec, names, *held)
    found: list[Array] = jax.extend.core.jaxpr_as_fun(call)(*held)
    return found


_jitted = partial(jax.jit, static_argnums=(0, 1, 2))(_run)


@none_folded
def _evaluate_alone(*held: Array, call: Any, **how: Any) -> Sequence[Array]:
    """Outside of `jax.jit`."""
    if call is None:
        found: Results = _jitted(how["of"], how["spec"], how["names"], *held)
        return found
    return _evaluate(*held, call=call, **how)


def _types(
    *types: Any, of: Any, spec: Any, names: Any, call: Any, **_: Any
) -> tuple[Sequence[Any], Any]:
    if call is None:
        return list(of.types(spec, dict(zip(names, types, strict=True)))), set()
    return call.out_avals, call.effects


def _batched(held: Any, dims: Any, *, of: Any, spec: Any, names: Any, **_: Any) -> Any:
    """`jax.vmap`: the mapped axis becomes part of the batch."""
    is_batched = {name: dim is not None for name, dim in zip(names, dims, strict=True)}
    arrays = {
        name: x if dim is None else jnp.moveaxis(x, dim, 0)
        for name, x, dim in zip(names, held, dims, strict=True)
    }
    size = next(x.shape[0] for name, x in arrays.items() if is_batched[name])
    moves = any(is_batched[name] for name in names if name in (*Operands._fields, *SAVED))
    own = {
        name: arrays[name].shape[1:] if is_batched[name] else arrays[name].shape
        for name in ("sinks", "scale")
        if name in of.results
    }
    for name, shape in own.items():  # each mapped row has a gradient of its own
        if not is_batched[name]:
            arrays[name] = jnp.broadcast_to(arrays[name], (size, *shape))
            is_batched[name] = True
    folded = partial(bind, of)
    found = batched_call(
        folded, spec, size, arrays, is_batched, sums_bias="bias" in of.results,
        directions=1 if moves else size * spec.directions,
    )  # fmt: skip
    summed = [
        _over_batch(x, own[name]) if name in own else x
        for name, x in zip(of.results, found, strict=True)
    ]
    return summed, [0] * len(summed)


def _over_batch(x: Array, shape: tuple[int, ...]) -> Array:
    """Gradients of sinks (size, B, N) or of a scale (size, B) as of one for all rows, if it is."""
    if x.ndim == len(shape) + 2:  # sinks (N,), which may be one
        return x.sum(axis=1)
    return x.sum(axis=1, keepdims=True) if shape == (1,) else x


def _jvp(primals: Any, tangents: Any, *, of: Any, spec: Any, names: Any, **_: Any) -> Any:
    moving = {
        name: t
        for name, t in zip(names, tangents, strict=True)
        if not isinstance(t, ad.Zero) and t.dtype != jax.dtypes.float0
    }
    found, along = of.jvp(spec, dict(zip(names, primals, strict=True)), moving)
    return found, [_zero(x) if t is None else t for x, t in zip(found, along, strict=True)]


def _zero(x: Any) -> Any:
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def _transposed(cotangents: Any, *held: Any, of: Linear, spec: Any, names: Any, **_: Any) -> Any:
    known = {name: x for name, x in zip(names, held, strict=True) if not ad.is_undefined_primal(x)}
    asked = tuple(name for name in names if name not in known)
    zeros = {name: ad.Zero(x.aval) for name, x in zip(names, held, strict=True) if name in asked}
    given = [None if isinstance(x, ad.Zero) else x for x in cotangents]
    found: Arrays = {}
    if any(x is not None for x in given):
        avals: dict[str, Any] = {name: zero.aval for name, zero in zeros.items()}
        shapes = {name: aval.shape for name, aval in avals.items()}
        found = of.transposed(spec, _with_rows_of(known, shapes), asked, given)
        found = {name: _summed_to(shapes[name], x) for name, x in found.items()}
    return [found.get(name, zeros.get(name)) for name in names]


def _with_rows_of(known: Arrays, shapes: dict[str, tuple[int, ...]]) -> Arrays:
    """The arrays, sinks and a scale with a row for each of the batch if a tangent of theirs has."""
    found = dict(known)
    for name in ("sinks", "scale"):
        for way in ("t_", "u_"):
            if name in found and way + name in shapes:
                more = jnp.broadcast_shapes(found[name].shape, shapes[way + name])
                found[name] = jnp.broadcast_to(found[name], more)
    return found


def _summed_to(shape: tuple[int, ...], x: Array) -> Array:
    """x summed over the rows of the batch where one of this shape has them all."""
    return x if x.shape == shape else x.sum(axis=0).reshape(shape)
