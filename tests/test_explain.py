"""What `jattn.explain` says beside the choice: its hints."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jattn


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


class TestHints:
    @pytest.mark.parametrize("kv_heads", [8, 2, 1])
    def test_heads_and_lengths_that_look_swapped(self, kv_heads: int) -> None:
        query, key = shape(2, 8, 1024, 64), shape(2, kv_heads, 1024, 64)
        (hint,) = jattn.explain(query, key, key).hints
        assert "(B, N, T, H)" in hint
        assert "jnp.swapaxes(x, 1, 2)" in hint
        assert f"hint: {hint}" in str(jattn.explain(query, key, key)).splitlines()
        query, key = (shape(2, 1024, n, 64) for n in (8, kv_heads))
        assert jattn.explain(query, key, key).hints == ()

    def test_one_query_of_a_cache_is_no_reason_for_it(self) -> None:
        query, key = shape(2, 1, 8, 64), shape(2, 1024, 8, 64)
        assert jattn.explain(query, key, key).hints == ()
