"""`jax_debug_nans` and `jax_debug_infs`: no NaN and no infinity that is not in the result.

Jitted or not: outside `jax.jit` they look at what every operation and every jitted part gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests import backends, cudnn_calls
from tests.backends import Backend
from tests.hopper import exact as hopper
from tests.portable import exact as portable

HEADS, QUERIES, KEYS, DIM = 2, 9, 12, 8
XLA = [backends.EAGER, backends.CHUNKED]
LENGTHS = {
    "is_causal": True,
    "query_seq_lengths": np.array([3, QUERIES]),
    "key_value_seq_lengths": np.array([2, KEYS]),
}
NO_KEYS = {"is_causal": True, "key_value_seq_lengths": np.array([0, 5])}
EVERYTHING = LENGTHS | {
    "causal_alignment": "bottom_right",
    "logits_soft_cap": 5.0,
    "sinks": np.ones(HEADS, np.float32),
    "mask": np.tri(QUERIES, KEYS, 2, dtype=bool),
    "bias": np.ones((1, HEADS, QUERIES, KEYS), np.float32),
    "dropout_rate": 0.1,
    "dropout_rng": np.array([0, 7], np.uint32),
}


@pytest.fixture(autouse=True)
def debugging() -> Iterator[None]:
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


def arrays(dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    sizes = (QUERIES, KEYS, KEYS)
    return tuple(jnp.asarray(rng.standard_normal((2, n, HEADS, DIM)), dtype) for n in sizes)


def gradient(backend: Callable[..., Any], options: Any) -> Callable[..., Any]:
    def loss(*qkv: jax.Array) -> jax.Array:
        return backend(*qkv, **options).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, (0, 1, 2))


@pytest.mark.parametrize("backend", XLA, ids=str)
def test_nothing_is_made_that_is_not_finite(backend: Backend) -> None:
    backend(*arrays(), **NO_KEYS)
    gradient(backend, NO_KEYS)(*arrays())
    gradient(backend, EVERYTHING)(*arrays())


@pytest.mark.parametrize("backend", XLA, ids=str)
def test_nothing_is_made_that_is_not_finite_under_jit(backend: Backend) -> None:
    jax.jit(gradient(backend, NO_KEYS))(*arrays())


def test_kernels_make_nothing_that_is_not_finite() -> None:
    portable.FLASH(*arrays(), **LENGTHS)


@pytest.mark.thorough
@pytest.mark.parametrize("options", [LENGTHS, NO_KEYS], ids=["some", "none"])
@pytest.mark.parametrize("backend", [*portable.BOTH, hopper.INTERPRETED], ids=str)
def test_gradients_of_kernels_make_nothing_that_is_not_finite(
    backend: Backend, options: Any
) -> None:
    dtype = jnp.bfloat16 if backend is hopper.INTERPRETED else jnp.float32
    gradient(backend, options)(*arrays(dtype))


def test_second_derivatives_of_eager() -> None:
    q, k, v = arrays()

    def loss(q: jax.Array) -> jax.Array:
        return jattn.eager_attention(q, k, v, **LENGTHS).sum()

    jax.grad(lambda q: (jax.grad(loss)(q) ** 2).sum())(q)


@pytest.mark.parametrize("backend", XLA, ids=str)
def test_a_log_sum_exp_that_is_asked_for_is_infinite_where_nothing_is_seen(
    backend: Backend,
) -> None:
    seen = {"is_causal": True, "key_value_seq_lengths": np.array([1, 5])}
    backend(*arrays(), **seen, return_residual=True)
    with pytest.raises(Exception, match="inf"):
        backend(*arrays(), **NO_KEYS, return_residual=True)


def test_no_keys_at_all() -> None:
    q, k, v = arrays()
    out = jattn.dot_product_attention(q, k[:, :0], v[:, :0])
    np.testing.assert_array_equal(out, np.zeros(q.shape))


EVEN = {"is_causal": True}
ON_A_GPU = {
    "default": (jattn.dot_product_attention, EVEN),
    "cudnn": (cudnn_calls.CUDNN, EVEN),
    "portable flash": (portable.FLASH, EVERYTHING),
    "portable chunked": (portable.CHUNKED, EVERYTHING),
    "hopper": (jattn.flash_attention, LENGTHS),
}


@pytest.mark.gpu
@pytest.mark.skipif(not portable.ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ON_A_GPU)
def test_nothing_is_made_that_is_not_finite_on_a_gpu(name: str) -> None:
    """Outside `jit`, where every part is looked at, and inside."""
    backend, options = ON_A_GPU[name]
    qkv = tuple(x[:, : x.shape[1] // 2 * 2] if options is EVEN else x for x in arrays(jnp.bfloat16))
    backend(*qkv, **options)
    for run in (gradient(backend, options), jax.jit(gradient(backend, options))):
        run(*qkv)
