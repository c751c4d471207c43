"""Logits of any finite size: what is relative to a row's maximum is kept beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests import extremes
from tests.backends import EAGER, Backend, Results
from tests.cases import first

# In one process, whose compiled functions they share.
pytestmark = pytest.mark.xdist_group("large_logits")

LEAST = float(np.finfo(np.float32).min)
KERNELS = extremes.EVERY[2]


def drawn(dtype: Any, queries: int, keys: int, size: int = 16) -> Results:
    rng = np.random.default_rng(8)
    shapes = {"query": queries, "key": keys, "value": keys}
    return {name: rng.standard_normal((1, n, 2, size)).astype(dtype) for name, n in shapes.items()}


def hidden_by(number: float, *, queries: int = 3, keys: int = 16, dtype: Any = np.float32) -> Any:
    """A row hidden as a whole by a finite number, which eager makes even; one half; one not."""
    arrays = drawn(dtype, queries, keys)
    arrays["query"][:, 0] = 0  # float32 has no room for products beside the number
    bias = np.zeros((1, 1, queries, keys), np.float32)
    bias[..., 0, :] = number
    bias[..., 1:2, keys // 2 :] = number
    return arrays | {"bias": bias}


def constant(number: float, *, queries: int = 64, keys: int = 64, dtype: Any = np.float32) -> Any:
    """Even weights, of products as large as this number makes them."""
    arrays = drawn(dtype, queries, keys, size=64)
    for name in ("query", "key"):
        arrays[name] = np.full_like(arrays[name], number)
    return arrays


def uneven(number: float, *, queries: int = 64, keys: int = 64, dtype: Any = np.float32) -> Any:
    """The same with keys that are less by so much that nothing is left of them."""
    arrays = constant(number, queries=queries, keys=keys, dtype=dtype)
    arrays["key"][:, 3:-5] *= 0.5
    return arrays


CASES: dict[str, Callable[..., Results]] = {
    "-1e9": lambda **more: hidden_by(-1e9, **more),
    "-1e4": lambda **more: hidden_by(-1e4, **more),
    "finfo.min": lambda **more: hidden_by(LEAST, **more),
    "3e38": lambda **more: hidden_by(3e38, **more),
    "products of 1e3": lambda **more: constant(1e3, **more),
    "products of 1e4": lambda **more: constant(1e4, **more),
    "uneven products": lambda **more: uneven(2e4, **more),
}


def weight_sums(backend: Backend, arrays: Results, **options: Any) -> Any:
    """What backward's weights of each row add up to, (B, T, N): dV summed over keys.

    With values at least as wide as there are queries, the gradient of row t's output being 1 in
    column t. Where they are as wide as the values given, what is compiled is what `extremes.check`
    runs.
    """
    b, t, n, _ = arrays["query"].shape
    dtype = arrays["query"].dtype
    width = max(-(-t // 8) * 8, arrays["value"].shape[3])
    value = np.zeros((b, arrays["key"].shape[1], n, width), dtype)
    d_out = np.broadcast_to(np.eye(t, width, dtype=dtype)[None, :, None], (b, t, n, width))
    cotangents = d_out, np.zeros((b, t, n), np.float32)
    found = extremes.compute(backend, arrays | {"value": value}, cotangents, **options)["value"]
    return np.asarray(found, np.float32).sum(axis=1)[..., :t].swapaxes(1, 2)


def check_sums(backend: Backend, arrays: Results) -> None:
    np.testing.assert_allclose(weight_sums(backend, arrays), 1, atol=0.01)


@pytest.mark.parametrize("name", first(1, ["-1e9", *(n for n in CASES if n != "-1e9")]))
@pytest.mark.parametrize("backend", extremes.EVERY, ids=str)
def test_weights_of_a_row_add_up_to_one(backend: Backend, name: str) -> None:
    check_sums(backend, CASES[name](queries=8))


@pytest.mark.parametrize("name", first(1, ["finfo.min", "-1e9", "3e38", "uneven products"]))
@pytest.mark.parametrize("backend", extremes.EVERY, ids=str)
def test_results_are_exact(backend: Backend, name: str) -> None:
    extremes.check(backend, CASES[name](queries=8))


@pytest.mark.parametrize("name", first(1, ["products of 1e4", "-1e9"]))
def test_results_are_exact_where_keys_are_split(name: str) -> None:
    arrays = CASES[name](queries=1, keys=600)
    extremes.check(KERNELS, arrays)
    check_sums(KERNELS, arrays)


@pytest.fixture
def optimized() -> Iterator[None]:
    """Compiles as users do. With less of LLVM's work c S - m is rounded twice here and once there.

    In float32 the sums of P are then of other weights than those computed again. A GPU's
    instruction rounds once.
    """
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("number", first(1, [1e4, 1e3]))
def test_weights_add_up_to_one_in_hopper_kernels(number: float) -> None:
    check_sums(extremes.HOPPER, constant(number, dtype=jnp.bfloat16))


@pytest.mark.thorough
def test_sinks_share_a_row_of_large_products() -> None:
    """A sink as large as the products has the weight of one key more."""
    arrays = hidden_by(-1e9) | {"sinks": np.array([-1e9, -1e30], np.float32)}
    for backend in extremes.EVERY[1:]:
        sums = weight_sums(backend, arrays)
        np.testing.assert_allclose(sums[0, 0], [16 / 17, 1], atol=0.01)
        extremes.check(backend, arrays)


on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=on_a_gpu) for b in extremes.EVERY], ids=str
)
def test_large_logits_on_a_gpu(backend: Backend, dtype: str) -> None:
    for name, (queries, keys) in product(CASES, [(8, 64), (128, 1000)]):
        arrays = CASES[name](queries=queries, keys=keys, dtype=jnp.dtype(dtype))
        check_sums(backend, arrays)
        extremes.check(backend, arrays)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(("dtype", "largest"), [("bfloat16", 7e3), ("float16", 1.5e3)])
@pytest.mark.parametrize("backend", [pytest.param(extremes.HOPPER, marks=on_a_gpu)], ids=str)
def test_large_logits_in_hopper_kernels_on_a_gpu(
    backend: Backend, dtype: str, largest: float, size: int
) -> None:
    """Up to what docs/reference/rules.md gives as their bound."""
    every: list[dict[str, Any]] = [
        {},
        {"is_causal": True},
        {"local_window_size": (30, 9)},
        {"key_value_seq_lengths": (300,)},
    ]
    for options, (make, number) in product(every, [(uneven, 1e3), (constant, largest)]):
        arrays = make(number, queries=96, keys=333, dtype=jnp.dtype(dtype))
        arrays = {name: np.tile(x, (1, 1, 1, size // 64)) for name, x in arrays.items()}
        exact = weight_sums(EAGER, arrays, **options)
        for deterministic in (False, True):
            with jattn.deterministic_gradients(deterministic):
                sums = weight_sums(backend, arrays, **options)
            np.testing.assert_allclose(sums, exact, atol=0.01, err_msg=f"{options} {number}")
        rng = np.random.default_rng(1)
        d_out = rng.standard_normal(arrays["query"].shape).astype(jnp.dtype(dtype))
        zeros = np.zeros(d_out.shape[:3], np.float32)
        found, eager = (
            extremes.compute(b, arrays, (d_out, zeros), **options) for b in (backend, EAGER)
        )
        for name in ("out", "value"):
            x = np.asarray(eager[name], np.float32)
            got = np.asarray(found[name], np.float32)
            np.testing.assert_allclose(got, x, atol=0.02 * np.abs(x).max())
