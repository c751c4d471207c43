"""In 64-bit mode each backend traces every kind of call without a leak or a wide array.

Traced only, which is where both show. That nothing is promoted in silence all tests say: see
`tests.promotion`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests import backends
from tests.backends import Backend, call
from tests.cases import (
    BIASES,
    EVERYTHING,
    INTERVALS,
    LOGITS,
    SEGMENTS_AND_MASKS,
    SHAPES,
    operands,
    thorough,
)
from tests.hopper import calls as hopper_calls
from tests.hopper import exact as hopper
from tests.portable import exact as portable

GENERAL = [SHAPES[11], *INTERVALS[4::7], *SEGMENTS_AND_MASKS[::4], *BIASES[1::5], *LOGITS[1::3]]
FEW = [EVERYTHING, next(case for case in INTERVALS if case.offset is not None)]
HOPPER = hopper_calls.SMALL
CALLS = [
    (backends.CHUNKED, FEW),
    (portable.FLASH, FEW[:1]),
    (hopper.INTERPRETED, HOPPER[2:3]),
    *thorough(
        (backends.EAGER, GENERAL),
        (backends.CHUNKED, GENERAL),
        (backends.DEFAULT, GENERAL[::3]),
        (portable.FLASH, GENERAL),
        (portable.CHUNKED, GENERAL[1::3]),
        (hopper.INTERPRETED, HOPPER),
    ),
]


def traced(backend: Backend, case: Any) -> Any:
    """The call with all its gradients, as a program."""
    drawn = operands(case, 0)

    def everything(arrays: Any, cotangents: Any) -> Any:
        results, vjp = jax.vjp(lambda x: call(backend, drawn, x, return_residual=True), arrays)
        return results, vjp(cotangents)

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    arrays = {name: shape(x) for name, x in drawn.differentiable.items()}
    return jax.make_jaxpr(everything)(arrays, (shape(drawn["dout"]), shape(drawn["dlse"]))).jaxpr


def wide_arrays(jaxpr: Any) -> Iterator[str]:
    """Arrays of 64 bits, but for a loop's counter, that a program computes."""
    for equation in jaxpr.eqns:
        for result in equation.outvars:
            aval = result.aval
            if getattr(aval, "shape", ()) and np.dtype(aval.dtype).itemsize == 8:
                yield f"{equation.primitive} {aval}"
        for inner in jaxprs_in_params(equation.params):
            yield from wide_arrays(inner)


@pytest.fixture
def what_was_there_before_is_no_garbage() -> Iterator[None]:
    """The leak checker collects garbage after each trace, among all objects of all tests so far."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("what_was_there_before_is_no_garbage")
@pytest.mark.parametrize(("backend", "cases"), CALLS, ids=str)
def test_nothing_leaks_or_grows_to_64_bits(backend: Backend, cases: Any) -> None:
    with jax.enable_x64(True), jax.checking_leaks():
        for case in cases:
            found = set(wide_arrays(traced(backend, case)))
            assert not found, (case, found)
