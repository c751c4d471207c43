"""Attention by a pair of kernels as a differentiable function, whose backward recomputes.

Forward saves its arguments, the output and the log-sum-exp; the backward kernels make the weights
again from these. What is one number a row is made here, in `jnp`: the row term
D = rowsum(O dO) - dlse, and what the sinks add to the sum, and their gradient,
-sum over rows of P_sink D.

The log-sum-exp is kept as two numbers, top unit + rest: the row's maximum in the kernels' unit, and
the logarithm of the sum of exponentials beside it. A float32 beside 1e9 has steps of 64: in one
number the sum would be lost, and all weights of a row be wrong by one factor.

Outside `jax.jit` the results of what is jitted here are what `jax_debug_infs` looks at. They are
finite, but for the log-sum-exp of a row that sees no key where the caller asks for it: such a row's
-inf and 0 are kept as 0 and a number that no sum has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jattn.call.spec import AttentionSpec, Operands
from jattn.transforms import context, sharding
from jattn.transforms.folding import Arrays, Kernel, folds_into_batch
from jattn.transforms.mapped import mapped
from jattn.transforms.per_shard import GRADIENTS, RESULTS, per_explicit_shard, per_shard
from jattn.transforms.rematerialisation import named
from jattn.transforms.reverse_only import first_order_only, naming_eager, reverse_only

__all__ = ["Kernels", "attend", "row_term"]


class Kernels(Protocol):
    """Forward and backward, hashable; `backends.kernels` explains the arguments."""

    def forward(self, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array, Array]: ...

    def backward(
        self,
        spec: AttentionSpec,
        operands: Operands,
        top: Array,
        rest: Array,
        of_output: Array,
        d_out: Array,
        /,
        *,
        wants_bias: bool,
        wants_scale: bool,
    ) -> tuple[Array, ...]: ...

    def unit(self, spec: AttentionSpec) -> float:
        """What 1 in `top` is of the natural logarithm."""

    @property
    def can_partition(self) -> bool:
        """Whether the partitioner may cut a call."""

    @property
    def takes_parts(self) -> bool:
        """Whether parts of a softmax may be computed, each by a call with an offset of its own."""

    @property
    def takes_output(self) -> bool:
        """Whether backward takes the output, and makes the row term, instead of being given it."""


def attend(kernels: Kernels, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
    """Output (B, T, N, D) and log-sum-exp (B, T, N)."""
    arrays = {name: x for name, x in operands._asdict().items() if x is not None}
    with naming_eager():
        found: tuple[Array, Array] = _attend(kernels, spec, arrays)
        return found


# Jitted, so that calls outside `jax.jit` trace and differentiate it once; in line inside of it.
@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _attend(kernels: Kernels, spec: AttentionSpec, arrays: Arrays) -> tuple[Array, Array]:
    out, lse, *_ = mapped(_Attention(kernels), spec, sharding.varying_alike(arrays))
    return out, lse


type _Results = tuple[Array, Array, Array, Array]


@dataclass(frozen=True)
class _Attention:
    """`mapped.Forward` by a pair of kernels: output, log-sum-exp, and the same in two numbers.

    Those have no gradient of their own.
    """

    kernels: Kernels

    def run(self, spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        found: _Results = _forward(self.kernels, spec, arrays)
        return found

    def derivative(self, spec: AttentionSpec, moving: Arrays, fixed: Arrays) -> tuple[Array, ...]:
        return _with_backward(self.kernels, spec, reverse_only(moving), fixed)


@partial(jax.jit, static_argnums=(0, 1))
def _forward(kernels: Kernels, spec: AttentionSpec, arrays: Arrays) -> _Results:
    def kernel(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        return context.forward(kernels, spec, Operands(**arrays))

    b, t, n, _ = sharding.partition(arrays["query"])
    places = (jax.P(b, t, n),) * 3
    out, top, rest = _run(kernel, kernels, spec, arrays, RESULTS, places)
    unit = kernels.unit(spec)
    if "sinks" in arrays:
        rest = jnp.logaddexp(rest, _above(arrays["sinks"], top, unit))
    top, rest = _kept(top, rest)
    return out, _log_sum_exp(kernels, spec, top, rest), top, rest


def _kept(top: Array, rest: Array) -> tuple[Array, Array]:
    """The two numbers as they are handed on and saved: finite."""
    sees_none = top == -jnp.inf
    return jnp.where(sees_none, 0, top), jnp.where(sees_none, _none(rest), rest)


def _unkept(top: Array, rest: Array) -> tuple[Array, Array]:
    """What `_kept` was given."""
    sees_none = rest == _none(rest)
    return jnp.where(sees_none, -jnp.inf, top), jnp.where(sees_none, 0, rest)


def _none(rest: Array) -> float:
    """The logarithm of no sum."""
    return float(np.finfo(rest.dtype).min)


@partial(jax.jit, static_argnums=(0, 1))
def _log_sum_exp(kernels: Kernels, spec: AttentionSpec, top: Array, rest: Array) -> Array:
    """Natural; of a row that sees no key -inf, or where nobody asks for it 0."""
    lse = top * kernels.unit(spec) + rest
    return jnp.where(rest == _none(rest), -jnp.inf if spec.wants_residual else 0, lse)


def _above(sinks: Array, top: Array, unit: float) -> Array:
    """The sinks, (N,) or of each batch row (B, N), less the rows' maxima (B, T, N)."""
    return sinks.astype(top.dtype).reshape(-1, 1, top.shape[2]) - _finite(top) * unit


def _finite(top: Array) -> Array:
    """The maxima with 0 for a row that sees no key; NaN stays NaN."""
    return jnp.where(top == -jnp.inf, 0, top)


type _Saved = tuple[Arrays, Arrays, Array, Array, Array]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_backward(
    kernels: Kernels, spec: AttentionSpec, moving: Arrays, fixed: Arrays
) -> tuple[Array, ...]:
    return mapped(_Attention(kernels), spec, moving | fixed)


def _forward_rule(
    kernels: Kernels, spec: AttentionSpec, moving: Arrays, fixed: Arrays
) -> tuple[_Results, _Saved]:
    out, _, *sums = mapped(_Attention(kernels), spec, moving | fixed)
    out, (top, rest) = named(out, sums)
    lse = _log_sum_exp(kernels, spec, top, rest)
    return (out, lse, top, rest), (moving, fixed, out, top, rest)


def _backward_rule(
    kernels: Kernels, spec: AttentionSpec, saved: _Saved, gradients: _Results
) -> tuple[dict[str, Array | None], None]:
    moving, fixed, *results = saved
    d_out, d_lse, *_ = gradients
    wanted = tuple(name for name in ("bias", "scale", "sinks") if name in moving)
    backward = first_order_only(partial(_backward, kernels, spec, wanted))
    found = backward(Operands(**moving, **fixed), *results, d_out, d_lse)._asdict()
    return {name: found[name] for name in moving}, None


_with_backward.defvjp(_forward_rule, _backward_rule)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(
    kernels: Kernels,
    spec: AttentionSpec,
    wanted: tuple[str, ...],  # of bias, scale and sinks: those that moved
    operands: Operands,
    out: Array,
    top: Array,
    rest: Array,
    d_out: Array,
    d_lse: Array,
) -> Operands:
    def kernel(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        own = {name: x for name, x in arrays.items() if name in Operands._fields}
        top, rest, d_out = (arrays[name] for name in ("top", "rest", "d_out"))
        return context.backward(
            kernels,
            spec,
            Operands(**own),
            (top, rest, arrays[of_output], d_out),
            wants_bias="bias" in wanted,
            wants_scale="scale" in wanted,
        )

    top, rest = _unkept(top, rest)
    d_out = d_out.astype(spec.dtype)
    if operands.query_lengths is not None:
        d_out = context.past_zeroed(spec, d_out, operands.query_lengths)
    term = row_term(top, out, d_out, d_lse)
    of_output = "out" if kernels.takes_output else "row_term"
    arrays = {
        name: x for name, x in operands._asdict().items() if x is not None and name != "sinks"
    }
    arrays |= {"top": top, "rest": rest, "d_out": d_out}
    arrays[of_output] = out if kernels.takes_output else term
    results = (*GRADIENTS, "bias") if "bias" in wanted else GRADIENTS
    places = tuple(sharding.partition(arrays[name]) for name in results)
    found = _run(kernel, kernels, spec, arrays, results, places)
    gradients = dict(zip(results, found, strict=True))
    if "sinks" in wanted:
        assert operands.sinks is not None
        above = _above(operands.sinks, top, kernels.unit(spec))
        weights = jnp.where(top == -jnp.inf, 0, jnp.exp(jnp.minimum(above - rest, 0)))
        summed_over = (0, 1) if operands.sinks.ndim == 1 else 1
        sinks = -jnp.sum(weights * term, axis=summed_over)
        gradients["sinks"] = sinks.astype(operands.sinks.dtype)
    if "scale" in wanted:
        gradients |= _by_scale(spec, operands, gradients["query"])
    return Operands(**gradients)


def row_term(top: Array, out: Array, d_out: Array, d_lse: ArrayLike = 0) -> Array:
    """D = rowsum(O dO) - dlse, (B, T, N), and 0 of a row that sees no key."""
    products = out.astype(top.dtype) * d_out.astype(top.dtype)
    return jnp.where(top == -jnp.inf, 0, products.sum(axis=-1) - d_lse)


def _by_scale(spec: AttentionSpec, operands: Operands, unscaled: Array) -> Arrays:
    """The gradients of query and scale from dS K, which is the one's if the scale is 1.

    The other's is the sum over dS Q Kᵀ. A query that gets no gradient may hold anything.
    """
    assert operands.scale is not None
    own = operands.scale.shape[0] > 1
    query = operands.query.astype(unscaled.dtype)
    products = jnp.where(unscaled == 0, 0, query * unscaled)
    return {
        "query": (unscaled * spec.scale_beside(unscaled, operands)).astype(spec.dtype),
        "scale": products.sum(axis=(1, 2, 3) if own else None).reshape(-1),
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
    # A device's part of a call is for no partitioner to cut.
    can_partition = kernels.can_partition and spec.context is None
    takes_parts = kernels.takes_parts
    each = per_shard(kernel, results, takes_parts=takes_parts) if can_partition else kernel
    folding = folds_into_batch(each, sums_bias="bias" in results)
    found = per_explicit_shard(folding, results, takes_parts=takes_parts)(spec, arrays)
    placed = (sharding.placed(x, place) for x, place in zip(found, places, strict=True))
    return sharding.varying_as(tuple(placed), arrays)
