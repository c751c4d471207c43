"""On an NVIDIA GPU: the table of cases on every backend that runs there, and cuDNN's own cases."""

from __future__ import annotations

import jax
import pytest

from tests import cudnn_calls
from tests.backends import DEFAULT, EAGER, Backend
from tests.cases import CASES, Case
from tests.test_semantics import (
    check_dtypes_and_shapes,
    check_errors,
    check_what_sees_nothing_is_zero,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("backend", [EAGER, DEFAULT], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_exact_within_rounding(backend: Backend, case: Case, seed: int) -> None:
    check_dtypes_and_shapes(backend, case, seed)
    check_errors(backend, case, seed)
    check_what_sees_nothing_is_zero(backend, case, seed)


@pytest.mark.parametrize("case", cudnn_calls.CASES, ids=str)
def test_cudnn_is_exact_within_rounding(case: Case, seed: int) -> None:
    cudnn_calls.check(cudnn_calls.CUDNN, case, seed)
