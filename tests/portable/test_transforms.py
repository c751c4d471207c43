"""The portable kernels under jax's transformations: vmap of anything, scan, checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests import formula
from tests.backends import EAGER, Backend, largest_array, quick_jit
from tests.cases import first, thorough
from tests.portable.exact import BOTH, CHUNKED, FLASH, ampere
from tests.test_transforms import (
    ARGUMENTS,
    EXAMPLES,
    SUBSETS,
    assert_close,
    gradients,
    loss,
    normal,
    one_of,
    split,
)

__all__ = ["ampere"]

# Mapped with a batch axis of one, mapped with a whole one, and not mapped: each its own way.
MAPPED = [("query",), ("mask", "key_value_seq_lengths", "dropout_rng"), ARGUMENTS]


def mapped_call(
    mapped: tuple[str, ...], *, bias_rows: int = 1
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and their vmap axes."""
    arguments = {
        name: one_of(name, EXAMPLES) if name in mapped else one_of(name, EXAMPLES)[0]
        for name in ARGUMENTS
    }
    if bias_rows > 1:
        shape = list(arguments["bias"].shape)
        shape[-4] = bias_rows
        arguments["bias"] = normal("rows", *shape)
    return arguments, {name: 0 if name in mapped else None for name in ARGUMENTS}


def check_vmap(backend: Backend, mapped: tuple[str, ...], bias_rows: int = 1) -> None:
    """Results and gradients of a vmapped call are those of the formula."""
    arguments, axes = mapped_call(mapped, bias_rows=bias_rows)
    (floats, rest), in_axes = split(arguments), split(axes)

    def mapped_gradients(backend: Any, *arrays: Any) -> Any:
        return jax.vmap(gradients(backend), in_axes)(*arrays)

    found = quick_jit(partial(mapped_gradients, backend))(floats, rest)
    formula.check(found, mapped_gradients, floats, rest)


@pytest.mark.parametrize(
    "mapped", [ARGUMENTS, *thorough(*((mapped,) for mapped in MAPPED[:-1]))], ids="-".join
)
def test_vmap_is_exact(mapped: tuple[str, ...]) -> None:
    check_vmap(FLASH, mapped)


@pytest.mark.thorough
@pytest.mark.parametrize("mapped", [("bias", "sinks")], ids="-".join)
def test_vmap_with_a_bias_of_many_rows_is_exact(mapped: tuple[str, ...]) -> None:
    check_vmap(CHUNKED, mapped, bias_rows=2)


@pytest.mark.gpu
@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("bias_rows", [1, 2])
@pytest.mark.parametrize("backend", BOTH, ids=str)
@pytest.mark.parametrize("mapped", SUBSETS, ids="-".join)
def test_vmap_is_exact_on_a_gpu(backend: Backend, mapped: tuple[str, ...], bias_rows: int) -> None:
    check_vmap(backend, mapped, bias_rows)


@pytest.mark.gpu
@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("backend", BOTH, ids=str)
@pytest.mark.parametrize("heads", [1, 70_000])
def test_a_grid_may_have_more_than_65535_programs_along_any_axis(
    backend: Backend, heads: int
) -> None:
    x = normal("x", 70_000 // heads, 1, 5, heads, 4)
    bias = normal("bias", 70_000 // heads, 1, 1, 5, 5)

    def total(backend: Backend, x: jax.Array, bias: jax.Array) -> jax.Array:
        return jax.vmap(lambda x, bias: backend(x, x, x, bias))(x, bias).sum()

    found, expected = (
        jax.jit(jax.grad(partial(total, each), (0, 1)))(x, bias) for each in (backend, EAGER)
    )
    # It is the grid that is tested: of a million numbers some are far from exact in float32.
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


# What is not mapped: kernels and loops share its rule, which is tried on the loops too.
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("backend", "mapped"), [(CHUNKED, ("bias", "mask")), (FLASH, ("query", "key", "value"))]
)
def test_the_gradient_of_a_vmap_sums_what_is_shared(
    backend: Backend, mapped: tuple[str, ...]
) -> None:
    arguments, axes = mapped_call(mapped)
    (floats, rest), in_axes = split(arguments), split(axes)

    def gradient(backend: Any, *arrays: Any) -> Any:
        def total(floats: Any, rest: Any) -> jax.Array:
            return jax.vmap(partial(loss, backend), in_axes)(floats, rest).sum()

        return jax.grad(total)(*arrays)

    found = quick_jit(partial(gradient, backend))(floats, rest)
    formula.check(found, gradient, floats, rest)


@pytest.mark.parametrize("operand", first(1, ["bias", "mask"]))
@pytest.mark.parametrize("mapped", first(1, [False, True]))
def test_vmap_repeats_no_array_of_queries_by_keys(operand: str, mapped: bool) -> None:
    size, rows, length = 3, 2, 64
    x = jnp.zeros((size, rows, length, 2, 4))
    own = (size, 1, 1, length, length) if mapped else (rows, 1, length, length)
    table = jnp.zeros(own, bool if operand == "mask" else x.dtype)

    def attend(x: jax.Array, table: jax.Array) -> jax.Array:
        return FLASH(x, x, x, **{operand: table})

    function = jax.vmap(attend, (0, 0 if mapped else None))
    assert largest_array(function, x, table) < rows * size * length * length
    same = jax.vmap(lambda x, table: EAGER(x, x, x, **{operand: table}), (0, 0 if mapped else None))
    assert_close(quick_jit(function)(x, table), quick_jit(same)(x, table))


def shapes_from_kernels(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of all results of kernels."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_from_kernels(inner)


@pytest.mark.parametrize("backend", BOTH, ids=str)
def test_the_gradient_of_a_bias_is_computed_only_where_it_is_wanted(backend: Backend) -> None:
    x, bias = normal("x", 1, 40, 2, 4), normal("bias", 1, 2, 40, 40)

    def total(x: jax.Array, bias: jax.Array) -> jax.Array:
        return backend(x, x, x, bias).sum()

    def computes_one(function: Any) -> bool:
        return bias.shape in set(shapes_from_kernels(jax.make_jaxpr(function)(x, bias).jaxpr))

    assert computes_one(jax.grad(total, (0, 1)))
    assert computes_one(jax.jit(jax.grad(total, 1)))
    assert not computes_one(jax.grad(total))
    assert not computes_one(jax.jit(jax.grad(jax.jit(total))))


@pytest.mark.parametrize("backend", [FLASH], ids=str)
def test_a_scan_of_recomputed_layers_is_exact(backend: Backend) -> None:
    x, weights = normal("x", 1, 18, 2, 4), normal("w", 3, 4, 4) / 4
    bias = normal("bias", 1, 2, 18, 18)

    def scanned(backend: Backend, weights: jax.Array, bias: jax.Array) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = x + backend(x @ w, x, x, bias, is_causal=True)
            return y, y.sum()

        return jax.lax.scan(layer, x, weights)[1].sum()

    found, expected = (
        quick_jit(jax.grad(partial(scanned, each), (0, 1)))(weights, bias)
        for each in (backend, EAGER)
    )
    assert_close(found, expected)


@pytest.mark.parametrize("backend", [FLASH], ids=str)
@pytest.mark.parametrize("which", first(1, [1, 0]), ids=["log-sum-exp", "output"])
def test_one_result_alone_has_its_gradient(backend: Backend, which: int) -> None:
    x, bias = normal("x", 1, 18, 2, 4), normal("bias", 1, 1, 18, 18)

    def total(backend: Backend, x: jax.Array, bias: jax.Array) -> jax.Array:
        return (backend(x, x, x, bias, return_residual=True)[which] ** 2).sum()

    found, expected = (
        quick_jit(jax.grad(partial(total, each), (0, 1)))(x, bias) for each in (backend, EAGER)
    )
    assert_close(found, expected)
