"""The Hopper forward kernel: interpreted on a CPU, and on a Hopper GPU where there is one."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.hopper import limits
from pallas_kernels.hopper.forward import forward
from tests.hopper.calls import LARGE, SMALL, Call, check


@cache
def has_hopper() -> bool:
    try:
        return any(d.compute_capability == "9.0" for d in jax.devices("gpu"))
    except RuntimeError:
        return False


@pytest.fixture
def hopper() -> None:
    if not has_hopper():
        pytest.skip("needs a GPU of compute capability 9.0")


def run(call: Call, **options: Any) -> tuple[Any, Any]:
    made = call.call()
    assert limits.refusals(made.spec) == []
    return jax.jit(lambda x: forward(made.spec, x, **options))(made.operands)


@pytest.mark.parametrize("call", SMALL, ids=str)
def test_interpreted_as_exact_as_the_formula(call: Call) -> None:
    check(call, *run(call, interpret=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("call", SMALL + LARGE, ids=str)
def test_as_exact_as_the_formula(call: Call) -> None:
    check(call, *run(call))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("call", LARGE[::4], ids=str)
def test_two_hundred_runs_are_bitwise_equal(call: Call) -> None:
    made = call.call()
    function = jax.jit(lambda x: forward(made.spec, x))
    first = jax.tree.map(np.asarray, function(made.operands))
    for _ in range(199):
        again = jax.tree.map(np.asarray, function(made.operands))
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
