"""The `flash` backend: blocked online-softmax attention in Pallas GPU kernels.

Forward is a kernel for Hopper GPUs (`pallas_kernels.hopper`); backward recomputes in query chunks,
from the output and log-sum-exp that forward saves, in linear memory like it.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial

import jax
from jax import Array

from jattn import memory_efficient, query_chunks, sharding
from jattn.folding import folds_into_batch
from jattn.per_shard import per_shard
from jattn.reverse_only import first_order_only, naming_eager, reverse_only
from jattn.spec import AttentionSpec, Operands
from jattn.target import Target
from jattn.tiles import Chunks
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
    return (
        "Pallas Mosaic GPU, Hopper; backward in XLA"
        if not refusals(spec, target)
        else "Pallas flash attention"
    )


def attend(spec: AttentionSpec, operands: Operands, target: Target) -> tuple[Array, Array]:
    """Output (B, T, N, D) and log-sum-exp (B, T, N)."""
    chunks = memory_efficient.choose_chunks(spec, target)
    with naming_eager():
        inputs = reverse_only(sharding.varying_alike(operands))
        return _attend(spec, chunks, _interpreted.value, inputs)


def gradient_bytes(spec: AttentionSpec, target: Target) -> int:
    """Bytes that the gradient's computation holds: those of the query chunks of backward."""
    return memory_efficient.gradient_bytes(spec, target)


def _forward(spec: AttentionSpec, interpret: bool, operands: Operands) -> tuple[Array, Array]:
    from pallas_kernels.hopper.forward import forward  # imports Mosaic GPU

    run = partial(forward, interpret=interpret)
    b, t, n, _ = sharding.partition(operands.query)
    results = (jax.P(b, t, n), jax.P(b, t, n))
    whole = folds_into_batch(per_shard(run))
    out, lse = sharding.in_auto_mode(partial(whole, spec), results)(operands)
    return sharding.varying_as((out, lse), operands)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    spec: AttentionSpec, chunks: Chunks, interpret: bool, operands: Operands
) -> tuple[Array, Array]:
    return _forward(spec, interpret, operands)


type _Saved = tuple[Operands, Array, Array]


def _attend_forward(
    spec: AttentionSpec, chunks: Chunks, interpret: bool, operands: Operands
) -> tuple[tuple[Array, Array], _Saved]:
    out, lse = _forward(spec, interpret, operands)
    return (out, lse), (operands, out, lse)


def _attend_backward(
    spec: AttentionSpec,
    chunks: Chunks,
    interpret: bool,
    saved: _Saved,
    gradients: tuple[Array, Array],
) -> tuple[Operands]:
    backward = first_order_only(partial(query_chunks.backward, spec, chunks))
    found = backward(*saved, *gradients)
    return (Operands(found.query, found.key, found.value, sinks=found.sinks),)


_attend.defvjp(_attend_forward, _attend_backward)
