"""The portable kernels of the gradients' tangents: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.portable.limits import tangent_refusals
from tests.backends import quick_jit
from tests.cases import CASES, EVERYTHING, Case, operands
from tests.portable.calls import LARGE, SMALL
from tests.portable.exact import ampere, spec_of
from tests.portable.tangents import (
    TINY,
    arrays_of,
    check_backward_tangent,
    directions,
    pulled_by_kernel,
)
from tests.portable.test_tangent import past_lengths

__all__ = ["ampere"]

SETS = ["q", "k", "v", "bias", "sinks", "q v", "k sinks"]
WANTED = ["query", "key", "value", "bias", "query value"]
EVERYTHING_HALF = replace(EVERYTHING, name="everything_half", dtype="bfloat16", bias="BNTS")


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES, ids=str)
def test_they_are_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check_backward_tangent(case, seed)


@pytest.mark.thorough
@pytest.mark.parametrize("names", ["", *SETS])
def test_what_has_no_tangent_adds_nothing(names: str, seed: int) -> None:
    """Of none of them, what the gradients' tangents alone give."""
    case = EVERYTHING_HALF
    found = check_backward_tangent(case, seed, names)
    if names == "":
        assert (np.asarray(found["q"], np.float32) != 0).any()


@pytest.mark.thorough
@pytest.mark.parametrize("names", SETS)
def test_tangents_of_gradients_whose_cotangents_do_not_move(names: str, seed: int) -> None:
    check_backward_tangent(EVERYTHING_HALF, seed, names, moves_gradients=False)


@pytest.mark.thorough
@pytest.mark.parametrize("wanted", WANTED)
def test_what_is_not_wanted_is_left_out(wanted: str, seed: int) -> None:
    found = check_backward_tangent(EVERYTHING_HALF, seed, wanted=wanted)
    assert len(found) == len(wanted.split())


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("names", "wanted"), [("", ""), ("scale", "query key scale"), ("q", "scale")]
)
def test_an_array_as_scale(names: str, wanted: str, seed: int) -> None:
    case = replace(EVERYTHING, bias=None, scale=None)
    moving = names or None  # all
    check_backward_tangent(case, seed, moving, scale=True, wanted=wanted)


@pytest.mark.thorough
def test_what_lies_past_a_length_changes_no_bit(seed: int) -> None:
    lengths = {"query_lengths": (13, 24), "key_lengths": (21, 0)}
    case = Case("padded", **lengths, bias="BNTS", dtype="bfloat16")
    wanted = ("query", "key", "value", "bias")
    run = quick_jit(partial(pulled_by_kernel, case=case, seed=seed, tiles=TINY, wanted=wanted))

    def found(poison: float) -> Any:
        arrays = past_lengths(case, arrays_of(case, seed), poison)
        moving = past_lengths(case, directions(case, seed), poison)
        return run(arrays, moving, gradients_of(case, seed))

    clean, dirty = found(0.0), found(np.nan)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in clean.values())


def gradients_of(case: Case, seed: int) -> Any:
    drawn = operands(case, seed)
    return {"dout": drawn["dout"], "dlse": drawn["dlse"]}


on_a_gpu = [pytest.mark.gpu, pytest.mark.usefixtures("ampere")]


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
    def test_they_are_as_exact_as_the_formula(self, case: Case, seed: int) -> None:
        if reasons := tangent_refusals(spec_of(case)):
            pytest.skip("; ".join(reasons))
        check_backward_tangent(case, seed, tiles=None)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_they_are_as_exact_in_tiny_tiles(self, case: Case, seed: int) -> None:
        check_backward_tangent(case, seed)

    def test_they_are_bitwise_repeatable(self, seed: int) -> None:
        case = Case("repeated", 2, 520, 520, 4, 2, 64, dtype="bfloat16", causal=True)
        wanted = ("query", "key", "value")
        run = jax.jit(partial(pulled_by_kernel, case=case, seed=seed, tiles=None, wanted=wanted))
        moving = directions(case, seed)
        arrays = jax.device_put((arrays_of(case, seed), moving, gradients_of(case, seed)))
        first = jax.tree.map(np.asarray, run(*arrays))
        for _ in range(50):
            again = jax.tree.map(np.asarray, run(*arrays))
            jax.tree.map(np.testing.assert_array_equal, again, first)
