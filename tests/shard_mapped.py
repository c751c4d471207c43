"""A call through `jax.shard_map` over rows and heads, with all its gradients, held to float64.

For a process of four devices: see `tests.four_devices`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests import tolerance
from tests.backends import EAGER, Backend, Results, call
from tests.cases import Case, Operands, operands

PLACES = {"q": P("dp", None, "tp"), "bias": P(None, "tp"), "sinks": P("tp")}
ROWS = PLACES["q"]


def place(name: str, x: Any) -> P:
    """How an array is laid out: an axis of size 1 is one everywhere."""
    if name in ("k", "v"):
        name = "q"
    axes = zip(x.shape, (*PLACES[name], *(None,) * x.ndim), strict=False)
    return P(*(axis if size > 1 else None for size, axis in axes))


def through(
    backend: Backend, drawn: Operands, *, check_vma: bool, inside: bool, residual: bool
) -> Results:
    """Output and gradients; by `jax.grad` of the mapped call, or of each device's own inside."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
    arrays = jax.tree.map(jnp.asarray, dict(drawn.differentiable))
    places = {name: place(name, x) for name, x in arrays.items()}
    weights = (jnp.asarray(drawn["dout"]), jnp.asarray(drawn["dlse"]))
    mapped = partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    more = {"return_residual": True} if residual else {}

    def attend(arrays: Results) -> Any:
        found = call(backend, drawn, arrays, **more)
        return found if residual else (found, jnp.zeros_like(found[..., 0], jnp.float32))

    def loss(results: Any, weights: Any) -> jax.Array:
        return sum(
            (x.astype(jnp.float32) * w.astype(jnp.float32)).sum()
            for x, w in zip(results, weights, strict=True)
        )

    def own(arrays: Results, weights: Any) -> Results:
        found = jax.grad(lambda x: loss(attend(x), weights))(arrays)
        if check_vma:
            return found
        # Of an array that is the same on several devices, each has its part.
        missing = {n: {"dp", "tp"} - set(jax.tree.leaves(tuple(places[n]))) for n in found}
        return {
            n: jax.lax.psum(x, tuple(missing[n])) if missing[n] else x for n, x in found.items()
        }

    each = mapped(attend, in_specs=(places,), out_specs=(ROWS, ROWS))
    out = each(arrays)[0]
    if inside:
        gradients = mapped(own, in_specs=(places, (ROWS, ROWS)), out_specs=places)
        return {"out": out, **gradients(arrays, weights)}
    return {"out": out, **jax.grad(lambda x: loss(each(x), weights))(arrays)}


def check(
    backend: Backend, case: Case, *, check_vma: bool, inside: bool, residual: bool = True
) -> None:
    """What the mapped call gives is as exact as eager is on one device."""
    drawn = operands(case, 0)
    d_lse = drawn["dlse"] if residual else np.zeros_like(drawn["dlse"])
    exact = drawn.exact(None)
    values = {"out": exact.out, **exact.gradients(drawn["dout"], d_lse)}
    magnitudes = exact.magnitudes(drawn["dout"], d_lse)

    @jax.jit
    def of_eager(arrays: Results, weights: Any) -> Results:
        (out, _), vjp = jax.vjp(lambda x: call(EAGER, drawn, x, return_residual=True), arrays)
        return {"out": out, **vjp(weights)[0]}

    weights = (jnp.asarray(drawn["dout"]), jnp.asarray(d_lse))
    peer = of_eager(jax.tree.map(jnp.asarray, dict(drawn.differentiable)), weights)
    found = through(backend, drawn, check_vma=check_vma, inside=inside, residual=residual)
    for name, value in values.items():
        tolerance.check_against_peer(
            name, found[name], peer[name], value, magnitudes[name], case.dtype
        )
