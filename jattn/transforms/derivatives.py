"""Attention by a pair of kernels as a differentiable function, whose backward recomputes.

Forward saves its arguments, the output and the log-sum-exp; the backward kernels make the weights
again from these. What is one number a row is made here, in `jnp`: the row term
D = rowsum(O dO) - dlse, and what the sinks add to the sum, and their gradient,
-sum over rows of P_sink D.

The log-sum-exp is kept as two numbers, top unit + rest: the row's maximum in the kernels' unit, and
the logarithm of the sum of exponentials beside it. A float32 beside 1e9 has steps of 64: in one
number the sum would be lost, and all weights of a row be wrong by one factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jattn.call.masking import past_zeroed
from jattn.call.spec import AttentionSpec, Operands
from jattn.transforms import sharding
from jattn.transforms.folding import Arrays, Kernel, folds_into_batch
from jattn.transforms.per_shard import GRADIENTS, RESULTS, per_explicit_shard, per_shard
from jattn.transforms.rematerialisation import named
from jattn.transforms.reverse_only import first_order_only, naming_eager, reverse_only

__all__ = ["Kernels", "attend"]


class Kernels(Protocol):
    """A pair of kernels, forward and backward, hashable; `backends.kernels` explains arguments."""

    def forward(self, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array, Array]: ...

    def backward(
        self,
        spec: AttentionSpec,
        operands: Operands,
        top: Array,
        rest: Array,
        row_term: Array,
        d_out: Array,
        *,
        wants_bias: bool,
        wants_scale: bool,
    ) -> tuple[Array, ...]: ...

    def unit(self, spec: AttentionSpec) -> float:
        """What 1 in `top` is of the natural logarithm."""

    @property
    def can_partition(self) -> bool:
        """Whether the partitioner may cut a call."""


def attend(kernels: Kernels, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
    """Output (B, T, N, D) and log-sum-exp (B, T, N)."""
    with naming_eager():
        out, lse, _ = _attend(spec, kernels, reverse_only(sharding.varying_alike(operands)))
    return out, lse


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    spec: AttentionSpec, kernels: Kernels, operands: Operands
) -> tuple[Array, Array, _Sums]:
    """Output, log-sum-exp and the same in two numbers, which has no gradient of its own."""

    def kernel(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        return kernels.forward(spec, Operands(**arrays))

    arrays = {name: x for name, x in operands._asdict().items() if x is not None}
    b, t, n, _ = sharding.partition(operands.query)
    places = (jax.P(b, t, n),) * 3
    out, top, rest = _run(kernel, kernels, spec, arrays, RESULTS, places)
    unit = kernels.unit(spec)
    if operands.sinks is not None:
        rest = jnp.logaddexp(rest, _above(operands.sinks, top, unit))
    return out, _log_sum_exp(top, rest, unit), (top, rest)


def _log_sum_exp(top: Array, rest: Array, unit: float) -> Array:
    return jnp.where(top > -jnp.inf, _finite(top) * unit + rest, -jnp.inf)


def _above(sinks: Array, top: Array, unit: float) -> Array:
    """The sinks (N,) less the rows' maxima (B, T, N)."""
    return sinks.astype(top.dtype)[None, None] - _finite(top) * unit


def _finite(top: Array) -> Array:
    """The maxima with 0 for a row that sees no key."""
    return jnp.where(top > -jnp.inf, top, 0)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Wanted:
    """Which gradients are, of those that cost something to leave in."""

    bias: bool
    scale: bool

    @staticmethod
    def of(marked: Any) -> _Wanted:
        """Of the operands, marked by whether they are differentiated."""
        given = (marked.bias, marked.scale)
        return _Wanted(*(x is not None and bool(x.perturbed) for x in given))


type _Sums = tuple[Array, Array]  # top and rest
type _Saved = tuple[Operands, Array, _Sums, _Wanted]


def _attend_forward(
    spec: AttentionSpec, kernels: Kernels, marked: Operands
) -> tuple[tuple[Array, Array, _Sums], _Saved]:
    operands: Operands = jax.tree.map(lambda x: x.value, marked)
    out, _, sums = _attend(spec, kernels, operands)
    out, sums = named(out, sums)
    lse = _log_sum_exp(*sums, kernels.unit(spec))
    return (out, lse, sums), (operands, out, sums, _Wanted.of(marked))


def _attend_backward(
    spec: AttentionSpec, kernels: Kernels, saved: _Saved, gradients: tuple[Any, Any, Any]
) -> tuple[Operands]:
    operands, out, sums, wanted = saved
    d_out, d_lse = (
        sharding.varying_as(jnp.zeros_like(x), operands) if isinstance(d, SymbolicZero) else d
        for x, d in zip((out, sums[0]), gradients[:2], strict=True)
    )
    backward = first_order_only(partial(_backward, spec, kernels, wanted))
    return (backward(operands, out, sums, d_out, d_lse),)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _backward(
    spec: AttentionSpec,
    kernels: Kernels,
    wanted: _Wanted,
    operands: Operands,
    out: Array,
    sums: _Sums,
    d_out: Array,
    d_lse: Array,
) -> Operands:
    def kernel(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        own = {name: x for name, x in arrays.items() if name in Operands._fields}
        saved = (arrays[name] for name in ("top", "rest", "row_term", "d_out"))
        return kernels.backward(
            spec, Operands(**own), *saved, wants_bias=wanted.bias, wants_scale=wanted.scale
        )

    d_out = d_out.astype(spec.dtype)
    if operands.query_lengths is not None:
        d_out = past_zeroed(d_out, operands.query_lengths)
    row_term = jnp.einsum("btnd,btnd->btn", out, d_out, preferred_element_type=jnp.float32) - d_lse
    top, rest = sums
    row_term = jnp.where(top > -jnp.inf, row_term, 0)
    arrays = {
        name: x for name, x in operands._asdict().items() if x is not None and name != "sinks"
    }
    arrays |= {"top": top, "rest": rest, "row_term": row_term, "d_out": d_out}
    results = (*GRADIENTS, "bias") if wanted.bias else GRADIENTS
    places = tuple(sharding.partition(arrays[name]) for name in results)
    found = _run(kernel, kernels, spec, arrays, results, places)
    sinks = None
    if operands.sinks is not None:
        above = _above(operands.sinks, top, kernels.unit(spec))
        weights = jnp.where(top > -jnp.inf, jnp.exp(jnp.minimum(above - rest, 0)), 0)
        sinks = -jnp.sum(weights * row_term, axis=(0, 1)).astype(operands.sinks.dtype)
    gradients = dict(zip(results, found, strict=True))
    if wanted.scale:
        gradients |= _by_scale(spec, operands, gradients["query"])
    return Operands(**gradients, sinks=sinks)


def _by_scale(spec: AttentionSpec, operands: Operands, unscaled: Array) -> Arrays:
    """The gradients of query and scale from dS K, which is the one's if the scale is 1.

    The other's is the sum over dS Q Kᵀ. A query that gets no gradient may hold anything.
    """
    query = operands.query.astype(unscaled.dtype)
    products = jnp.where(unscaled == 0, 0, query * unscaled)
    return {
        "query": (unscaled * spec.scale_beside(unscaled, operands)).astype(spec.dtype),
        "scale": jnp.sum(products).reshape(1),
    }


def _run(
    kernel: Kernel,
    kernels: Kernels,
    spec: AttentionSpec,
    arrays: Arrays,
    results: tuple[str, ...],
    places: tuple[Any, ...],
) -> tuple[Array, ...]:
    """The kernel's call: vmap folded into the batch, sharded arrays where they are."""
    each = per_shard(kernel, results) if kernels.can_partition else kernel
    folding = folds_into_batch(each, sums_bias="bias" in results)
    found = per_explicit_shard(folding, results)(spec, arrays)
    placed = (sharding.placed(x, place) for x, place in zip(found, places, strict=True))
    return sharding.varying_as(tuple(placed), arrays)
