"""No portable kernel reads or writes outside its arrays, by CUDA's memory checker."""

from __future__ import annotations

import pathlib

import pytest

from tests.hopper.test_memcheck import assert_clean, assert_found, check
from tests.portable.exact import ampere

__all__ = ["ampere"]

HERE = pathlib.Path(__file__).parent


@pytest.mark.gpu
@pytest.mark.usefixtures("ampere")
def test_the_checker_finds_a_write_past_the_end() -> None:
    assert_found(check(HERE, "overrun"))


@pytest.mark.gpu
@pytest.mark.usefixtures("ampere")
def test_the_kernels_stay_inside_their_arrays() -> None:
    assert_clean(check(HERE, "calls"))
