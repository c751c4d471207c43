"""No batch row, no query or no key: an empty result, or what a query gives that sees nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.backends.flash import interpreted

EMPTY = {"batch": (0, 4, 5), "queries": (2, 0, 5), "keys": (2, 4, 0), "both": (2, 0, 0)}
FUNCTIONS = [
    jattn.dot_product_attention,
    jattn.eager_attention,
    jattn.memory_efficient_attention,
    jattn.flash_attention,
]


@pytest.mark.parametrize("sizes", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_nothing_in_gives_nothing_and_no_keys_give_zeros(function: Any, sizes: Any) -> None:
    b, t, s = sizes
    arrays = {
        "query": jnp.ones((b, t, 4, 8)),
        "key": jnp.ones((b, s, 2, 8)),
        "value": jnp.ones((b, s, 2, 6)),
        "bias": jnp.ones((1, 4, t, s)),
        "sinks": jnp.ones(4),
    }
    options = {"is_causal": True, "key_value_seq_lengths": jnp.zeros(b, jnp.int32)}

    def loss(arrays: Any) -> Any:
        out, lse = function(**arrays, **options, return_residual=True)
        return out.sum(), (out, lse)

    with interpreted("portable"):
        for run in (loss, jax.jit(loss)):
            gradient, (out, lse) = jax.grad(run, has_aux=True)(arrays)
            assert out.shape == (b, t, 4, 6)
            np.testing.assert_array_equal(out, np.zeros((b, t, 4, 6)))
            np.testing.assert_array_equal(lse, np.full((b, t, 4), -np.inf))
            for name, x in arrays.items():
                np.testing.assert_array_equal(gradient[name], np.zeros(x.shape), err_msg=name)


def test_without_a_batch_axis_and_in_chunks() -> None:
    query, key = jnp.ones((3, 2, 8), jnp.bfloat16), jnp.ones((0, 2, 8), jnp.bfloat16)
    out = jattn.memory_efficient_attention(query, key, key, query_chunk_size=2)
    assert out.shape == query.shape
    assert out.dtype == jnp.bfloat16
    assert not out.any()


def test_what_is_refused_otherwise_is_refused() -> None:
    x = jnp.ones((0, 4, 2, 8))
    with pytest.raises(jattn.UnsupportedAttentionError, match="float32"):
        jattn.dot_product_attention(x, x, x, implementation="cudnn")


def test_explain_takes_them() -> None:
    for b, t, s in EMPTY.values():
        query, key = jnp.ones((b, t, 4, 8)), jnp.ones((b, s, 2, 8))
        assert jattn.explain(query, key, key).chosen == "memory_efficient"


def test_heads_and_head_dims_must_be() -> None:
    x = jnp.ones((1, 4, 0, 8))
    with pytest.raises(ValueError, match=r"query must have heads and a head dim above 0"):
        jattn.dot_product_attention(x, x, x)
