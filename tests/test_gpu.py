"""On an NVIDIA GPU: the table of cases on every backend that runs there, and cuDNN's own cases."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests import tolerance
from tests.backends import DEFAULT, EAGER, Backend, call
from tests.cases import CASES, Case, operands
from tests.test_semantics import (
    check_dtypes_and_shapes,
    check_errors,
    check_what_sees_nothing_is_zero,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

CUDNN = Backend("cudnn", partial(jattn.dot_product_attention, implementation="cudnn"))
SIZES = Case("sizes", queries=192, keys=192, head_dim=64, dtype="bfloat16")
CUDNN_CASES = [
    replace(SIZES, name="full"),
    replace(SIZES, name="float16", dtype="float16"),
    replace(SIZES, name="ragged", queries=150, keys=78),
    replace(SIZES, name="causal", causal=True),
    replace(SIZES, name="causal_more_queries", causal=True, queries=202, keys=98),
    replace(SIZES, name="window", causal=True, window=(17, 0)),
    replace(SIZES, name="window_of_itself", window=(0, 0)),
    replace(SIZES, name="bias", bias="1NTS"),
    replace(SIZES, name="bias_causal", bias="1NTS", causal=True),
    replace(SIZES, name="multi_query", kv_heads=1, scale=0.3),
    replace(SIZES, name="wide", head_dim=128, causal=True),
]


@pytest.mark.parametrize("backend", [EAGER, DEFAULT], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_exact_within_rounding(backend: Backend, case: Case, seed: int) -> None:
    check_dtypes_and_shapes(backend, case, seed)
    check_errors(backend, case, seed)
    check_what_sees_nothing_is_zero(backend, case, seed)


@pytest.mark.parametrize("case", CUDNN_CASES, ids=str)
def test_cudnn_is_exact_within_rounding(case: Case, seed: int) -> None:
    drawn = operands(case, seed)
    attention = drawn.exact(None)
    zero = np.zeros_like(drawn["dlse"])
    values = {"out": attention.out, **attention.gradients(drawn["dout"], zero)}
    magnitudes = attention.magnitudes(drawn["dout"], zero)

    def everything(backend: Backend) -> dict[str, jax.Array]:
        out, vjp = jax.vjp(lambda arrays: call(backend, drawn, arrays), drawn.differentiable)
        return {"out": out, **vjp(jnp.asarray(drawn["dout"]))[0]}

    found, peer = everything(CUDNN), everything(EAGER)
    for name, value in values.items():
        tolerance.check_against_peer(
            name, found[name], peer[name], value, magnitudes[name], case.dtype
        )
