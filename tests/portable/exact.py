"""The portable kernels as backends under test: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.backends.kernels import only
from jattn.call.arguments import attention_call
from jattn.call.spec import AttentionSpec
from tests.backends import Backend, Results, call, quick_jit
from tests.cases import Case, operands
from tests.test_padding import planted
from tests.test_semantics import check_found, check_kinds, check_zeros

ON_GPU = jax.default_backend() == "gpu"


def _in_kernels(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        with only("portable", interpret=not ON_GPU):
            return function(*args, **options)

    return run


FLASH = Backend("portable-flash", _in_kernels(jattn.flash_attention))
CHUNKED = Backend("portable-chunked", _in_kernels(jattn.memory_efficient_attention))
BOTH = [FLASH, CHUNKED]


@pytest.fixture
def ampere() -> None:
    """Skips a test of the compiled kernels where they cannot run."""
    if not ON_GPU or tuple(map(int, jax.devices()[0].compute_capability.split("."))) < (8, 0):
        pytest.skip("needs an NVIDIA GPU of compute capability 8.0 or later")


@cache
def spec_of(case: Case) -> AttentionSpec:
    """The static facts of a case's call."""
    drawn = operands(case, 0)
    found = []

    def record(q: Any, k: Any, v: Any, **options: Any) -> Any:
        found.append(attention_call(q, k, v, **options).spec)
        return q

    # Traced: of known lengths negative ones are refused.
    jax.eval_shape(lambda: call(Backend("spec", record), drawn, drawn.differentiable))
    return found[0]


def compute(backend: Backend, case: Case, seed: int, poison: float = np.nan) -> Results:
    """Output, log-sum-exp and the gradients of both, with poison in what lies past the lengths."""
    drawn = operands(case, seed)
    arrays = {name: jnp.asarray(x) for name, x in planted(case, seed, poison).items()}
    cotangents = (jnp.asarray(drawn["dout"]), jnp.asarray(drawn["dlse"]))
    return compiled(backend, case, seed)(arrays, cotangents)


@cache
def compiled(backend: Backend, case: Case, seed: int) -> Callable[..., Results]:
    drawn = operands(case, seed)

    @quick_jit
    def everything(arrays: Results, cotangents: Any) -> Results:
        (out, lse), vjp = jax.vjp(
            lambda arrays: call(backend, drawn, arrays, return_residual=True), arrays
        )
        return {"out": out, "lse": lse, **vjp(cotangents)[0]}

    return everything


def check(backend: Backend, case: Case, seed: int) -> None:
    """What the call gives is as exact as eager is."""
    found = compute(backend, case, seed)
    check_kinds(found, case, seed)
    check_zeros(found, case, seed)
    check_found(found, backend, case, seed)
