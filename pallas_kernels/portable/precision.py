"""Whether products of float32 are of full precision."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jattn.spec import AttentionSpec

__all__ = ["is_full", "with_precision"]

MOST_ROUNDED = 256  # head dim; over it a tile's parts in TF32 need more registers than there are

# jax's names of it, in small letters; any other lets float32 be rounded to TF32.
_FULL = ("highest", "float32", "f32_f32_f32")


def is_full(precision: str | None) -> bool:
    """Whether this one of jax's names of precisions is that of float32 itself; None is."""
    return precision is None or precision.lower() in _FULL


def with_precision(spec: AttentionSpec) -> AttentionSpec:
    """The call at the precision that it is computed in."""
    if spec.dtype.name != "float32" or max(spec.head_dim, spec.value_dim) <= MOST_ROUNDED:
        return spec
    return replace(spec, precision="highest")
