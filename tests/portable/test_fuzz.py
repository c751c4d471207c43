"""Random calls of the portable kernels, all features mixed; a failure prints the call.

`--fuzz N` says how many run on a GPU, `--seed` which.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from pallas_kernels.portable import limits
from tests.backends import Backend
from tests.cases import Case
from tests.hopper import test_fuzz as hopper
from tests.portable.exact import BOTH, ampere, check, spec_of

__all__ = ["ampere"]

INTERPRETED_NUMBERS = range(4)
FORMS = ["".join(axes) for axes in product("B1", "N1", "T1", "S1")]


def random_case(seed: int, number: int, most: int = 700) -> Case:
    """A call of the Hopper kernels' fuzzer with what only the portable ones do."""
    rng = np.random.default_rng([seed, number, 1])

    def chance(one_in: int) -> bool:
        return rng.integers(one_in) == 0

    widest = 512 if chance(3) else 128
    return replace(
        hopper.random_case(seed, number, most),
        name=f"portable-fuzz-{seed}-{number}",
        head_dim=int(rng.integers(1, widest + 1)),
        value_dim=int(rng.integers(1, widest + 1)) if chance(3) else None,
        dtype=str(rng.choice(["bfloat16", "float16", "float32"])),
        mask=str(rng.choice(FORMS)) if chance(3) else None,
        mask_density=float(rng.choice([0.05, 0.5, 0.95])),
        bias=str(rng.choice(FORMS)) if chance(2) else None,
        bias_dtype=str(rng.choice(["float32", "bfloat16"])) if chance(3) else None,
        dropout=float(rng.choice([0.1, 0.5, 0.9])) if chance(3) else 0.0,
        shared_dropout=chance(3),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    hopper.pytest_generate_tests(metafunc)


def test_the_kernels_do_every_random_call_and_every_feature_is_drawn() -> None:
    cases = [random_case(0, number, most=50) for number in range(40)]
    assert all(limits.refusals(spec_of(case)) == [] for case in cases)
    for feature in ("mask", "bias", "dropout", "shared_dropout", "value_dim", "bias_dtype"):
        assert 5 < sum(bool(getattr(case, feature)) for case in cases) < 35, feature
    assert {case.dtype for case in cases} == {"bfloat16", "float16", "float32"}


@pytest.mark.thorough
@pytest.mark.parametrize("fixed", INTERPRETED_NUMBERS)
def test_interpreted_random_calls_are_as_exact(fixed: int, seed: int) -> None:
    case = random_case(seed, fixed, most=70)
    print(case)
    check(BOTH[fixed % 2], case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("backend", BOTH, ids=str)
def test_random_calls_are_as_exact(backend: Backend, number: int, seed: int) -> None:
    case = random_case(seed, number)
    print(case)
    check(backend, case, seed)
