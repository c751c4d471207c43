"""Gathers and rings of some heads at a time: values of all of them."""

from __future__ import annotations

import pytest

from tests.four_devices import run

PROGRAM = """
from dataclasses import replace
from jattn.transforms.context import plan
from tests import context
from tests.backends import CHUNKED
from tests.cases import Case

# Each array that has heads, or one for all of them.
case = Case(
    "pieces", queries=40, keys=40, heads=4, kv_heads=2, causal=True, segments="sorted",
    mask="1N1S", mask_density=0.9, bias="{bias}", sinks=True, dropout=0.2,
)
plan.LEAST_ROWS = 1
found = context.through(
    CHUNKED, case, context.mesh_of(2), layout="contiguous", schedule="{schedule}"
)
context.check(found, case)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("bias", ["1NTS", "B11S"])
@pytest.mark.parametrize("schedule", ["gather", "ring"])
def test_values_and_gradients_are_those_of_one_device(schedule: str, bias: str) -> None:
    run(PROGRAM.format(schedule=schedule, bias=bias), devices=2, kind="small pieces")
