"""Calls for which cuDNN was chosen, whose program is then lowered for the CPU, or for a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jattn
from tests import cudnn_calls, formula
from tests.backends import Backend, quick_jit
from tests.cases import thorough
from tests.test_large_logits import CASES as LARGE
from tests.test_large_logits import check_sums, constant
from tests.test_lowered_elsewhere import For, check_gradient, drawn
from tests.test_rematerialisation import calls

BY_NAME = {case.name: replace(case, queries=40, keys=24) for case in cudnn_calls.CASES}
CUDNN = Backend("cudnn", For("NVIDIA A100", cudnn_calls.CUDNN))
CUSTOM_CALL = re.compile(r"__cudnn\$fmhaSoftmax(?:Backward)?")
BOTH = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]


@pytest.fixture(autouse=True)
def assumed() -> Iterator[None]:
    with cudnn_calls.assumed():
        yield


def attend(x: jax.Array) -> Any:
    return CUDNN(x, x, x, is_causal=True)


def loss(x: jax.Array) -> jax.Array:
    return attend(x).astype(jnp.float32).sum()


@pytest.mark.parametrize(
    "name", ["causal_more_queries", "multi_query", *thorough(("full",), ("window",), ("float16",))]
)
def test_run_on_a_cpu_it_is_as_exact(name: str, seed: int) -> None:
    cudnn_calls.check(CUDNN, BY_NAME[name], seed)


def test_cudnn_runs_where_no_backend_is_named(seed: int) -> None:
    """On an A100 in 16 bits."""
    plain = For("NVIDIA A100", jattn.dot_product_attention)
    text = jax.jit(lambda x: plain(x, x, x)).trace(drawn(seed)).lower(lowering_platforms=("cuda",))
    assert CUSTOM_CALL.findall(text.as_text()) == BOTH[:1]


def test_the_platform_lowered_for_decides(seed: int) -> None:
    traced = quick_jit(jax.grad(loss)).trace(drawn(seed))
    on_cpu, on_gpu = (traced.lower(lowering_platforms=(p,)) for p in ("cpu", "cuda"))
    assert not CUSTOM_CALL.search(on_cpu.as_text())
    assert set(CUSTOM_CALL.findall(on_gpu.as_text())) == set(BOTH)
    check_gradient(drawn(seed), on_cpu.compile()(drawn(seed)))


@pytest.mark.thorough
def test_outside_jit(seed: int) -> None:
    check_gradient(drawn(seed), jax.grad(loss)(drawn(seed)))


@pytest.mark.parametrize("axis", [0, *thorough((1,))])
def test_gradients_of_mapped_rows(axis: int) -> None:
    """Along any axis, where one of several arguments is mapped."""
    q, k = drawn(0), drawn(1)
    rows = jnp.moveaxis(jnp.stack([q, 2 * q, -q]), 0, axis)

    def gradients(backend: Callable[..., Any], q: jax.Array, k: jax.Array) -> Any:
        return jax.grad(lambda q, k: jnp.sin(backend(q, k, k)).astype(jnp.float32).sum(), (0, 1))(
            q, k
        )

    def mapped(backend: Callable[..., Any], rows: jax.Array, k: jax.Array) -> Any:
        one = partial(gradients, backend)
        return jax.vmap(one, in_axes=(axis, None))(rows, k)

    found = quick_jit(partial(mapped, CUDNN))(rows, k)
    formula.check(found, mapped, rows, k)


def test_what_a_policy_keeps_is_not_run_again(seed: int) -> None:
    keep = jax.checkpoint_policies.save_only_these_names(*jattn.CHECKPOINT_NAMES)

    def both_ways(function: Callable[[jax.Array], Any]) -> int:
        gradient = jax.value_and_grad(lambda x: jnp.sin(function(x)).astype(jnp.float32).sum())
        return calls(gradient, drawn(seed))

    assert both_ways(attend) == 2
    assert both_ways(jax.checkpoint(attend, policy=keep)) == 2
    assert both_ways(jax.checkpoint(attend)) == 3


def test_derivatives_it_does_not_have_are_made_of_its_results(seed: int) -> None:
    """By the loops in XLA: the tangent, and the gradient of a loss that holds it."""
    x, t = drawn(seed), drawn(seed + 1)

    def loss(backend: Callable[..., Any], x: jax.Array, t: jax.Array) -> jax.Array:
        out, along = jax.jvp(lambda x: backend(x, x, x, is_causal=True), (x,), (t,))
        return (out * along).sum()

    def gradient(backend: Callable[..., Any], x: jax.Array, t: jax.Array) -> jax.Array:
        return jax.grad(partial(loss, backend))(x, t)

    formula.check(quick_jit(partial(gradient, CUDNN))(x, t), gradient, x, t)
    traced = jax.jit(partial(gradient, CUDNN)).trace(x, t)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert set(CUSTOM_CALL.findall(text)) == set(BOTH)


def test_a_bias_is_left_to_others(seed: int) -> None:
    """A row hidden by -1e9 has no room for its weights in the log-sum-exp that cuDNN keeps."""
    x = drawn(seed)
    bias = jnp.zeros((1, 2, 40, 40), x.dtype)
    with pytest.raises(jattn.UnsupportedAttentionError, match="loses the weights beside -1e9"):
        CUDNN(x, x, x, bias)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
def test_arrays_of_the_cpu_on_a_machine_with_a_gpu(seed: int) -> None:
    def sums(x: jax.Array) -> jax.Array:
        return cudnn_calls.CUDNN(x, x, x, is_causal=True).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(sums))
    for device in (jax.devices("cpu")[0], jax.devices("gpu")[0]):
        found = gradient(jax.device_put(drawn(seed), device))
        assert found.devices() == {device}
        check_gradient(drawn(seed), found)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
def test_a_row_hidden_by_a_finite_bias_has_weights_that_add_up_to_one() -> None:
    backend = Backend("default", jattn.dot_product_attention)
    for name in ("-1e9", "finfo.min"):
        check_sums(backend, LARGE[name](queries=8, dtype=jnp.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_add_up_to_one_up_to_the_bound_that_is_given(dtype: Any) -> None:
    """Logits of 8e4: products of 64 numbers of 100, by 1 / 8."""
    check_sums(cudnn_calls.CUDNN, constant(100, dtype=dtype))
