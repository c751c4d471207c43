"""A call's maps as their kernels evaluate them, and the work of one number a row around that.

Forward saves its arguments, the output and the log-sum-exp; whatever is asked for later makes the
weights again from these. What is one number a row is made here, in `jnp`: the row term
D = rowsum(O dO) - dlse, what the sinks add to the sum, their gradient, -sum over rows of P_sink D,
and the tangents of all of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jattn.call.row_arrays import (
    AnyBackwardRows,
    BackwardRows,
    BackwardRowsBeside,
    BackwardTangentRows,
    TangentRows,
)
from jattn.call.spec import AttentionSpec, Operands, Tangents
from jattn.transforms import context, sharding
from jattn.transforms.folding import Arrays, Kernel
from jattn.transforms.kernels import Kernels
from jattn.transforms.per_shard import (
    GRADIENTS,
    RESULTS,
    TANGENTS,
    per_explicit_shard,
    per_shard,
)
from jattn.transforms.rows import (
    kept,
    log_sum_exp,
    of_heads,
    row_term,
    sink_weights,
    unkept,
    with_sinks,
)

__all__ = [
    "backward",
    "backward_tangent",
    "forward",
    "run",
    "tangent",
    "tangents_of",
]


def _operands_of(arrays: Arrays) -> Operands:
    """Of arrays by name, those of the call itself."""
    return Operands(**{name: x for name, x in arrays.items() if name in Operands._fields})


def _beside(arrays: Arrays) -> Arrays:
    """Of arrays by name, the operands that kernels take with the saved sums."""
    own = _operands_of(arrays)._asdict()
    return {name: x for name, x in own.items() if x is not None and name != "sinks"}


def tangents_of(arrays: Arrays, way: str = "t_") -> Arrays:
    """Of arrays by name, the tangents of operands, without the prefix."""
    names = {way + name: name for name in Operands._fields}
    return {names[name]: x for name, x in arrays.items() if name in names}


@partial(jax.jit, static_argnums=(0, 1))
def forward(kernels: Kernels, spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
    """Output, log-sum-exp, and the same in two numbers."""

    def kernel(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        return context.forward(kernels, spec, Operands(**arrays))

    b, t, n, _ = sharding.partition(arrays["query"])
    places = (jax.P(b, t, n),) * 3
    out, top, rest = run(kernel, kernels, spec, arrays, RESULTS, places)
    unit = kernels.unit(spec)
    if "sinks" in arrays:
        top, rest = with_sinks(arrays["sinks"], top, rest, unit)
    top, rest = kept(top, rest)
    return out, log_sum_exp(unit, spec, top, rest), top, rest


@partial(jax.jit, static_argnums=(0, 1, 2))
def backward(
    kernels: Kernels, spec: AttentionSpec, wanted: tuple[str, ...], arrays: Arrays
) -> tuple[Array, ...]:
    """Gradients of the operands that are wanted; d_lse is 0 if it is not among the arrays."""

    def kernel(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        saved = (arrays[name] for name in ("top", "rest", of_output, "d_out"))
        rows: AnyBackwardRows = BackwardRows(*saved)
        if makes_term:
            rows = BackwardRowsBeside(**rows._asdict(), out=arrays["out"])
        return context.backward(
            kernels,
            spec,
            _operands_of(arrays),
            rows,
            wants_bias="bias" in wanted,
            wants_scale="scale" in wanted,
        )

    operands = _operands_of(arrays)
    top, rest = unkept(arrays["top"], arrays["rest"])
    d_out = _cotangent(spec, operands, arrays["d_out"])
    term = row_term(top, arrays["out"], d_out, arrays.get("d_lse", 0))
    of_output = "out" if kernels.takes_output else "row_term"
    held = _beside(arrays) | {"top": top, "rest": rest, "d_out": d_out}
    held[of_output] = arrays["out"] if kernels.takes_output else term
    makes_term = "d_lse" not in arrays and spec.context is None and kernels.makes_row_term(spec)
    if makes_term:
        held["out"] = arrays["out"]
    results = (*GRADIENTS, "bias") if "bias" in wanted else GRADIENTS
    places = tuple(sharding.partition(held[name]) for name in results)
    found = run(kernel, kernels, spec, held, results, places)
    gradients = dict(zip(results, found, strict=True))
    if "sinks" in wanted:
        assert operands.sinks is not None
        weights = sink_weights(operands.sinks, top, rest, kernels.unit(spec))
        gradients["sinks"] = _of_sinks(operands.sinks, -weights * term)
    if "scale" in wanted:
        gradients |= _by_scale(spec, operands, gradients["query"])
    return tuple(gradients[name] for name in wanted)


def _cotangent(spec: AttentionSpec, operands: Operands, d_out: Array) -> Array:
    """The output's gradient, or its tangent, as kernels take it: 0 past the query lengths."""
    d_out = d_out.astype(spec.dtype)
    lengths = operands.query_lengths
    return d_out if lengths is None else context.past_zeroed(spec, d_out, lengths)


def _of_sinks(sinks: Array, rows: Array) -> Array:
    """The sum over rows (B, T, N) that is the gradient of sinks (N,) or (B, N)."""
    return jnp.sum(rows, axis=(0, 1) if sinks.ndim == 1 else 1).astype(sinks.dtype)


def _by_scale(spec: AttentionSpec, operands: Operands, unscaled: Array) -> Arrays:
    """The gradients of query and scale from dS K, which is the one's if the scale is 1.

    The other's is the sum over dS Q Kᵀ. A query that gets no gradient may hold anything.
    """
    assert operands.scale is not None
    query = operands.query.astype(unscaled.dtype)
    products = jnp.where(unscaled == 0, 0, query * unscaled)
    return {
        "query": (unscaled * spec.scale_beside(unscaled, operands)).astype(spec.dtype),
        "scale": _of_scale(operands.scale, products),
    }


def _of_scale(scale: Array, parts: Array) -> Array:
    """The sum over parts (B, ...) that is the gradient of a scale (1,) or (B,)."""
    over = tuple(range(1, parts.ndim)) if scale.shape[0] > 1 else None
    return parts.sum(axis=over).reshape(-1)


@partial(jax.jit, static_argnums=(0, 1))
def tangent(kernels: Kernels, spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
    """Tangents of the output and of the log-sum-exp along what moves."""

    def kernel(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        rows = TangentRows(*(arrays.get(name) for name in TangentRows._fields))  # type: ignore[arg-type]
        moving = Tangents(**tangents_of(arrays))
        return context.tangent(kernels, spec, _operands_of(arrays), rows, moving)

    moving = tangents_of(arrays)
    top, rest = unkept(arrays["top"], arrays["rest"])
    of_sinks = None
    t_sinks = moving.pop("sinks", None)
    if t_sinks is not None:
        weights = sink_weights(arrays["sinks"], top, rest, kernels.unit(spec))
        of_sinks = weights * of_heads(t_sinks, weights)
    if not moving:
        assert of_sinks is not None
        t_out = -of_sinks[..., None] * arrays["out"].astype(of_sinks.dtype)
        return t_out.astype(spec.dtype), of_sinks
    held = _beside(arrays) | {"top": top, "rest": rest, "out": arrays["out"]}
    held |= {f"t_{name}": x for name, x in moving.items()}
    if of_sinks is not None:
        held["of_sinks"] = of_sinks
    places = tuple(sharding.partition(arrays[name]) for name in ("out", "rest"))
    return run(kernel, kernels, spec, held, TANGENTS, places)


@partial(jax.jit, static_argnums=(0, 1, 2))
def backward_tangent(
    kernels: Kernels, spec: AttentionSpec, wanted: tuple[str, ...], arrays: Arrays
) -> tuple[Array, ...]:
    """Tangents of the gradients that are wanted, along what moves.

    The arrays hold the tangents of the results along the same, t_out and t_lse.
    """
    of_kernel = tuple(name for name in ("query", "key", "value", "bias", "scale") if name in wanted)

    def kernel(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        names = BackwardTangentRows._fields
        rows = BackwardTangentRows(*(arrays.get(name) for name in names))  # type: ignore[arg-type]
        own, moving = _operands_of(arrays), Tangents(**tangents_of(arrays))
        return context.backward_tangent(kernels, spec, own, rows, moving, wanted=of_kernel)

    operands, moving = _operands_of(arrays), tangents_of(arrays)
    t_sinks = moving.pop("sinks", None)
    out, t_out, t_lse = (arrays[name] for name in ("out", "t_out", "t_lse"))
    top, rest = unkept(arrays["top"], arrays["rest"])
    d_out = _cotangent(spec, operands, arrays["d_out"])
    term = row_term(top, out, d_out, arrays.get("d_lse", 0))
    t_term = row_term(top, t_out, d_out, arrays.get("td_lse", 0))
    held = _beside(arrays) | {"top": top, "rest": rest, "d_out": d_out}
    if "td_out" in arrays:
        held["td_out"] = _cotangent(spec, operands, arrays["td_out"])
        t_term = t_term + row_term(top, out, held["td_out"])
    held |= {f"t_{name}": x for name, x in moving.items()}
    held |= {"row_term": term, "t_row_term": t_term, "t_lse": t_lse}
    gradients: Arrays = {}
    if of_kernel:
        results = tuple("by_scale" if name == "scale" else name for name in of_kernel)
        rows = sharding.partition(arrays["rest"])
        places = tuple(
            rows if name == "scale" else sharding.partition(arrays[name]) for name in of_kernel
        )
        found = run(kernel, kernels, spec, held, results, places)
        gradients = dict(zip(of_kernel, found, strict=True))
    if "scale" in wanted:
        assert operands.scale is not None
        gradients["scale"] = _of_scale(operands.scale, gradients["scale"])
    if "sinks" in wanted:
        assert operands.sinks is not None
        weights = sink_weights(operands.sinks, top, rest, kernels.unit(spec))
        apart = -t_lse if t_sinks is None else of_heads(t_sinks, t_lse) - t_lse
        gradients["sinks"] = _of_sinks(operands.sinks, -weights * (apart * term + t_term))
    return tuple(gradients[name] for name in wanted)


def run(
    kernel: Kernel,
    kernels: Kernels,
    spec: AttentionSpec,
    arrays: Arrays,
    results: tuple[str, ...],
    places: tuple[Any, ...],
) -> tuple[Array, ...]:
    """The kernel's results: on sharded arrays, made where those are."""
    # A device's part of a call is for no partitioner to cut.
    can_partition = kernels.can_partition and spec.context is None
    takes_parts = kernels.takes_parts
    each = per_shard(kernel, results, takes_parts=takes_parts) if can_partition else kernel
    found = per_explicit_shard(each, results, takes_parts=takes_parts)(spec, arrays)
    placed = (sharding.placed(x, place) for x, place in zip(found, places, strict=True))
    return sharding.varying_as(tuple(placed), arrays)
