"""A backward that is compiled apart from its forward makes the rows' sums as fast as together."""

from __future__ import annotations

import pathlib

import pytest

from tests.programs import VERSIONS, printed


@pytest.mark.compile
@pytest.mark.parametrize("version", VERSIONS)
def test_no_transposition_makes_the_sums(version: str) -> None:
    """One that does makes them an element at a time, in seven times the time."""
    (found,) = printed(version, pathlib.Path(__file__).with_name("compile_rows.py"))
    reductions = [x for x in found["fusions"].values() if "reduce" in x and "multiply" in x]
    sums = [x for x in reductions if "abs" not in x]  # which the largest low part is made by
    assert len(sums) == 1
    assert "transpose" not in sums[0]
