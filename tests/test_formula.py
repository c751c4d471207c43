"""In float64 `eager` is the formula, to a few units of float64: other tests take it for exact."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from tests import formula, long_reference
from tests.backends import EAGER, compute, kept
from tests.cases import EVERYTHING, Case, operands
from tests.portable.tangents import arrays_of, directions, pulled
from tests.test_semantics import check_found, check_zeros

OFFSET = Case("offset", batch=2, causal=True, offset=(3, -2), bias="1NTS", dtype="float64")


@pytest.mark.parametrize(
    "case", [replace(EVERYTHING, dtype="float64"), OFFSET], ids=lambda case: case.name
)
def test_eager_is_the_formula_in_float64(case: Case, seed: int) -> None:
    with jax.enable_x64(True):
        found = compute(EAGER, case, seed)
    assert {x.dtype.name for x in found.values()} == {"float64"}
    check_found(found, EAGER, case, seed)
    check_zeros(found, case, seed)


def test_tangents_are_the_same_in_parts(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU computes them; of what does not move too."""
    monkeypatch.setattr(long_reference, "AT_ONCE", 3 * 64 * 64)  # of the eight heads
    drawn, keep = operands(EVERYTHING, seed), kept(EVERYTHING)
    arrays = arrays_of(EVERYTHING, seed, scale=True)
    moving = directions(EVERYTHING, seed, scale=True)
    gradients = {"dout": drawn["dout"], "dlse": drawn["dlse"], "t_dout": drawn["dout"][::-1]}
    gradients["t_dlse"] = drawn["dlse"][::-1]
    function = partial(pulled, case=EVERYTHING, seed=seed)
    exact = formula.expected(function, arrays, moving, gradients).exact
    found = long_reference.pulled(drawn, keep, arrays, moving, gradients)
    assert found.keys() == exact.keys() | {"sinks"}
    for name, x in exact.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-8, atol=1e-9, err_msg=name)
    some = {name: moving[name] for name in "qk"}
    others = {name: np.zeros_like(x) for name, x in moving.items() if name not in some}
    one, other = (long_reference.pushed(drawn, keep, arrays, x) for x in (some, some | others))
    for name, x in one.items():
        np.testing.assert_array_equal(other[name], x, err_msg=name)
    assert np.abs(one["t_out"]).max() > 0
