"""The first thread block that visits a block of queries stores its dQ: nothing is filled before.

With lists, which `test_key_tile_lists.py` forces on small calls, and without.
"""

from __future__ import annotations

import pytest

from pallas_kernels.hopper.backward_tiles import choose_backward_tiles
from tests.cases import Case, chosen
from tests.hopper.calls import Bottom, Half, spec_of
from tests.hopper.exact import FLASH, INTERPRETED, check, compiled, hopper

__all__ = ["hopper"]

CASES = [
    Half("full", 1, 330, 390, 2, 2, 128),
    Half("causal", 1, 150, 270, 2, 2, 128, causal=True),
    Half("pieces", 1, 67, 390, 1, 1, 128),
    Half("grouped", 1, 130, 270, 4, 2, 128, causal=True, sinks=True),
    Half("window", 1, 270, 400, 2, 1, 128, causal=True, window=(100, 0)),
    Bottom("bottom_right", 1, 65, 264, 2, 1, 128),
    Half("packed", 1, 150, 150, 2, 1, 128, segments="sorted", causal=True),
    Half("packed_unseen", 1, 400, 200, 2, 1, 128, segments="sorted", causal=True, window=(10, 0)),
    Half("unsorted", 1, 200, 270, 2, 1, 128, segments="unsorted", causal=True),
    Half("three_pieces", 1, 67, 270, 1, 1, 88, causal=True),
    Half("even_pieces", 1, 67, 390, 1, 1, 120),
    Half("packed_96", 1, 150, 150, 2, 1, 96, segments="sorted", causal=True),
]
LARGE = [
    Half("many_full", 8, 577, 577, 16, 16, 128),
    Half("longer", 8, 1024, 1024, 16, 16, 128),
    Half("many_causal", 8, 1000, 1000, 16, 16, 128, causal=True),
    Half("short", 64, 257, 257, 16, 16, 128),
    Half("one_key_head", 2, 1024, 1024, 32, 1, 128, causal=True),
    Half("one_block", 16, 50, 700, 16, 16, 128),
    Half("documents", 2, 1024, 1024, 32, 8, 128, segments="sorted", causal=True),
    Half("full_80", 2, 2304, 2304, 8, 8, 80),
    Half("window_96", 1, 3001, 3001, 4, 4, 96, window=(300, 20)),
    Half("short_80", 64, 257, 257, 8, 8, 80),
    Half("often", 2, 3333, 3500, 2, 2, 128),
]
NOT_LISTED = ("longer", "one_key_head", "documents", "full_80", "window_96", "often")


@pytest.mark.parametrize("case", chosen(CASES, "packed"), ids=str)
def test_interpreted_as_exact(case: Case, seed: int) -> None:
    assert choose_backward_tiles(spec_of(case), deterministic=False).first_stores
    check(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_on_a_gpu_as_exact(case: Case, seed: int) -> None:
    tiles = choose_backward_tiles(spec_of(case), deterministic=False)
    assert tiles.first_stores
    assert bool(tiles.listed) == (case in LARGE and case.name not in NOT_LISTED)
    assert tiles.puts_at_once == (case.name == "often")
    run = compiled(FLASH, case)
    for again in range(5):
        check(FLASH, case, seed + again, run)


@pytest.mark.parametrize(
    "case",
    [
        Half("long_packed", 1, 32768, 32768, 8, 8, 128, segments="sorted", causal=True),
        Half("lengths", 1, 200, 200, 2, 2, 128, query_lengths=(9,), key_lengths=(9,)),
        Half("unseen", 1, 400, 100, 2, 2, 128, causal=True, window=(10, 0)),
        Half("wide", 1, 200, 200, 2, 2, 192),
        Half("narrow", 1, 200, 200, 2, 2, 64),
        Half("long", 1, 20480, 20480, 16, 16, 128, causal=True),
        Half("odd", 1, 12345, 12345, 16, 16, 128, causal=True),
        Half("visited_often", 1, 4224, 4224, 16, 16, 128),
        Half("grouped", 1, 4096, 4096, 16, 8, 128),
        Half("full_in_pieces", 1, 2560, 2560, 8, 8, 72),
        Half("shares", 2, 8192, 8192, 32, 8, 96, causal=True),
        Half("window_in_pieces", 1, 3001, 3001, 4, 4, 112, window=(300, 20)),
    ],
    ids=str,
)
def test_others_are_filled(case: Case) -> None:
    assert not choose_backward_tiles(spec_of(case), deterministic=False).first_stores
