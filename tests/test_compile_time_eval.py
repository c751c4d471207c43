"""Inside `jax.ensure_compile_time_eval`, where JAX folds constants, attention is as elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.flash_attention import interpreted
from tests import formula
from tests.backends import quick_jit
from tests.cases import first

X = np.random.default_rng(0).standard_normal((1, 5, 2, 8)).astype(np.float32)


def gradients(attention: Callable[..., Any], x: jax.Array) -> Any:
    """Of a causal call's queries, keys and values, and its output."""

    def loss(*x: jax.Array) -> Any:
        out = attention(*x, is_causal=True)
        return jnp.square(out).sum(), out

    return jax.grad(loss, (0, 1, 2), has_aux=True)(x, x, x)


def evaluated(attention: Callable[..., Any], x: jax.Array) -> Any:
    with jax.ensure_compile_time_eval():
        return gradients(attention, x)


def test_known_arrays_are_computed_with_at_once() -> None:
    """Into what is traced goes the result."""
    x = jnp.asarray(X)

    @quick_jit
    def constants() -> Any:
        found = evaluated(jattn.memory_efficient_attention, x)
        assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(found))
        return found

    formula.check(constants(), gradients, x)


@pytest.mark.parametrize(
    "attention",
    first(1, [jattn.flash_attention, jattn.memory_efficient_attention]),
    ids=lambda attention: attention.__name__,
)
def test_what_is_traced_stays_so(attention: Callable[..., Any]) -> None:
    with interpreted("portable"):
        found = quick_jit(partial(evaluated, attention))(jnp.asarray(X))
    formula.check(found, gradients, jnp.asarray(X))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kernel", ["flash", "memory_efficient"])
def test_kernels_are_traced_as_ever_on_a_gpu(kernel: str) -> None:
    x = jnp.asarray(np.tile(X, (1, 1, 1, 8)), jnp.bfloat16)

    def attention(*x: jax.Array, **options: Any) -> Any:
        return jattn.dot_product_attention(*x, **options, implementation=kernel)

    for run in (evaluated, jax.jit(evaluated, static_argnums=0)):
        formula.check(run(attention, x), gradients, x)
