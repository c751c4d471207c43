"""Tangents of random calls by the Hopper kernels, all features mixed; a failure prints the call.

`--fuzz N` says how many run on a GPU, `--seed` which.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from pallas_kernels.hopper.limits import tangent_refusals
from tests.cases import Case
from tests.hopper import test_fuzz as fuzz
from tests.hopper import test_tangent
from tests.hopper.calls import spec_of
from tests.hopper.exact import hopper

__all__ = ["hopper"]

pytest_generate_tests = fuzz.pytest_generate_tests


def random_case(seed: int, number: int, most: int = 700) -> Case:
    """One of `test_fuzz`, at a head dim that the kernels of tangents take."""
    case = fuzz.random_case(seed, number, most)

    def narrow(size: int) -> int:
        return size if size <= 128 else size - 128

    value_dim = None if case.value_dim is None else narrow(case.value_dim)
    return replace(case, head_dim=narrow(case.head_dim), value_dim=value_dim)


def test_the_kernels_do_every_random_call() -> None:
    assert not any(tangent_refusals(spec_of(random_case(0, number))) for number in range(40))


@pytest.mark.thorough
@pytest.mark.parametrize("fixed", range(6))
def test_interpreted_the_outputs_tangent_is_as_exact(fixed: int, seed: int) -> None:
    case = random_case(seed, fixed, most=150)
    print(case)
    test_tangent.check(case, seed, interpret=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_the_outputs_tangent_is_as_exact(number: int, seed: int) -> None:
    case = random_case(seed, number)
    print(case)
    test_tangent.check(case, seed, interpret=False)
