"""The `memory_efficient` backend: query-chunked attention whose backward recomputes.

Saves q, k, v, the output and the log-sum-exp (as two numbers), never the T x S weights (Rabe and
Staats, "Self-attention Does Not Need O(n^2) Memory", 2021). It has two forms: Pallas kernels for
NVIDIA GPUs from Ampere on (`pallas_kernels.portable`), and loops in XLA, which run anywhere and do
every call.
"""

from __future__ import annotations

from jax import Array

from jattn.backends import elsewhere
from jattn.backends.loops import Loops, choose_chunks
from jattn.call.spec import AttentionSpec, Operands
from jattn.call.target import Target
from jattn.transforms import derivatives

__all__ = [
    "attend",
    "attend_in_kernels",
    "gradient_bytes",
    "kernel",
]


def attend_in_kernels(
    spec: AttentionSpec, operands: Operands, target: Target
) -> tuple[Array, Array]:
    """Output (B, T, N, D) and log-sum-exp (B, T, N), by the Pallas kernels."""
    return derivatives.attend(elsewhere.kernels_anywhere("portable", "chunked"), spec, operands)


def attend(
    spec: AttentionSpec,
    operands: Operands,
    target: Target,
    query_chunk_size: int | None = None,
    key_chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """The same in XLA, with chunk sizes given, or chosen for what one device holds of the call."""
    loops = Loops(target, query_chunk_size, key_chunk_size)
    loops.chunks(spec)
    return derivatives.attend(loops, spec, operands)


def kernel(spec: AttentionSpec, target: Target) -> str:
    """What runs, in words."""
    chunks = choose_chunks(spec, target)
    return f"XLA, chunks of {chunks.queries} queries x {chunks.keys} keys"


def gradient_bytes(spec: AttentionSpec, target: Target) -> int:
    """Bytes that the gradient holds: head-major copies, float32 sums and a few tiles of logits."""
    chunks = choose_chunks(spec, target)
    q_side = spec.batch * spec.queries * spec.heads
    k_side = spec.batch * spec.keys * spec.kv_heads
    copies = q_side * (2 * spec.head_dim + 2 * spec.value_dim) * spec.element_bytes
    copies += k_side * (spec.head_dim + spec.value_dim) * spec.element_bytes
    sums = k_side * (spec.head_dim + spec.value_dim) + 4 * q_side
    tile = chunks.rows * chunks.queries * chunks.keys * spec.heads
    return copies + (sums + 4 * tile) * spec.accumulator.itemsize
