"""Inside `jax.ensure_compile_time_eval`, where JAX folds constants, attention is as elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import jattn
from jattn.backends.kernels import Family
from jattn.flash_attention import interpreted
from tests import formula
from tests.backends import quick_jit
from tests.cases import first

X = np.random.default_rng(0).standard_normal((1, 5, 2, 8)).astype(np.float32)


def gradients(attention: Callable[..., Any], x: jax.Array) -> Any:
    """Of a causal call's queries, keys and values, and its output."""

    def loss(*x: jax.Array) -> Any:
        out = attention(*x, is_causal=True)
        weights = jnp.arange(out.size).reshape(out.shape) % 5 - 2
        return (weights.astype(out.dtype) * out).sum(), out

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


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["portable", "hopper"])
def test_interpreted_kernels_are_computed_with_at_once(family: Family) -> None:
    x = jnp.asarray(np.tile(X, (1, 1, 1, 8)), jnp.bfloat16)
    with interpreted(family):
        found = evaluated(jattn.flash_attention, x)
    formula.check(found, gradients, x)


@pytest.mark.parametrize(
    "attention",
    first(1, [jattn.flash_attention, jattn.memory_efficient_attention]),
    ids=lambda attention: attention.__name__,
)
def test_what_is_traced_stays_so(attention: Callable[..., Any]) -> None:
    with interpreted("portable"):
        found = quick_jit(partial(evaluated, attention))(jnp.asarray(X))
    formula.check(found, gradients, jnp.asarray(X))


@pytest.mark.parametrize("gpu", first(1, ["NVIDIA H200", "NVIDIA A100"]))
def test_kernels_are_lowered_as_ever(gpu: str) -> None:
    """Where the whole of `jax.jit` is inside: Mosaic traces parts of a kernel as it lowers it."""
    device = AbstractDevice(device_kind=gpu, num_cores=None, platform="cuda")
    x = jax.ShapeDtypeStruct((1, 70, 2, 64), jnp.bfloat16)

    def lowered() -> str:
        def attention(x: jax.Array) -> jax.Array:
            return jattn.flash_attention(x, x, x, is_causal=True)

        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            return jax.jit(attention).trace(x).lower(lowering_platforms=("cuda",)).as_text()

    with jax.ensure_compile_time_eval():
        found = lowered()
    # A Mosaic kernel's text has the lines that called it.
    inside, outside = (re.sub(r"backend_config = .*", "", text) for text in (found, lowered()))
    assert "custom_call" in found
    assert inside == outside


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kernel", ["flash", "memory_efficient"])
def test_kernels_are_traced_as_ever_on_a_gpu(kernel: str) -> None:
    x = jnp.asarray(np.tile(X, (1, 1, 1, 8)), jnp.bfloat16)

    def attention(*x: jax.Array, **options: Any) -> Any:
        return jattn.dot_product_attention(*x, **options, implementation=kernel)

    def jitted_inside(attention: Callable[..., Any], x: jax.Array) -> Any:
        with jax.ensure_compile_time_eval():
            return jax.jit(partial(gradients, attention))(x)

    for run in (evaluated, jax.jit(evaluated, static_argnums=0), jitted_inside):
        formula.check(run(attention, x), gradients, x)
