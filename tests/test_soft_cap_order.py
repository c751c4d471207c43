"""The soft cap is of the scaled products; bias and mask come after it, and hide under any cap."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests import extremes, reference
from tests.backends import Backend, Results
from tests.cases import first


def causal_bias() -> Results:
    rng = np.random.default_rng(2)
    arrays = {
        name: rng.standard_normal((1, n, 2, 8)).astype(np.float32) * 4
        for name, n in (("query", 20), ("key", 24), ("value", 24))
    }
    bias = rng.standard_normal((1, 2, 20, 24)).astype(np.float32)
    return arrays | {"bias": np.where(np.tril(np.ones((20, 24), bool)), bias, -np.inf)}


def check(backend: Backend) -> None:
    arrays = causal_bias()
    seen = np.isfinite(arrays["bias"])
    found = extremes.check(backend, arrays, seen=seen, logits_soft_cap=5.0)
    hidden = np.asarray(found["bias"])[~seen]
    np.testing.assert_array_equal(hidden, np.zeros_like(hidden))


@pytest.mark.parametrize("backend", first(2, extremes.EVERY), ids=str)
def test_an_infinite_bias_hides_under_a_cap(backend: Backend) -> None:
    check(backend)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", extremes.EVERY, ids=str)
def test_an_infinite_bias_hides_under_a_cap_on_a_gpu(backend: Backend) -> None:
    check(backend)


def test_the_cap_does_not_bound_the_bias() -> None:
    """By hand: products of 0, whatever the cap, leave the softmax of the bias."""
    bias = np.array([0.0, 30.0, -30.0])
    got = reference.attention(
        np.zeros((1, 1, 1, 1)), np.zeros((1, 3, 1, 1)), np.eye(3)[None, :, None],
        bias=bias[None, None, None], seen=np.ones((1, 1, 1, 3), bool), soft_cap=5.0,
    )  # fmt: skip
    weights = np.exp(bias - 30.0)
    np.testing.assert_allclose(got.out[0, 0, 0], weights / weights.sum(), rtol=1e-12)
