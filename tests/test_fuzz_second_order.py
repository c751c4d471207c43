"""Second derivatives of random calls, all arguments mixed, against float64."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.backends import CHUNKED
from tests.cases import Case
from tests.second_order import check as check_modes
from tests.test_fuzz import cases

# Of these each runs all four maps; all other modes are made of the same.
MODES = ("forward_reverse", "reverse_forward")


@settings(max_examples=3)
@given(case=cases(), seed=st.integers(0, 2**16))
def check(case: Case, seed: int) -> None:
    if case.bias is not None and case.bias[-1] == "1":
        # Such a bias moves no weight: its derivatives are sums of terms that cancel, each of them
        # off by the output's rounding.
        case = replace(case, dtype="float32")
    note(f"{case!r} seed {seed}")
    check_modes(CHUNKED, case, seed, MODES)


@pytest.mark.thorough
@pytest.mark.parametrize("part", range(4))
def test_random_calls_are_exact_within_rounding(part: int) -> None:
    fixed = settings.default is not None and settings.default.derandomize
    (hypothesis.seed(part)(check) if fixed else check)()
