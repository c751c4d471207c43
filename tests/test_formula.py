"""In float64 `eager` is the formula, to a few units of float64: other tests take it for exact."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from tests.backends import EAGER, compute
from tests.cases import EVERYTHING, Case
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
