"""What gradients lose where backward takes the row term from the rounded output: a bound in closed
form, which docs/reference/rules.md states.

Of a row, backward subtracts rowsum(O dO) from dP. In 16 bits O is rounded, each of its numbers by
up to half a unit in the last place, and where dO follows O the errors of columns that are alike
add up.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests import reference, tolerance
from tests.backends import DEFAULT, EAGER, Backend, Results, quick_jit
from tests.cases import thorough
from tests.hopper import exact as hopper
from tests.portable import exact as portable

ON_GPU = portable.ON_GPU
KERNELS = [portable.FLASH, portable.CHUNKED, hopper.FLASH if ON_GPU else hopper.INTERPRETED]


def columns_alike(queries: int, dtype: str) -> jax.Array:
    """Queries, keys and values whose every eighth column is the same."""
    x = np.random.default_rng(1).standard_normal((1, queries, 2, 8))
    return jnp.asarray(np.tile(x, (1, 1, 1, 8)), dtype)


def of_its_square(backend: Backend, *x: jax.Array) -> tuple[jax.Array, Results]:
    """The gradient of sum(O^2), as the cotangent of O, and what it makes of the operands'."""
    out, vjp = jax.vjp(partial(backend, is_causal=True), *x)
    return 2 * out, dict(zip("qkv", vjp(2 * out), strict=True))


def lost_by_the_row_term(exact: Any, d_out: Any, dtype: str) -> Results:
    """At most, element by element: P times half a unit of rowsum |O dO|, where it goes."""
    products = np.abs(exact.out * reference.float64(d_out)).sum(axis=-1)
    term = tolerance.epsilon(dtype) / 2 * products.transpose(0, 2, 1)[..., None]
    d_logits = exact.scale * exact.p * term
    return {
        "q": np.einsum("bnts,bsnh->btnh", d_logits, np.abs(exact.k)),
        "k": np.einsum("bnts,btnh->bsnh", d_logits, np.abs(exact.q)),
        "v": np.zeros_like(exact.v),
    }


def check(backend: Backend, dtype: str, queries: int) -> None:
    x = (columns_alike(queries, dtype),) * 3
    # The interpreter's effects cannot be compiled where a call is partitioned.
    run = partial(of_its_square, backend)
    d_out, found = (run if backend is hopper.INTERPRETED else quick_jit(run))(*x)
    _, vjp = jax.vjp(partial(jattn.eager_attention, is_causal=True), *x)
    peer = dict(zip("qkv", vjp(d_out), strict=True))
    exact = reference.attention(*x, seen=np.tri(queries, dtype=bool))
    zeros = np.zeros((1, queries, 2))
    values = exact.gradients(d_out, zeros)
    lost = lost_by_the_row_term(exact, d_out, dtype)
    for name, got in found.items():
        peer_error = tolerance.error(peer[name], values[name])
        rule = tolerance.allowed(name, peer_error, values[name], np.abs(values[name]), dtype)
        excess = np.abs(reference.float64(got) - values[name]) - lost[name]
        assert excess.max() <= rule, (name, excess.max(), rule)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (DEFAULT, "bfloat16"),
        (portable.FLASH, "float16"),
        *thorough((EAGER, "bfloat16"), (DEFAULT, "float16")),
        *thorough(*((kernel, "bfloat16") for kernel in KERNELS)),
    ],
    ids=str,
)
def test_gradients_lose_no_more_than_the_rounded_row_term(backend: Backend, dtype: str) -> None:
    check(backend, dtype, queries=5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("queries", [5, 333])
def test_on_a_gpu_too(backend: Backend, dtype: str, queries: int) -> None:
    if backend is hopper.FLASH and not hopper.has_hopper():
        pytest.skip("needs a GPU of compute capability 9.0")
    check(backend, dtype, queries)


def test_the_bound_is_what_is_lost() -> None:
    """Not many times more: without it the rule would not hold, so the page has to say it."""
    x = (columns_alike(5, "bfloat16"),) * 3
    d_out, found = quick_jit(partial(of_its_square, DEFAULT))(*x)
    exact = reference.attention(*x, seen=np.tri(5, dtype=bool))
    values = exact.gradients(d_out, np.zeros((1, 5, 2)))["q"]
    lost = lost_by_the_row_term(exact, d_out, "bfloat16")["q"]
    assert tolerance.error(found["q"], values) > lost.max() / 20
