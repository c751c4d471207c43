"""Thread blocks of backward that go through lists of tiles of keys: each tile once, and exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pallas_kernels.hopper import backward
from pallas_kernels.hopper.backward_block import grid_of
from pallas_kernels.hopper.backward_list import schedule
from pallas_kernels.hopper.backward_tiles import choose_backward_tiles
from pallas_kernels.hopper.shares import Shares
from tests.cases import Case, chosen
from tests.hopper.calls import Bottom, Half, spec_of
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper

__all__ = ["hopper"]

CASES = [
    Half("causal", 1, 150, 270, 2, 2, 128, causal=True),
    Half("full", 2, 70, 130, 3, 3, 128),
    Half("grouped", 1, 130, 270, 4, 2, 128, causal=True, sinks=True),
    Half("pieces", 1, 67, 390, 1, 1, 128),
    Half("narrow_pieces", 1, 67, 390, 1, 1, 72),
    Half("window", 1, 270, 400, 2, 1, 128, causal=True, window=(100, 0)),
    Half("value_64", 1, 130, 260, 2, 2, 128, 64, causal=True),
    Bottom("bottom_right", 1, 65, 264, 2, 1, 128),
    Half("no_visits", 1, 70, 400, 1, 1, 128, causal=True),
    Half("bias", 2, 130, 270, 2, 2, 64, causal=True, bias="1NTS"),
    Half("bias_own", 1, 70, 400, 1, 1, 64, bias="BNTS", bias_dtype="float32"),
    Case("float16", 1, 100, 300, 2, 2, 128, dtype="float16", scale=-0.2),
]  # fmt: skip
LARGE = [
    Half("causal", 2, 700, 700, 16, 16, 128, causal=True),
    Half("full", 3, 577, 577, 16, 16, 128),
    Half("grouped", 10, 600, 600, 16, 8, 128, causal=True),
    Half("narrower", 2, 1000, 1000, 16, 16, 72),
    Half("window", 2, 1024, 1024, 12, 12, 128, causal=True, window=(255, 0)),
    Half("four_each_and_some", 14, 256, 256, 19, 19, 128, causal=True),
]


@pytest.fixture
def listing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has so many thread blocks share all tiles by lists."""

    def force(blocks: int) -> None:
        def forced(spec: Any, **options: bool) -> Any:
            tiles = choose_backward_tiles(spec, **options)
            # In many pieces claims are in lists alone.
            stores = tiles.first_stores or tiles.pieces
            return replace(tiles, shares=Shares(), listed=blocks, first_stores=stores)

        monkeypatch.setattr(backward, "choose_backward_tiles", forced)

    return force


@pytest.mark.parametrize("case", chosen(CASES, "causal narrow_pieces"), ids=str)
def test_interpreted_as_exact(case: Case, listing: Callable[[int], None], seed: int) -> None:
    listing(2)
    check(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_few_blocks_on_a_gpu_as_exact(
    case: Case, listing: Callable[[int], None], blocks: int, seed: int
) -> None:
    listing(blocks)
    check(FLASH, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_on_a_gpu_as_exact(case: Case, seed: int) -> None:
    assert choose_backward_tiles(spec_of(case), deterministic=False).listed
    check(FLASH, case, seed)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_every_tile_is_in_one_list(case: Case) -> None:
    spec = spec_of(case)
    tiles = choose_backward_tiles(spec, deterministic=False)
    grid = grid_of(spec, tiles)
    found = schedule(spec, tiles, grid)
    assert len(found) == tiles.listed == 132
    listed = np.concatenate([row[1 : 1 + row[0]] for row in found])
    count = np.prod([size for _, size in grid.axes])
    np.testing.assert_array_equal(np.sort(listed), np.arange(count))
    assert (found.shape[1] > found[:, 0] + 1).all()  # one more is read


@pytest.mark.parametrize(
    "case",
    [
        Half("few", 1, 1024, 1024, 16, 16, 128, causal=True),
        Half("lengths", 4, 1024, 1024, 16, 16, 128, key_lengths=(1, 2, 3, 4)),
        Half("packed", 4, 1024, 1024, 16, 16, 128, segments="sorted"),
        Half("narrow", 4, 1024, 1024, 16, 16, 64),
        Half("long", 4, 4096, 4096, 16, 16, 128, causal=True),
        Half("dropout", 4, 1024, 1024, 16, 16, 80, dropout=0.1),
        Half("soft_cap", 4, 1024, 1024, 16, 16, 128, soft_cap=5.0),
        Half("one_key_head", 4, 1024, 1024, 32, 1, 128),
    ],
    ids=str,
)
def test_others_have_none(case: Case) -> None:
    assert choose_backward_tiles(spec_of(case), deterministic=False).listed == 0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_deterministic_ones_have_some(head_dim: int) -> None:
    spec = spec_of(Half("", 16, 512, 512, 16, 16, head_dim, causal=True))
    assert choose_backward_tiles(spec, deterministic=True).listed == 132
