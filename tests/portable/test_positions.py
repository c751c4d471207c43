"""Queries one at a time or in chunks, on the portable kernels: see tests/test_positions.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.backends import Backend
from tests.cases import Case
from tests.portable.exact import BOTH, CHUNKED, FLASH, ampere
from tests.test_positions import ONE_PASS, decoded, mapped
from tests.test_semantics import check_found

__all__ = ["ampere"]


@pytest.mark.parametrize(
    ("backend", "case"), [(FLASH, ONE_PASS[2]), (CHUNKED, ONE_PASS[1])], ids=str
)
def test_interpreted_one_query_at_a_time_is_one_pass(
    backend: Backend, case: Case, seed: int
) -> None:
    check_found(decoded(backend, case, seed, 1), backend, case, seed)


def test_interpreted_mapped_chunks_have_the_gradients_of_one_pass(seed: int) -> None:
    check_found(mapped(FLASH, ONE_PASS[0], seed, 6), FLASH, ONE_PASS[0], seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("backend", BOTH, ids=str)
@pytest.mark.parametrize("case", ONE_PASS, ids=str)
def test_chunks_are_one_pass(backend: Backend, case: Case, seed: int) -> None:
    case = replace(case, name=f"{case.name}_long", queries=192, keys=192, head_dim=64)
    for size in (1, 48):
        check_found(decoded(backend, case, seed, size), backend, case, seed)
    check_found(mapped(backend, case, seed, 64), backend, case, seed)
