"""With `jax_enable_x64` every backend is as exact as without: Python's integers are 64 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import pytest

from tests import test_semantics
from tests.backends import CHUNKED, EAGER, Backend
from tests.cases import EVERYTHING, Case, first
from tests.hopper import exact as hopper
from tests.hopper.calls import Half
from tests.portable import exact as portable

ALL = replace(EVERYTHING, name="everything_x64")


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    """For all threads: those of Mosaic's interpreter do not have this one's contexts."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("backend", first(1, [CHUNKED, EAGER]), ids=str)
def test_the_formula_and_the_loops_are_as_exact(backend: Backend, seed: int) -> None:
    test_semantics.check_dtypes_and_shapes(backend, ALL, seed)
    test_semantics.check_errors(backend, ALL, seed)
    test_semantics.check_what_sees_nothing_is_zero(backend, ALL, seed)


def test_the_portable_kernels_are_as_exact(seed: int) -> None:
    case = Case(
        "bias_x64", 2, 24, 40, causal=True, window=(9, 3), key_lengths=(40, 21), bias="1NTS"
    )
    portable.check(portable.FLASH, case, seed)


def test_the_hopper_kernels_are_as_exact(seed: int) -> None:
    case: Case = Half("lengths_x64", 1, 70, 90, 2, 1, 64, causal=True, key_lengths=(63,))
    hopper.check(hopper.FLASH if portable.ON_GPU else hopper.INTERPRETED, case, seed)
