"""Attention by a pair of kernels as a differentiable function, whose backward recomputes.

Forward saves its arguments, the output and the log-sum-exp; the backward kernels make the weights
again from these. What is one number a row is made here, in `jnp`: the row term
D = rowsum(O dO) - dlse, and the gradient of the sinks, -sum over rows of P_sink D.
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

    def forward(self, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]: ...

    def backward(
        self,
        spec: AttentionSpec,
        operands: Operands,
        lse: Array,
        row_term: Array,
        d_out: Array,
        *,
        wants_bias: bool,
    ) -> tuple[Array, ...]: ...

    @property
    def can_partition(self) -> bool:
        """Whether the partitioner may cut a call."""


def attend(kernels: Kernels, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
    """Output (B, T, N, D) and log-sum-exp (B, T, N)."""
    with naming_eager():
        return _attend(spec, kernels, reverse_only(sharding.varying_alike(operands)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(spec: AttentionSpec, kernels: Kernels, operands: Operands) -> tuple[Array, Array]:
    def kernel(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        return kernels.forward(spec, Operands(**arrays))

    arrays = {name: x for name, x in operands._asdict().items() if x is not None}
    b, t, n, _ = sharding.partition(operands.query)
    places = (jax.P(b, t, n), jax.P(b, t, n))
    out, lse = _run(kernel, kernels, spec, arrays, RESULTS, places)
    return out, lse


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Wanted:
    """Which gradients are, of those that cost something to leave in."""

    bias: bool


type _Saved = tuple[Operands, Array, Array, _Wanted]


def _attend_forward(
    spec: AttentionSpec, kernels: Kernels, marked: Operands
) -> tuple[tuple[Array, Array], _Saved]:
    operands: Operands = jax.tree.map(lambda x: x.value, marked)
    wants_bias = marked.bias is not None and marked.bias.perturbed  # type: ignore[attr-defined]
    out, lse = named(*_attend(spec, kernels, operands))
    return (out, lse), (operands, out, lse, _Wanted(bool(wants_bias)))


def _attend_backward(
    spec: AttentionSpec, kernels: Kernels, saved: _Saved, gradients: tuple[Any, Any]
) -> tuple[Operands]:
    operands, out, lse, wanted = saved
    d_out, d_lse = (
        sharding.varying_as(jnp.zeros_like(x), operands) if isinstance(d, SymbolicZero) else d
        for x, d in zip((out, lse), gradients, strict=True)
    )
    backward = first_order_only(partial(_backward, spec, kernels, wanted))
    return (backward(operands, out, lse, d_out, d_lse),)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _backward(
    spec: AttentionSpec,
    kernels: Kernels,
    wanted: _Wanted,
    operands: Operands,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array,
) -> Operands:
    def kernel(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        own = {name: x for name, x in arrays.items() if name in Operands._fields}
        saved = (arrays[name] for name in ("lse", "row_term", "d_out"))
        return kernels.backward(spec, Operands(**own), *saved, wants_bias=wanted.bias)

    d_out = d_out.astype(spec.dtype)
    if operands.query_lengths is not None:
        d_out = past_zeroed(d_out, operands.query_lengths)
    row_term = jnp.einsum("btnd,btnd->btn", out, d_out, preferred_element_type=jnp.float32) - d_lse
    row_term = jnp.where(lse > -jnp.inf, row_term, 0)
    arrays = {
        name: x for name, x in operands._asdict().items() if x is not None and name != "sinks"
    }
    arrays |= {"lse": lse, "row_term": row_term, "d_out": d_out}
    results = (*GRADIENTS, "bias") if wanted.bias else GRADIENTS
    places = tuple(sharding.partition(arrays[name]) for name in results)
    found = _run(kernel, kernels, spec, arrays, results, places)
    sinks = None
    if operands.sinks is not None:
        weights = jnp.where(lse > -jnp.inf, jnp.exp(operands.sinks.astype(lse.dtype) - lse), 0)
        sinks = -jnp.sum(weights * row_term, axis=(0, 1)).astype(operands.sinks.dtype)
    return Operands(**dict(zip(results, found, strict=True)), sinks=sinks)


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
