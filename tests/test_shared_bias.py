"""One bias or mask for some rows of a batch, as `jax.vmap` leaves it: read in place, in one call.

Triangle attention (AlphaFold 2, supplement 1.6.6) is rows x heads x S x S with one bias for all
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import jattn
from jattn.backends.kernels import only
from tests import formula
from tests.backends import Backend, arrays_in, quick_jit
from tests.cases import thorough
from tests.portable.exact import CHUNKED, FLASH

XLA = Backend(
    "XLA", jattn.memory_efficient_attention, (("query_chunk_size", 8), ("key_chunk_size", 8))
)
BACKENDS = [XLA, FLASH, CHUNKED]
OUTER, INNER, B, T, S, N, H = 3, 2, 2, 12, 10, 2, 4

# The vmapped axes (outermost first) that a bias and a mask have, and their own rows.
PLACES = {
    "one for all": ((), (), 1),
    "by outer": (("outer",), ("outer",), 1),
    "by inner": (("inner",), ("outer",), 1),
    "by batch": ((), ("inner",), B),
    "by outer and batch": (("outer",), (), B),
    "each its own": (("outer", "inner"), ("inner",), B),
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def arrays(name: str) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    bias, mask, rows = PLACES[name]
    sizes = {"outer": OUTER, "inner": INNER}
    every = (OUTER, INNER, B)
    floats = {
        "query": normal(0, *every, T, N, H),
        "key": normal(1, *every, S, N, H),
        "value": normal(2, *every, S, N, H),
        "bias": normal(3, *(sizes[axis] for axis in bias), rows, N, T, S),
    }
    seen = normal(4, *(sizes[axis] for axis in mask), rows, 1, T, S) < 1
    return floats, {"mask": seen}


def nested(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`call` of floats and rest under two vmaps, the arrays mapped where they have the axis."""
    bias, mask, _ = PLACES[name]
    for axis in ("inner", "outer"):
        floats = {"query": 0, "key": 0, "value": 0, "bias": 0 if axis in bias else None}
        call = jax.vmap(call, (floats, {"mask": 0 if axis in mask else None}))
    return call


def attend(backend: Callable[..., Any], floats: Any, rest: Any) -> Any:
    return backend(**floats, **rest, is_causal=True)


def total(backend: Callable[..., Any], name: str) -> Callable[..., Any]:
    cotangent = normal(5, OUTER, INNER, B, T, N, H)

    def function(floats: Any, rest: Any) -> jax.Array:
        out = nested(partial(attend, backend), name)(floats, rest)
        return (out * cotangent.astype(out.dtype)).sum()

    return jax.grad(function)


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *((XLA, name) for name in ("one for all", "by outer", "by inner")),
        *thorough((FLASH, "by outer and batch")),
    ],
)
def test_gradients_of_nested_vmaps_are_exact(backend: Backend, name: str) -> None:
    floats, rest = arrays(name)
    found = quick_jit(total(backend, name))(floats, rest)
    formula.check(found, lambda of, *arrays: total(of, name)(*arrays), floats, rest)


@pytest.mark.parametrize(("backend", "name"), [(XLA, "by outer and batch"), (FLASH, "by inner")])
def test_each_row_may_have_its_own_gradient_of_a_shared_bias(backend: Backend, name: str) -> None:
    """vmap of grad, which asks for one of every mapped row."""

    def gradients(each: Callable[..., Any]) -> Callable[..., Any]:
        def loss(floats: Any, rest: Any) -> jax.Array:
            return (attend(each, floats, rest) ** 2).sum()

        return nested(jax.grad(loss), name)

    floats, rest = arrays(name)
    found = quick_jit(gradients(backend))(floats, rest)
    formula.check(found, lambda of, *arrays: gradients(of)(*arrays), floats, rest)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("backend", [FLASH, CHUNKED], ids=str)
def test_one_call_of_each_kernel_and_no_loop_over_rows(backend: Backend, name: str) -> None:
    floats, rest = arrays(name)

    def kernels(function: Callable[..., Any]) -> list[str]:
        # The kernels' own loops are inside of them.
        found = list(outer_equations(jax.make_jaxpr(function)(floats, rest).jaxpr))
        assert not any(e.primitive.name in ("scan", "while") for e in found)
        return [e.params["name"] for e in found if e.primitive.name == "pallas_call"]

    assert len(kernels(nested(partial(attend, backend), name))) == 1
    backward = kernels(total(backend, name))
    assert len(set(backward)) == len(backward)
    assert {"key_gradients", "query_gradients"} <= set(backward)


def outer_equations(jaxpr: Any) -> Iterator[Any]:
    """Those outside of kernels."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(equation.params):
                yield from outer_equations(inner)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_nothing_of_queries_by_keys_is_made_but_the_gradient(backend: Backend) -> None:
    """At rows that share a bias, its size counts once."""
    rows, length = 6, 48
    x, bias = jnp.zeros((rows, 1, length, 2, 4)), jnp.zeros((1, 2, length, length))

    def loss(x: jax.Array, bias: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: backend(x, x, x, bias))(x).sum()

    sizes = [array.size for array in arrays_in(jax.grad(loss, (0, 1)), x, bias)]
    assert max(sizes) <= max(bias.size, 4 * x.size)


@pytest.mark.parametrize("shape", [(2, 3, 8, 2, 4)])
def test_five_axes_are_answered_with_the_vmap_or_the_reshape(shape: tuple[int, ...]) -> None:
    x = jnp.zeros(shape)
    with pytest.raises(ValueError, match=r"jax\.vmap.*reshape"):
        jattn.dot_product_attention(x, x, x)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["flash", "memory_efficient"])
def test_triangle_attention_of_256_rows_on_a_gpu(family: str) -> None:
    rows, length, heads, dim = 256, 256, 4, 32
    x = [normal(seed, rows, length, heads, dim) for seed in range(4)]
    bias = normal(4, heads, length, length)

    def gradients(attention: Callable[..., Any], *arrays: jax.Array) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
            out = jax.vmap(lambda q, k, v: attention(q, k, v, bias))(q, k, v)
            return (out * x[3].astype(out.dtype)).sum()

        return jax.grad(loss, (0, 1, 2, 3))(*arrays)

    def portably(*arguments: Any) -> Any:
        with only("portable"):
            return jattn.dot_product_attention(*arguments, implementation=family)

    arguments = (*x[:3], bias)
    formula.check(jax.jit(partial(gradients, portably))(*arguments), gradients, *arguments)
