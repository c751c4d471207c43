"""The `flash` backend: blocked online-softmax attention in Pallas GPU kernels.

Forward and backward are kernels for Hopper GPUs (`pallas_kernels.hopper`). Backward recomputes the
weights from the log-sum-exp that forward saves.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jattn import sharding
from jattn.determinism import is_deterministic
from jattn.folding import Arrays, Kernel, folds_into_batch
from jattn.masking import past_zeroed
from jattn.per_shard import GRADIENTS, RESULTS, per_shard
from jattn.reverse_only import first_order_only, naming_eager, reverse_only
from jattn.spec import AttentionSpec, Operands
from jattn.target import Target
from pallas_kernels.hopper import limits

__all__ = ["attend", "gradient_bytes", "interpreted", "kernel", "refusals"]

_interpreted = jax.make_user_context(False)


@contextmanager
def interpreted() -> Generator[None]:
    """Runs the Hopper kernel's text on a CPU, thread by thread: slow, and only to test it."""
    with _interpreted(True):
        yield


def refusals(spec: AttentionSpec, target: Target) -> list[str]:
    """Why no flash kernel can do the call; empty if one can."""
    if not target.is_nvidia and not _interpreted.value:
        return [f"needs an NVIDIA GPU of compute capability 8.0 or later, the target is {target}"]
    if target.compute_capability != (9, 0) and not _interpreted.value:
        return [f"its kernels are for compute capability 9.0, the target is {target}"]
    return limits.refusals(spec)


def kernel(spec: AttentionSpec, target: Target) -> str:
    """What runs, in words."""
    if refusals(spec, target):
        return "Pallas flash attention"
    return "Pallas Mosaic GPU, Hopper"


def attend(spec: AttentionSpec, operands: Operands, target: Target) -> tuple[Array, Array]:
    """Output (B, T, N, D) and log-sum-exp (B, T, N)."""
    how = _How(is_deterministic(), _interpreted.value)
    with naming_eager():
        return _attend(spec, how, reverse_only(sharding.varying_alike(operands)))


def gradient_bytes(spec: AttentionSpec, target: Target) -> int:
    """Bytes that the gradient's computation holds."""
    # dQ in float32 where thread blocks add to it; log-sum-exp, in two bases, and row term of a row.
    apart = limits.has_dq_apart(spec, deterministic=is_deterministic())
    columns = 0 if apart else -(-spec.head_dim // 64) * 64
    return spec.batch * spec.queries * spec.heads * 4 * (columns + 3)


class _How(NamedTuple):
    """How a call is computed, beside what."""

    deterministic: bool
    interpret: bool


def _kernel(
    kernel: Kernel, how: _How, spec: AttentionSpec, arrays: Arrays, results: str, places: Any
) -> tuple[Array, ...]:
    """The kernel's call: vmap folded into the batch, sharded arrays where they are."""
    # The interpreter's effects cannot be partitioned.
    whole = folds_into_batch(kernel if how.interpret else per_shard(kernel, results))
    found = sharding.in_auto_mode(partial(whole, spec), places)(arrays)
    return sharding.varying_as(found, arrays)


def _forward(spec: AttentionSpec, how: _How, operands: Operands) -> tuple[Array, Array]:
    from pallas_kernels.hopper.forward import forward  # imports Mosaic GPU

    def kernel(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        return forward(spec, Operands(**arrays), interpret=how.interpret)

    arrays = {name: x for name, x in operands._asdict().items() if x is not None}
    b, t, n, _ = sharding.partition(operands.query)
    out, lse = _kernel(kernel, how, spec, arrays, RESULTS, (jax.P(b, t, n), jax.P(b, t, n)))
    return out, lse


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(spec: AttentionSpec, how: _How, operands: Operands) -> tuple[Array, Array]:
    return _forward(spec, how, operands)


type _Saved = tuple[Operands, Array, Array]


def _attend_forward(
    spec: AttentionSpec, how: _How, operands: Operands
) -> tuple[tuple[Array, Array], _Saved]:
    out, lse = _forward(spec, how, operands)
    return (out, lse), (operands, out, lse)


def _attend_backward(
    spec: AttentionSpec, how: _How, saved: _Saved, gradients: tuple[Array, Array]
) -> tuple[Operands]:
    return (first_order_only(partial(_backward, spec, how))(*saved, *gradients),)


def _backward(
    spec: AttentionSpec,
    how: _How,
    operands: Operands,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array,
) -> Operands:
    from pallas_kernels.hopper.backward import backward  # imports Mosaic GPU

    def kernel(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        operands = {name: x for name, x in arrays.items() if name in Operands._fields}
        return backward(
            spec,
            Operands(**operands),
            arrays["lse"],
            arrays["row_term"],
            arrays["d_out"],
            deterministic=how.deterministic,
            interpret=how.interpret,
        )

    d_out = d_out.astype(spec.dtype)
    if operands.query_lengths is not None:
        d_out = past_zeroed(d_out, operands.query_lengths)
    row_term = jnp.einsum("btnd,btnd->btn", out, d_out, preferred_element_type=jnp.float32) - d_lse
    row_term = jnp.where(lse > -jnp.inf, row_term, 0)
    arrays = {
        name: x for name, x in operands._asdict().items() if x is not None and name != "sinks"
    }
    arrays |= {"lse": lse, "row_term": row_term, "d_out": d_out}
    places = tuple(map(sharding.partition, operands[:3]))
    query, key, value = _kernel(kernel, how, spec, arrays, GRADIENTS, places)
    sinks = None
    if operands.sinks is not None:
        weights = jnp.where(lse > -jnp.inf, jnp.exp(operands.sinks.astype(lse.dtype) - lse), 0)
        sinks = -jnp.sum(weights * row_term, axis=(0, 1)).astype(operands.sinks.dtype)
    return Operands(query, key, value, sinks=sinks)


_attend.defvjp(_attend_forward, _attend_backward)
