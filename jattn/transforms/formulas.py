"""Second derivatives of a call as JAX makes them of a formula, with nothing saved.

For what has no loops or kernels of its own: the tangent of the tangent, and whatever is of third
order or beyond, which JAX derives from the functions here (`higher_order`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jattn.call.spec import AttentionSpec, Operands
from jattn.transforms import context
from jattn.transforms.evaluated import tangents_of
from jattn.transforms.folding import Arrays
from jattn.transforms.kernels import Kernels

__all__ = ["backward_tangent", "second_tangent"]


def second_tangent(kernels: Kernels, spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
    """The tangent along u_ of the tangents of output and log-sum-exp along t_."""
    spec, arrays = _alike(spec, arrays)
    attend = _function(kernels, spec, arrays)
    t, u = tangents_of(arrays, "t_"), tangents_of(arrays, "u_")

    def along(moving: Arrays) -> tuple[Array, Array]:
        def inner(own: Arrays) -> tuple[Array, Array]:
            return attend(moving | own)

        start = {name: moving.get(name, arrays[name]) for name in t}
        found: tuple[Array, Array] = jax.jvp(inner, (start,), (t,))[1]
        return found

    found: tuple[Array, ...] = jax.jvp(along, ({name: arrays[name] for name in u},), (u,))[1]
    return found


def backward_tangent(
    kernels: Kernels, spec: AttentionSpec, wanted: tuple[str, ...], arrays: Arrays
) -> tuple[Array, ...]:
    """The tangents of the gradients that are wanted, along t_ and those of the cotangents, td_."""
    asked_for, given = spec, arrays
    spec, arrays = _alike(spec, arrays)
    attend = _function(kernels, spec, arrays)
    t = tangents_of(arrays, "t_")
    t |= {name: x for name in ("d_out", "d_lse") if (x := arrays.get(f"t{name}")) is not None}

    def gradients(moving: Arrays) -> Arrays:
        asked = {name: moving.get(name, arrays[name]) for name in wanted}
        rest = {name: x for name, x in moving.items() if name in Operands._fields}
        (_, lse), pull = jax.vjp(lambda asked: attend(rest | asked), asked)
        d_lse = moving.get("d_lse", arrays.get("d_lse"))
        d_lse = jnp.zeros_like(lse) if d_lse is None else d_lse
        found: Arrays = pull((moving.get("d_out", arrays["d_out"]), d_lse))[0]
        return found

    # A cotangent that is not there moves from 0.
    start = {name: arrays[name] if name in arrays else jnp.zeros_like(x) for name, x in t.items()}
    found = jax.jvp(gradients, (start,), (t,))[1]
    return tuple(_as_wanted(asked_for, name, found[name], given) for name in wanted)


def _function(
    kernels: Kernels, spec: AttentionSpec, arrays: Arrays
) -> Callable[[Arrays], tuple[Array, Array]]:
    """Output and log-sum-exp, of operands that move by name; the others stay."""
    own = {name: x for name, x in arrays.items() if name in Operands._fields}

    def attend(moving: Arrays) -> tuple[Array, Array]:
        return context.formula(kernels, spec, Operands(**(own | moving)))

    return attend


def _alike(spec: AttentionSpec, arrays: Arrays) -> tuple[AttentionSpec, Arrays]:
    """The same call, each operand of the shape of all its tangents: with rows of the whole batch if
    they differ, as they do where `jax.vmap` maps tangents alone.
    """
    found = dict(arrays)
    for name in ("bias", "sinks", "scale"):
        given = [x for x in (name, f"t_{name}", f"u_{name}") if x in arrays]
        if not given or _are_alike(spec, name, [arrays[x] for x in given]):
            continue
        found |= {x: _of_batch(spec, x, arrays[x]) for x in given}
        if name == "bias":
            rest = tuple((x, rows) for x, rows in spec.mapped_rows if x == "mask")
            b, n, t, s = found["bias"].shape
            spec = replace(spec, mapped_rows=rest, bias_shape=(b, n, t, s))
    return spec, found


def _are_alike(spec: AttentionSpec, name: str, arrays: list[Array]) -> bool:
    if name == "bias":
        rows = (spec.rows(x) for x in ("t_bias", "u_bias", "d_bias"))
        return all(x == spec.rows("bias") for x in rows)
    return len({x.shape for x in arrays}) == 1


def _of_batch(spec: AttentionSpec, name: str, x: Array) -> Array:
    """With a row for each of the batch."""
    if name.endswith("bias"):
        return jnp.take(x, _rows(spec, name), axis=0)
    shape = (spec.batch,) if name.endswith("scale") else (spec.batch, spec.heads)
    return jnp.broadcast_to(x if x.ndim == len(shape) else x[None], shape)


def _rows(spec: AttentionSpec, name: str) -> Array:
    return spec.rows(name).row(jnp.arange(spec.batch, dtype=jnp.int32))


def _as_wanted(spec: AttentionSpec, name: str, x: Array, given: Arrays) -> Array:
    """A gradient of what `_alike` may have given the rows of the batch, in the shape asked for."""
    if name == "bias":
        if x.shape == spec.d_bias_shape:
            return x
        zeros: Any = jnp.zeros(spec.d_bias_shape, x.dtype)
        summed: Array = zeros.at[_rows(spec, "d_bias")].add(x)
        return summed
    if name in ("sinks", "scale") and x.shape != given[name].shape:
        return x.sum(axis=0).reshape(given[name].shape)
    return x
