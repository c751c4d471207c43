"""`jattn.flash_attention` against float64, with NaN in what lies past the lengths."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.backends.flash import interpreted
from tests.backends import Backend, Results, call
from tests.cases import Case, operands
from tests.test_padding import planted
from tests.test_semantics import check_found, check_kinds, check_zeros


def _interpreted(*args: Any, **options: Any) -> Any:
    with interpreted():
        return jattn.flash_attention(*args, **options)


FLASH = Backend("flash", jattn.flash_attention)
INTERPRETED = Backend("flash_interpreted", _interpreted)


@cache
def has_hopper() -> bool:
    """Whether this machine can run the kernels."""
    device = jax.devices()[0]
    return device.platform == "gpu" and device.compute_capability == "9.0"


@pytest.fixture
def hopper() -> None:
    """Skips a test of the kernels where they cannot run."""
    if not has_hopper():
        pytest.skip("needs a GPU of compute capability 9.0")


def compute(backend: Backend, case: Case, seed: int) -> Results:
    """Output, log-sum-exp and the gradients of both."""
    drawn = operands(case, seed)

    def everything(arrays: Results, cotangents: Any) -> Results:
        (out, lse), vjp = jax.vjp(
            lambda arrays: call(backend, drawn, arrays, return_residual=True), arrays
        )
        return {"out": out, "lse": lse, **vjp(cotangents)[0]}

    # The interpreter's effects cannot be compiled where a call is partitioned.
    run = everything if backend is INTERPRETED else jax.jit(everything)
    arrays = {name: jnp.asarray(x) for name, x in planted(case, seed, np.nan).items()}
    return run(arrays, (jnp.asarray(drawn["dout"]), jnp.asarray(drawn["dlse"])))


def check(backend: Backend, case: Case, seed: int) -> None:
    """What the call gives is as exact as eager is."""
    found = compute(backend, case, seed)
    check_kinds(found, case, seed)
    check_zeros(found, case, seed)
    check_found(found, backend, case, seed)
