"""Memory of tangents and second derivatives: linear in the length, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jattn
from tests.cases import thorough

attend = partial(jattn.memory_efficient_attention, is_causal=True)


def loss(*x: jax.Array) -> jax.Array:
    return (attend(*x) ** 2).sum()


def hvp(*x: jax.Array) -> Any:
    return jax.jvp(jax.grad(loss, (0, 1, 2)), x[:3], x[3:])


def of_the_tangent(*x: jax.Array) -> Any:
    return jax.grad(lambda *x: (jax.jvp(attend, x[:3], x[3:])[1] ** 2).sum(), tuple(range(6)))(*x)


def reverse_over_reverse(*x: jax.Array) -> Any:
    return jax.grad(lambda *y: (jax.grad(loss)(*y) * x[3]).sum(), (0, 1, 2))(*x[:3])


def third(*x: jax.Array) -> Any:
    return jax.grad(lambda *x: (hvp(*x)[1][0] ** 2).sum(), (0, 1, 2))(*x)


def bytes_at(function: Callable[..., Any], length: int) -> int:
    shapes = [jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)] * 6
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "function",
    [hvp, *thorough(*((f,) for f in (of_the_tangent, reverse_over_reverse)))],
    ids=lambda f: f.__name__,
)
def test_twice_the_length_takes_twice_the_memory(function: Callable[..., Any]) -> None:
    at = [bytes_at(function, length) for length in (2048, 4096, 8192)]
    assert at[1] < 2.1 * at[0]
    assert at[2] < 2.1 * at[1]
    assert at[2] < 8192**2 * 4 / 5


@pytest.mark.thorough
def test_third_order_is_linear_too() -> None:
    """Its chunks have so many logits, whatever the length: they are what it takes at first."""
    at = [bytes_at(third, length) for length in (16384, 65536)]
    assert at[1] < 4.2 * at[0]


@pytest.mark.thorough
def test_a_hessian_times_a_vector_at_131072_tokens_takes_some_hundred_mebibytes() -> None:
    assert bytes_at(hvp, 131072) < 131072 * 64 * 4 * 16
