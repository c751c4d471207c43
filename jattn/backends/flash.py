"""The `flash` backend: blocked online-softmax attention in Pallas GPU kernels.

Two families of kernels, forward and backward: for Hopper GPUs (`pallas_kernels.hopper`), and
portable ones for every NVIDIA GPU from Ampere on (`pallas_kernels.portable`), which do what
Hopper's do not. `backends.table` has the order in which they are tried.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from pallas_kernels.hopper.plan import Plan as HopperPlan
    from pallas_kernels.portable.plan import Plan as PortablePlan

__all__ = [
    "attend_on_hopper",
    "attend_portably",
    "chunked_gradient_bytes",
    "hopper_gradient_bytes",
    "hopper_kernel",
    "interpreted",
    "portable_gradient_bytes",
    "portable_kernel",
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


def hopper_kernel(spec: AttentionSpec, target: Target) -> str:
    """What runs by Hopper kernels, and what of it does not."""
    part = limits.portable_part(spec)
    by = "Pallas Mosaic GPU, Hopper" + _in_parts(spec, "hopper") + _by_counter(spec)
    return by + (f"; {part}: Pallas, portable" if part else "")


def portable_kernel(spec: AttentionSpec, target: Target) -> str:
    """What runs by portable ones."""
    return "Pallas, portable" + _in_parts(spec, "portable")


def _in_parts(spec: AttentionSpec, family: Family) -> str:
    """Into how many parts forward cuts the keys, where tiles of queries are few, in words."""
    if spec.is_empty or spec.context is not None:
        return ""
    plan = _forward_plan(spec, family)
    # Where thread blocks read equal shares of all keys, some rows have fewer.
    parts = f"up to {plan.splits}" if getattr(plan, "share", 0) else plan.splits
    return f", keys in {parts} parts, joined by a kernel" if plan.splits > 1 else ""


def _by_counter(spec: AttentionSpec) -> str:
    """Whether Hopper's thread blocks take forward's tiles as they come, in words."""
    from pallas_kernels.hopper.plan import make_plan  # imports jattn, in a circle

    packed = spec.has_segments and not spec.is_empty and spec.context is None
    return ", tiles of documents from a counter" if packed and make_plan(spec).counted else ""


def _forward_plan(spec: AttentionSpec, family: Family) -> HopperPlan | PortablePlan:
    """Forward's launch; these import jattn, in a circle."""
    if family == "hopper":
        from pallas_kernels.hopper.plan import make_plan

        return make_plan(spec)
    from pallas_kernels.portable import plan
    from pallas_kernels.portable.tiles import forward_tiles

    return plan.make_plan(spec, forward_tiles(spec))


def hopper_gradient_bytes(spec: AttentionSpec, target: Target) -> int:
    """Bytes that the gradient's computation holds, by the Hopper kernels."""
    from pallas_kernels.hopper.backward_bytes import backward_bytes  # imports jattn, in a circle
    from pallas_kernels.hopper.plan import make_plan

    # Copies of a bias and of its gradient that end within a tile; bits of a mask, both ways round
    # where dQ has a kernel of its own.
    leaves = limits.leaves_backward(spec, wants_bias=False)
    sums = sums_gradient(spec) and not leaves
    writes = writes_gradient(spec) and not leaves
    apart = limits.has_dq_apart(spec, deterministic=is_deterministic()) and not leaves
    beside = copied_bytes(spec) * (1 + (sums or writes))
    beside += limits.words_bytes(spec) * (1 + apart)
    beside += sum_tiles.partial_bytes(spec) if sums else 0
    portable = _portable_backward_bytes(spec) if limits.portable_part(spec) else 0
    plan = make_plan(spec)
    before = plan.part_bytes + plan.folded_bytes  # forward's
    if leaves:
        return max(portable, before) + beside
    own = backward_bytes(spec, deterministic=is_deterministic(), wants_bias=sums)
    return max(own, portable, before) + beside


def portable_gradient_bytes(spec: AttentionSpec, target: Target) -> int:
    """Bytes that the gradient's computation holds, by the portable kernels."""
    parts = _forward_plan(spec, "portable").part_bytes
    return max(_portable_backward_bytes(spec), parts)


def chunked_gradient_bytes(spec: AttentionSpec, target: Target) -> int:
    """The same with the query-chunked forward, which splits no keys."""
    return _portable_backward_bytes(spec)


def _portable_backward_bytes(spec: AttentionSpec) -> int:
    rows = spec.batch * spec.queries * spec.heads
    held = rows * 4 * 5  # log-sum-exp in two numbers, as saved and by head, and row term of a row
    if (terms := term_count(spec)) > 1:
        width = spec.head_dim + spec.value_dim
        held += (rows + spec.batch * spec.keys * spec.kv_heads) * width * 2 * terms
    return held + copied_mask_bytes(spec.mask_shape) + bias_parts.partial_bytes(spec)
