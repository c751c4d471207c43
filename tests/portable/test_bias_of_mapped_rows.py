"""A bias that `jax.vmap` maps and the rows of each call share, with an offset for each row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests import formula
from tests.backends import quick_jit
from tests.portable.exact import FLASH
from tests.test_transforms import normal


def gradient(attention: Any, arrays: Any) -> Any:
    """Of a bias for each mapped call: rows that see few keys, and rows that see all."""
    offsets = jnp.array([-20, 40], jnp.int32)

    def loss(bias: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = attention(q, k, v, bias, is_causal=True, query_offset=offsets)
        return (out * jnp.cos(out)).sum()

    q, k, v, bias = arrays
    return jax.vmap(jax.grad(loss), (0, None, None, None))(bias, q, k, v)


@pytest.mark.thorough
def test_each_row_is_skipped_by_its_own_offset() -> None:
    rows = [normal(name, 2, 24, 1, 8) for name in ("q", "k", "v")]
    arrays = (*rows, normal("bias", 3, 1, 1, 24, 24))
    found = quick_jit(lambda arrays: gradient(FLASH, arrays))(arrays)
    formula.check(found, gradient, arrays)
