"""Keys and values of any finite size, where nothing sees them, change no output and no gradient.

Each kind of hiding, with the largest number of the dtype in every hidden key and value: Q Kᵀ and dO
Vᵀ are then infinite or NaN there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.backends import CHUNKED, EAGER, Backend, quick_jit
from tests.cases import first
from tests.portable.exact import BOTH, ON_GPU, ampere

__all__ = ["ampere"]

QUERIES, KEYS = 24, 40
HIDDEN = slice(30, 37)  # keys that no query sees
SEEN = (np.arange(KEYS) < HIDDEN.start) | (np.arange(KEYS) >= HIDDEN.stop)

WAYS: dict[str, dict[str, Any]] = {
    "mask": {"mask": jnp.asarray(SEEN)[None, None, None]},
    "bias": {"bias": jnp.where(jnp.asarray(SEEN), 0.5, -jnp.inf)[None, None, None]},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (3, 4)},
    "segments": {
        "query_segment_ids": jnp.zeros((1, QUERIES), jnp.int32),
        "key_value_segment_ids": jnp.asarray(~SEEN, jnp.int32)[None],
    },
}


def check(backend: Backend, dtype: str, way: str) -> None:
    q, d_out = jax.random.normal(jax.random.key(0), (2, 1, QUERIES, 2, 16)).astype(dtype)
    k, v = jax.random.normal(jax.random.key(1), (2, 1, KEYS, 2, 16)).astype(dtype)
    most = float(jnp.finfo(dtype).max)

    @quick_jit
    def run(*arrays: jax.Array) -> tuple[Any, Any]:
        out, vjp = jax.vjp(lambda *x: backend(*x, **WAYS[way]), *arrays)
        return out, vjp(d_out)

    clean = run(q, *(x.at[:, HIDDEN].set(0) for x in (k, v)))
    # A bias is added to what its key gives, so that this must be finite.
    large = run(q, k.at[:, HIDDEN].set(0 if way == "bias" else most), v.at[:, HIDDEN].set(most))
    for expected, found in zip(jax.tree.leaves(clean), jax.tree.leaves(large), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    d_q, d_k, d_v = large[1]
    assert jnp.abs(d_q).max() > 0
    assert (d_k[:, HIDDEN] == 0).all()
    assert (d_v[:, HIDDEN] == 0).all()


@pytest.mark.parametrize("way", first(3, WAYS))
@pytest.mark.parametrize("dtype", first(1, ["float32", "bfloat16"]))
@pytest.mark.parametrize("backend", [EAGER, CHUNKED], ids=str)
def test_the_largest_number_stays_hidden(backend: Backend, dtype: str, way: str) -> None:
    check(backend, dtype, way)


@pytest.mark.skipif(ON_GPU, reason="compiled kernels are tried below")
@pytest.mark.parametrize("way", first(1, ["mask", "causal"]))
def test_the_largest_number_stays_hidden_from_interpreted_kernels(way: str) -> None:
    check(BOTH[0], "float32", way)


@pytest.mark.gpu
@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("backend", BOTH, ids=str)
def test_the_largest_number_stays_hidden_from_kernels(
    backend: Backend, dtype: str, way: str
) -> None:
    check(backend, dtype, way)
