"""The `flash` backend: blocked online-softmax attention in Pallas GPU kernels.

Two families of kernels, forward and backward: for Hopper GPUs (`pallas_kernels.hopper`), and
portable ones for every NVIDIA GPU from Ampere on (`pallas_kernels.portable`), which do what
Hopper's do not. `backends.table` has the order in which they are tried.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from jax import Array

from jattn.backends import elsewhere, kernels
from jattn.backends.kernels import Family
from jattn.call.determinism import is_deterministic
from jattn.call.spec import AttentionSpec, Operands
from jattn.call.target import Target
from jattn.transforms import derivatives
from pallas_kernels.hopper import limits, sum_tiles
from pallas_kernels.hopper.bias_form import copied_bytes, sums_gradient, writes_gradient
from pallas_kernels.portable import bias_parts
from pallas_kernels.portable.precision import term_count
from pallas_kernels.portable.reach import copied_bytes as copied_mask_bytes

__all__ = [
    "attend_on_hopper",
    "attend_portably",
    "hopper_gradient_bytes",
    "interpreted",
    "portable_gradient_bytes",
]


def interpreted(family: Family = "hopper") -> AbstractContextManager[None]:
    """Runs the kernels' text on a CPU: slow, and only to test it."""
    return kernels.only(family, interpret=True)


def attend_on_hopper(
    spec: AttentionSpec, operands: Operands, target: Target
) -> tuple[Array, Array]:
    """Output (B, T, N, D) and log-sum-exp (B, T, N), by the Hopper kernels."""
    return derivatives.attend(elsewhere.kernels_anywhere("hopper", "flash"), spec, operands)


def attend_portably(spec: AttentionSpec, operands: Operands, target: Target) -> tuple[Array, Array]:
    """The same by the portable kernels."""
    return derivatives.attend(elsewhere.kernels_anywhere("portable", "flash"), spec, operands)


def hopper_gradient_bytes(spec: AttentionSpec, target: Target) -> int:
    """Bytes that the gradient's computation holds, by the Hopper kernels."""
    from pallas_kernels.hopper.backward_bytes import backward_bytes  # imports jattn, in a circle

    # Copies of a bias and of its gradient that end within a tile; bits of a mask, both ways round
    # where dQ has a kernel of its own.
    leaves = limits.leaves_backward(spec, wants_bias=False)
    sums = sums_gradient(spec) and not leaves
    writes = writes_gradient(spec) and not leaves
    apart = limits.has_dq_apart(spec, deterministic=is_deterministic()) and not leaves
    beside = copied_bytes(spec) * (1 + (sums or writes))
    beside += limits.words_bytes(spec) * (1 + apart)
    beside += sum_tiles.partial_bytes(spec) if sums else 0
    portable = portable_gradient_bytes(spec, target) if limits.portable_part(spec) else 0
    if leaves:
        return portable + beside
    own = backward_bytes(spec, deterministic=is_deterministic(), wants_bias=sums)
    return max(own, portable) + beside


def portable_gradient_bytes(spec: AttentionSpec, target: Target) -> int:
    """Bytes that the gradient's computation holds, by the portable kernels."""
    rows = spec.batch * spec.queries * spec.heads
    held = rows * 4 * 5  # log-sum-exp in two numbers, as saved and by head, and row term of a row
    if (terms := term_count(spec)) > 1:
        width = spec.head_dim + spec.value_dim
        held += (rows + spec.batch * spec.keys * spec.kv_heads) * width * 2 * terms
    return held + copied_mask_bytes(spec.mask_shape) + bias_parts.partial_bytes(spec)
