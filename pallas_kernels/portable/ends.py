"""Where a batch row's queries and keys end, and zeros beyond."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

from pallas_kernels.portable.triton import Mask, load

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["key_limit", "past", "present", "query_limit"]


def key_limit(
    spec: AttentionSpec, refs: SimpleNamespace, batch: Array, block: int
) -> Array | int | None:
    """How many keys the batch row has; None if they fill whole blocks of `block`."""
    if spec.has_key_lengths:
        return jnp.minimum(load(refs.key_lengths, (batch,)), spec.keys)
    return past(spec.keys, block)


def query_limit(
    spec: AttentionSpec, refs: SimpleNamespace, batch: Array, block: int
) -> Array | int | None:
    """How many queries the batch row has; None if they fill whole blocks of `block`."""
    if spec.has_query_lengths:
        return jnp.minimum(load(refs.query_lengths, (batch,)), spec.queries)
    return past(spec.queries, block)


def past(size: int, block: int) -> int | None:
    """The first position that does not exist, if blocks go past it."""
    return size if size % block else None


def present(x: Array, exists: Mask) -> Array:
    """x with zeros in rows that do not exist."""
    return x if exists is None else jnp.where(exists, x, 0.0)
