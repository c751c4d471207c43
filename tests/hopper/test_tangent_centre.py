"""Hopper's tangent of the output where one key moves by far more than those beside it.

What is taken off the logits' tangents has to be near a row's mean: the output, in two bytes, is
multiplied by how far it is. A row of which a block of 64 keys shows one alone tries that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.backends import Results
from tests.cases import Case, chosen, operands
from tests.hopper.calls import Half
from tests.hopper.exact import hopper
from tests.hopper.test_tangent import check
from tests.portable.tangents import directions

__all__ = ["hopper"]

One = partial(Half, batch=1, heads=1, kv_heads=1, head_dim=64)
CASES = [
    One("first_rows", queries=100, keys=100, causal=True),
    One("first_tiles", queries=200, keys=200, causal=True),
    One("first_tiles_128", queries=150, keys=150, head_dim=128, causal=True),
    One("bottom_right", queries=70, keys=333, causal=True, alignment="bottom_right"),
    One("narrow_window", queries=300, keys=300, window=(70, 0)),
    One("two_sided", queries=140, keys=300, window=(90, 40)),
    One("lengths", batch=2, queries=150, keys=200, query_lengths=(150, 70), key_lengths=(65, 190)),
    One("offset", queries=70, keys=270, causal=True, window=(150, None), offset=(60,)),
    One("segments", queries=200, keys=200, causal=True, segments="sorted"),
    One("sinks_soft_cap", queries=140, keys=140, causal=True, sinks=True, soft_cap=5.0),
]


def outlying(case: Case, seed: int) -> tuple[Results, Results]:
    """Values of a mean; keys of which the first of each block but one moves by much."""
    arrays = {name: np.array(x) for name, x in operands(case, seed).differentiable.items()}
    moving = {name: np.array(x) for name, x in directions(case, seed, "k").items()}
    arrays["q"] /= np.asarray(8, arrays["q"].dtype)
    arrays["v"] += np.asarray(3, arrays["v"].dtype)
    moving["k"][:, 64::64] *= np.asarray(40, moving["k"].dtype)
    return arrays, moving


def peaked(case: Case, seed: int) -> tuple[Results, Results]:
    """The same with keys that are large: a row's weights are those of a few."""
    arrays, moving = outlying(case, seed)
    arrays["k"] *= np.asarray(8, arrays["k"].dtype)
    return arrays, moving


@pytest.mark.parametrize("case", chosen(CASES, "first_rows"), ids=str)
def test_interpreted_one_keys_change_is_not_taken_off_all(case: Case, seed: int) -> None:
    arrays, moving = outlying(case, seed)
    check(case, seed, interpret=True, arrays=arrays, moving=moving)


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_large_keys(case: Case, seed: int) -> None:
    arrays, moving = peaked(case, seed)
    check(case, seed, interpret=True, arrays=arrays, moving=moving)


def far_below(seed: int) -> tuple[Case, Results, Results]:
    """The block visited first weighs nothing in float32, and keys have much in common."""
    case = One("far_below", queries=40, keys=128)
    arrays = {name: np.array(x) for name, x in operands(case, seed).differentiable.items()}
    moving = {name: np.array(x) for name, x in directions(case, seed, "q").items()}
    arrays["k"] += np.asarray(30, arrays["k"].dtype)
    arrays["q"] /= np.asarray(16, arrays["q"].dtype)
    arrays["q"][..., 0], arrays["k"][..., 0], moving["q"][..., 0] = 8, 0, 0
    arrays["k"][:, 64:, :, 0] = -300
    return case, arrays, moving


@pytest.mark.thorough
def test_interpreted_a_first_block_of_no_weight(seed: int) -> None:
    case, arrays, moving = far_below(seed)
    check(case, seed, interpret=True, arrays=arrays, moving=moving)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
class TestOnAGpu:
    @pytest.mark.parametrize("case", CASES, ids=str)
    @pytest.mark.parametrize("make", [outlying, peaked])
    def test_one_keys_change_is_not_taken_off_all(
        self, make: Callable[..., Any], case: Case, seed: int
    ) -> None:
        arrays, moving = make(case, seed)
        check(case, seed, interpret=False, arrays=arrays, moving=moving)

    def test_a_first_block_of_no_weight(self, seed: int) -> None:
        case, arrays, moving = far_below(seed)
        check(case, seed, interpret=False, arrays=arrays, moving=moving)
