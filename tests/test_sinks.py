"""Sinks of any size, also where a row sees no key."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import extremes, formula, reference
from tests.backends import Backend, Results, quick_jit
from tests.cases import first

SINKS = np.array([-np.inf, 0.5, 100.0, -1e9, 1e9, 3e38], np.float32)
FEW = SINKS[[0, 2, 5]]  # for an interpreter whose time is by the head
LENGTHS = (24, 0)


def operands(
    dtype: Any, *, queries: int = 20, keys: int = 24, size: int = 8, sinks: Any = SINKS
) -> Results:
    rng = np.random.default_rng(4)
    n = len(sinks)
    return {
        "query": rng.standard_normal((2, queries, n, size)).astype(dtype),
        "key": rng.standard_normal((2, keys, n, size)).astype(dtype),
        "value": rng.standard_normal((2, keys, n, size)).astype(dtype),
        "sinks": sinks,
    }


def check(backend: Backend, dtype: Any, lengths: tuple[int, int], **sizes: Any) -> None:
    arrays = operands(dtype, **sizes)
    t, s = arrays["query"].shape[1], arrays["key"].shape[1]
    seen = reference.visible(2, t, s, key_lengths=lengths)
    found = extremes.check(
        backend, arrays, seen=seen, key_value_seq_lengths=jnp.array(lengths, jnp.int32)
    )
    for name in ("out", "query", "key", "value"):
        assert not np.asarray(found[name])[1].any(), name


@pytest.mark.parametrize("backend", first(3, extremes.EVERY), ids=str)
def test_any_sink_is_right(backend: Backend) -> None:
    check(backend, np.float32, LENGTHS)


@pytest.mark.thorough
def test_any_sink_is_right_where_keys_are_split() -> None:
    check(extremes.EVERY[2], np.float32, (600, 0), queries=1, keys=600)


def test_any_sink_is_right_in_hopper_kernels() -> None:
    check(extremes.HOPPER, jnp.bfloat16, LENGTHS, size=64, sinks=FEW)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", [*extremes.EVERY, extremes.HOPPER], ids=str)
def test_any_sink_is_right_on_a_gpu(backend: Backend) -> None:
    for queries, keys in ((1, 24), (1, 3000), (70, 3000)):
        check(backend, jnp.bfloat16, (keys, 0), queries=queries, keys=keys, size=64)


@pytest.mark.parametrize("backend", first(1, extremes.EVERY[1:]), ids=str)
def test_any_sink_is_right_where_each_row_has_its_own(backend: Backend) -> None:
    arrays = operands(np.float32)
    drawn = [jnp.asarray(arrays[name][:1, :, :1]) for name in ("query", "key", "value")]

    def gradients(attention: Callable[..., Any], sinks: jax.Array, *arrays: jax.Array) -> jax.Array:
        def one(sink: jax.Array) -> jax.Array:
            return jax.grad(lambda s: attention(*arrays, sinks=s).sum())(sink)

        return jax.vmap(one)(sinks)

    inputs = (jnp.asarray(SINKS)[:, None], *drawn)
    formula.check(quick_jit(partial(gradients, backend))(*inputs), gradients, *inputs)


@pytest.mark.parametrize("backend", first(1, extremes.EVERY[1:]), ids=str)
def test_a_sink_is_all_there_is_beside_keys_that_a_finite_bias_hides(backend: Backend) -> None:
    """Their maximum is -1e9, and the log-sum-exp the sink's."""
    arrays = operands(np.float32, sinks=np.array([0.3, 1e4, -1e9], np.float32))
    bias = np.zeros((1, 1, *arrays["query"].shape[1:2], 24), np.float32)
    bias[:, :, :7] = -1e9
    found = extremes.check(backend, arrays | {"bias": bias})
    np.testing.assert_allclose(found["lse"][:, :7, :2], [[[0.3, 1e4]] * 7] * 2, rtol=1e-6)


INFINITE = np.array([np.inf, 0.5], np.float32)


def check_infinite(backend: Backend, dtype: Any, **sizes: Any) -> None:
    """As a sink grows without bound: its rows' weights go to it, and 0 is left for the keys."""
    arrays = operands(dtype, sinks=INFINITE, **sizes)
    b, t, n, _ = arrays["query"].shape
    rng = np.random.default_rng(5)
    cotangents = rng.standard_normal(arrays["query"].shape), rng.standard_normal((b, t, n))
    d_out, d_lse = (x.astype(y) for x, y in zip(cotangents, (dtype, np.float32), strict=True))
    both = [
        extremes.compute(
            backend, arrays | {"sinks": x}, (d_out, d_lse), key_value_seq_lengths=LENGTHS
        )
        for x in (INFINITE, np.array([1e9, 0.5], np.float32))
    ]
    found, large = (jax.tree.map(np.asarray, x) for x in both)
    for name in ("out", "query", "key", "value"):
        assert not found[name][:, :, 0].any(), name
        np.testing.assert_array_equal(found[name][:, :, 1], large[name][:, :, 1], err_msg=name)
    np.testing.assert_array_equal(found["lse"][0, :, 0], np.inf)
    np.testing.assert_array_equal(found["lse"][1], -np.inf)
    np.testing.assert_array_equal(found["lse"][..., 1], large["lse"][..., 1])
    np.testing.assert_array_equal(found["sinks"], large["sinks"])
    few = 32 * np.finfo(np.float32).eps * np.abs(d_lse[0, :, 0]).sum()
    assert abs(found["sinks"][0] - d_lse[0, :, 0].astype(np.float64).sum()) <= few


@pytest.mark.parametrize("backend", first(2, extremes.EVERY), ids=str)
def test_an_infinite_sink_leaves_nothing_to_the_keys(backend: Backend) -> None:
    check_infinite(backend, np.float32)


@pytest.mark.thorough
def test_an_infinite_sink_leaves_nothing_to_the_keys_in_hopper_kernels() -> None:
    check_infinite(extremes.HOPPER, jnp.bfloat16, size=64)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", [*extremes.EVERY, extremes.HOPPER], ids=str)
def test_an_infinite_sink_leaves_nothing_to_the_keys_on_a_gpu(backend: Backend) -> None:
    check_infinite(backend, jnp.bfloat16, size=64)


@pytest.mark.parametrize("backend", extremes.EVERY[:2], ids=str)
def test_the_output_does_not_move_along_an_infinite_sink(backend: Backend) -> None:
    arrays = {name: jnp.asarray(x) for name, x in operands(np.float32, sinks=INFINITE).items()}
    along = {name: jnp.ones_like(x) for name, x in arrays.items()}

    @quick_jit
    def tangents(arrays: Results, along: Results) -> Any:
        def attend(arrays: Results) -> Any:
            return backend(**arrays, return_residual=True)

        return jax.jvp(attend, (arrays,), (along,))[1]

    t_out, t_lse = tangents(arrays, along)
    assert not t_out[:, :, 0].any()
    np.testing.assert_array_equal(t_lse[:, :, 0], 1)
    assert np.isfinite(t_out).all()
    assert np.isfinite(t_lse).all()
