"""Short sequences of ragged lengths: read and written in place, and exact."""

from __future__ import annotations

import pytest

import jattn
from pallas_kernels.hopper.plan import make_plan
from tests.cases import Case
from tests.hopper.calls import Bottom, Half, spec_of
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper
from tests.hopper.padding import pads

__all__ = ["hopper"]

# Lengths of no multiple of 8; and the like of heads that are padded.
RAGGED = [
    Half("vision", 2, 197, 197, 1, 1, 64),
    Half("causal", 1, 67, 131, 1, 1, 64, causal=True),
    Half("narrow", 1, 67, 131, 1, 1, 40, 56, causal=True),
    Half("lengths", 2, 67, 131, 1, 1, 64, query_lengths=(60, 67), key_lengths=(131, 3)),
    Half("packed", 1, 131, 131, 1, 1, 64, segments="sorted", causal=True),
    Half("grouped", 2, 9, 131, 4, 1, 64),
    Half("window", 1, 331, 335, 2, 1, 64, window=(70, 20)),
    Case("float16", 1, 3, 5, 2, 2, 64, dtype="float16", scale=-0.2),
]
# The same in parts, as these are many keys for so few thread blocks.
IN_PARTS = [
    Half("one_query", 2, 1, 333, 4, 1, 128),
    Half("narrow_parts", 1, 3, 321, 2, 1, 40, 56),
    Half("wide", 1, 1, 301, 2, 1, 200, 256),
    Half("heads_in_rows", 1, 1, 405, 16, 1, 72),
    Bottom("more", 1, 13, 333, 4, 4, 72, causal=True),
    Half("joined_to_sinks", 1, 3, 131, 4, 1, 64, sinks=True),
    Half("lengths_parts", 2, 1, 333, 4, 1, 128, key_lengths=(300, 7)),
    Half("packed_parts", 1, 3, 333, 2, 1, 64, segments="sorted"),
]


@pytest.mark.thorough
@pytest.mark.parametrize("case", [*RAGGED, *IN_PARTS], ids=str)
def test_interpreted_as_exact(case: Case, seed: int) -> None:
    check(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", [*RAGGED, *IN_PARTS], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_on_a_gpu_as_exact(case: Case, seed: int, *, deterministic: bool) -> None:
    with jattn.deterministic_gradients(deterministic):
        check(FLASH, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("length", [197, 257, 577, 1001])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_lengths_of_vision_on_a_gpu(length: int, head_dim: int, seed: int) -> None:
    check(FLASH, Half("", 7, length, length, 5, 5, head_dim), seed)


def test_the_gradient_pads_no_operand() -> None:
    assert pads(Half("", 2, 197, 197, 2, 2, 64), gradient=True) == []


@pytest.mark.parametrize("case", IN_PARTS, ids=str)
def test_parts_are_made_of_what_is_read_in_place(case: Case) -> None:
    assert make_plan(spec_of(case)).in_parts
    assert pads(case, gradient=False) == []


def test_tiles_of_short_sequences_are_not_mostly_past_the_end() -> None:
    def warpgroups(length: int) -> int:
        return make_plan(spec_of(Half("", 32, length, length, 16, 16, 64))).tiles.warpgroups

    assert [warpgroups(length) for length in (197, 577, 1024, 4096)] == [2, 2, 3, 3]
