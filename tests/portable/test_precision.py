"""Float32 as terms of bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.backends import kernels
from jattn.call.arguments import attention_call
from pallas_kernels.portable.precision import term_count, terms


def numbers() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Of all sizes but the least, whose last terms would be subnormal."""
    rng = np.random.default_rng(0)
    signs, sizes = rng.choice([-1, 1], 4000), 2.0 ** rng.integers(-100, 120, 4000)
    return (signs * sizes * (1 + rng.random(4000))).astype(np.float32)


@pytest.mark.parametrize(("count", "error"), [(3, 0.0), (2, 2.0**-16)])
def test_the_terms_sum_to_the_number(count: int, error: float) -> None:
    x = numbers()
    found = jax.jit(terms, static_argnums=1)(x, count)
    assert [term.dtype for term in found] == [jnp.bfloat16] * count
    total = sum(np.asarray(term, np.float64) for term in found)
    assert (np.abs(total - x) <= error * np.abs(x)).all()


@pytest.mark.parametrize(
    ("dtype", "precision", "count"),
    [
        ("float32", None, 3),
        ("float32", "highest", 3),
        ("float32", "BF16_BF16_F32_X6", 3),
        ("float32", "tensorfloat32", 2),
        ("float32", "high", 2),
        ("bfloat16", "highest", 1),
        ("float16", None, 1),
    ],
)
def test_terms_by_dtype_and_precision(dtype: str, precision: str | None, count: int) -> None:
    x = jnp.zeros((1, 4, 1, 8), dtype)
    with jax.default_matmul_precision(precision):
        assert term_count(attention_call(x, x, x).spec) == count


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_makes_no_number_of_itself(bad: float) -> None:
    x = jax.random.normal(jax.random.key(0), (1, 20, 1, 16))
    with kernels.only("portable", interpret=True):
        out = jattn.flash_attention(x, x, x.at[0, 3, 0, 5].set(bad))
    finite = np.isfinite(np.asarray(out[0, :, 0]))
    assert not finite[:, 5].any()
    assert np.delete(finite, 5, axis=1).all()


def test_rounding_to_tf32_keeps_sixteen_bits() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 40, 1, 64)) for _ in range(3))
    logits = q[0, :, 0] @ k[0, :, 0].T / 8
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = weights / weights.sum(axis=1, keepdims=True) @ v[0, :, 0]
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    with jax.default_matmul_precision("tensorfloat32"), kernels.only("portable", interpret=True):
        found = jattn.flash_attention(*arrays)[0, :, 0]
    error = np.abs(np.asarray(found, np.float64) - expected).max()
    assert 1e-7 < error < 1e-4
