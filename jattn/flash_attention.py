"""The `flash` backend: blocked online-softmax attention in Pallas GPU kernels.

It carries no kernel yet: it refuses every call, with the reason, and `dot_product_attention` goes
on to the next backend.
"""

from __future__ import annotations

from typing import NoReturn

from jattn.errors import UnsupportedAttentionError
from jattn.spec import AttentionSpec, Operands
from jattn.target import Target

__all__ = ["attend", "gradient_bytes", "refusals"]


def refusals(spec: AttentionSpec, target: Target) -> list[str]:
    """Why no flash kernel can do the call; empty if one can."""
    if not target.is_nvidia:
        return [f"needs an NVIDIA GPU of compute capability 8.0 or later, the target is {target}"]
    return [f"there is no flash kernel for {target} in this version of jattn"]


def attend(spec: AttentionSpec, operands: Operands, target: Target) -> NoReturn:
    """Output (B, T, N, D) and log-sum-exp (B, T, N)."""
    raise UnsupportedAttentionError("; ".join(refusals(spec, target)))


def gradient_bytes(spec: AttentionSpec, target: Target) -> int:
    """Bytes that a fused backward holds: log-sum-exp, row term and dQ's float32 sums."""
    rows = spec.batch * spec.queries * spec.heads
    return rows * (2 + spec.head_dim) * spec.accumulator.itemsize
