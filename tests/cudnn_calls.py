"""Calls that cuDNN takes, and cuDNN where there is none: to trace and to lower, not to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

import jattn
from jattn.backends import cudnn
from tests import tolerance
from tests.backends import EAGER, Backend, call, quick_jit
from tests.cases import Case, operands

__all__ = ["CASES", "CUDNN", "assumed", "check"]

CUDNN = Backend("cudnn", partial(jattn.dot_product_attention, implementation="cudnn"))
SIZES = Case("sizes", queries=192, keys=192, head_dim=64, dtype="bfloat16")
CASES = [
    replace(SIZES, name="full"),
    replace(SIZES, name="float16", dtype="float16"),
    replace(SIZES, name="ragged", queries=150, keys=78),
    replace(SIZES, name="causal", causal=True),
    replace(SIZES, name="causal_more_queries", causal=True, queries=202, keys=98),
    replace(SIZES, name="window", causal=True, window=(17, 0)),
    replace(SIZES, name="window_of_itself", window=(0, 0)),
    replace(SIZES, name="multi_query", kv_heads=1, scale=0.3),
    replace(SIZES, name="wide", head_dim=128, causal=True),
]


@contextmanager
def assumed() -> Iterator[None]:
    """Lets JAX and the table find a cuDNN, which is asked for nothing before the program runs."""
    with (
        mock.patch.object(jax_cudnn, "check_cudnn_version", return_value=91200),
        mock.patch.object(cudnn, "_has_gpu", return_value=True),
    ):
        yield


def check(backend: Backend, case: Case, seed: int) -> None:
    """Output and gradients are as exact as eager's."""
    drawn = operands(case, seed)
    attention = drawn.exact(None)
    zero = np.zeros_like(drawn["dlse"])
    values = {"out": attention.out, **attention.gradients(drawn["dout"], zero)}
    magnitudes = attention.magnitudes(drawn["dout"], zero)

    def everything(backend: Backend) -> dict[str, jax.Array]:
        @quick_jit
        def run(arrays: dict[str, jax.Array], d_out: jax.Array) -> dict[str, jax.Array]:
            out, vjp = jax.vjp(lambda arrays: call(backend, drawn, arrays), arrays)
            return {"out": out, **vjp(d_out)[0]}

        return run(jax.tree.map(jnp.asarray, drawn.differentiable), jnp.asarray(drawn["dout"]))

    found, peer = everything(backend), cache(partial(everything, EAGER))
    for name, value in values.items():
        own = partial(lambda name: peer()[name], name)
        tolerance.check_against_peer(name, found[name], own, value, magnitudes[name], case.dtype)
