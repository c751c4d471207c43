"""jattn's function in the place of another library's."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn.backends import cudnn
from jattn.call.arguments import attention_call
from tests import formula

X = jnp.asarray(np.random.default_rng(0).standard_normal((1, 16, 2, 8)), jnp.float32)


def test_cudnn_calls_jax_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def recursion(*arguments: Any, **options: Any) -> Any:
        raise RecursionError("jattn called what stands in the place of jax.nn's function")

    monkeypatch.setattr(jax.nn, "dot_product_attention", recursion)
    x = X.astype(jnp.bfloat16)
    call = attention_call(x, x, x, is_causal=True)
    attend = partial(cudnn.attend, call.spec)
    if jax.default_backend() == "gpu":
        assert attend(call.operands)[0].shape == x.shape
        return
    try:
        jax.eval_shape(attend, call.operands)
    except RecursionError:
        raise
    except Exception as error:  # of JAX itself, where it finds no cuDNN
        assert "cudnn" in str(error).lower()  # noqa: PT017


@pytest.mark.parametrize("implementation", [None, "memory_efficient", "eager"])
def test_in_the_place_of_jaxs_function_it_is_the_formula(
    implementation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = formula.expected(lambda of, x: {"out": of(x, x, x, is_causal=True)}, X)
    monkeypatch.setattr(jax.nn, "dot_product_attention", jattn.dot_product_attention)
    found = jax.nn.dot_product_attention(X, X, X, is_causal=True, implementation=implementation)
    formula.compare({"out": found}, expected)
    inside_flax = nnx.dot_product_attention(X, X, X, is_causal=True)
    formula.compare({"out": inside_flax}, expected)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("implementation", [None, "flash", "cudnn"])
def test_in_the_place_of_jaxs_function_it_is_the_formula_on_a_gpu(
    implementation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 128, 4, 64), jnp.bfloat16)
    expected = formula.expected(lambda of, x: {"out": of(x, x, x, is_causal=True)}, x)
    monkeypatch.setattr(jax.nn, "dot_product_attention", jattn.dot_product_attention)
    found = jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation=implementation)
    formula.compare({"out": found}, expected)
