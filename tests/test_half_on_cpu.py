"""Half precision where XLA lacks products of it: layouts and transformations on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import jattn
from tests.cases import first

FUNCTIONS = [jattn.memory_efficient_attention, jattn.eager_attention]


def _heads_first(x: Array) -> Array:
    return jnp.swapaxes(x, 1, 2)


def _error(found: Array, expected: Array) -> float:
    return float(np.abs(np.asarray(found, np.float32) - np.asarray(expected)).max())


@pytest.mark.parametrize("function", first(1, FUNCTIONS), ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", first(1, ["bfloat16", "float16"]))
@pytest.mark.parametrize(
    "transform",
    [
        lambda vjp: jax.vmap(vjp, (0, 0, None)),
        lambda vjp: jax.jit(jax.vmap(vjp, (0, 0, None))),
        lambda vjp: lambda q, k, d: jax.jit(jax.vmap(vjp, (None, 0, None)))(q[0], k, d),
    ],
    ids=["vmap", "jit_vmap_shared_cotangent", "jit_vmap_shared_query"],
)
def test_mapped_gradients(function: Callable, dtype: str, transform: Callable) -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 2, 2, 4, 2, 2)).astype(dtype)
    d_out = jax.random.normal(jax.random.key(1), (2, 4, 2, 2)).astype(dtype)

    def vjp(q: Array, k: Array, d_out: Array) -> tuple[Array, ...]:
        return jax.vjp(lambda q, k: function(q, k, k), q, k)[1](d_out)

    found = transform(vjp)(q, k, d_out)
    exact = transform(vjp)(*(x.astype(jnp.float32) for x in (q, k, d_out)))
    for got, expected in zip(found, exact, strict=True):
        assert got.dtype == dtype
        unit = float(jnp.finfo(dtype).eps)
        assert _error(got, expected) <= 3 * unit * max(1, float(jnp.abs(expected).max()))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", first(1, ["float16", "bfloat16"]))
def test_heads_before_positions(function: Callable, dtype: str) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 2, 4, 8)).astype(dtype)

    @jax.jit
    def run(x: Array) -> tuple[Array, Array]:
        def call(x: Array) -> Array:
            return function(*(_heads_first(x) for _ in range(3)))

        return call(x), jax.grad(lambda x: (call(x).astype(jnp.float32) ** 2).sum())(x)

    for got, expected in zip(run(x), run(x.astype(jnp.float32)), strict=True):
        unit = float(jnp.finfo(dtype).eps)
        assert _error(got, expected) <= 6 * unit * max(1, float(jnp.abs(expected).max()))
