"""Few queries whose keys thread blocks share evenly: each block of keys is read once."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import jax.numpy as jnp
import pytest

from pallas_kernels.hopper import forward
from pallas_kernels.hopper.plan import Plan, _with_even_shares, make_plan
from pallas_kernels.hopper.tiles import Tiles
from tests.cases import Case
from tests.hopper.calls import Bottom, Half, spec_of
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper

__all__ = ["hopper"]

# 32 heads of 8, so many keys, in so many batch rows: whether thread blocks have equal shares. Of
# 384 a share would be 24 whole rows; short ones of tiles that are not split take longer.
BATCHES = [
    *((32768, batch, True) for batch in (6, 9, 12, 17, 20)),
    *((32768, batch, False) for batch in (1, 4, 16, 384)),
    (4095, 17, True),
    (4096, 9, False),
    (8192, 9, True),
    (2048, 24, False),
]
CASES = [
    Half("one_query", 3, 1, 320, 4, 2, 128),
    Half("odd", 5, 1, 321, 2, 1, 64),
    Bottom("three_queries", 2, 3, 300, 8, 2, 128),
    Half("heads_in_rows", 4, 1, 400, 16, 1, 128),
    Bottom("window", 3, 1, 450, 2, 2, 128, window=(200, 0)),
]
LARGE = [
    Half("nine", 9, 1, 2104, 16, 16, 128),
    Half("narrow", 9, 1, 2104, 16, 16, 64),
    Bottom("four_queries", 17, 4, 2103, 32, 8, 128),
]


@pytest.mark.parametrize(("keys", "batch", "even"), BATCHES)
def test_shares_are_even_where_tiles_do_not_fill_the_chip(
    keys: int, batch: int, *, even: bool
) -> None:
    plan = make_plan(spec_of(Half("", batch, 1, keys, 32, 8, 128)))
    assert bool(plan.share) == even
    if even:
        _check_shares(plan)


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
@pytest.mark.parametrize("groups", [2, 3, 4, 7])
def test_each_block_of_keys_is_read_once(case: Case, groups: int) -> None:
    _check_shares(_even(case, groups))


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_as_exact(case: Case, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "make_plan", lambda *_, **__: _even(case, 3))
    check(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_on_a_gpu_as_exact(case: Case, seed: int) -> None:
    assert make_plan(spec_of(case)).share
    check(FLASH, case, seed)


def _even(case: Case, groups: int) -> Plan:
    """The plan of so many groups of thread blocks, of a head each."""
    plan = make_plan(spec_of(case), multiprocessors=1)
    tiles = Tiles(1, 64, 2, query_slots=2)
    plan = replace(plan, splits=1, share=0, tiles=tiles)
    return _with_even_shares(plan, tiles, groups * plan.head_packs)


def _check_shares(plan: Plan) -> None:
    """Each block of keys of a tile is read once; parts that there are not are not joined."""
    visits, packs = plan.visits_of_row, plan.head_packs
    read: dict[int, list[int]] = {}
    listed = set()
    for row in plan.schedule():
        parts = row[1 : 1 + row[0]]
        assert len(parts) > 0
        total = 0
        for part in parts:
            tile, split = divmod(int(part), plan.splits)
            listed.add((tile, split))
            ends = plan.part(jnp.int32(tile // packs), jnp.int32(split))
            first, stop = (int(x) for x in ends)
            assert first < stop
            read.setdefault(tile, []).extend(range(first, stop))
            total += stop - first
        assert total <= plan.share
    assert sorted(read) == list(range(plan.spec.batch * packs))
    assert all(sorted(blocks) == list(range(visits)) for blocks in read.values())
    for batch, split in product(range(plan.spec.batch), range(plan.splits)):
        start, end = plan.part(jnp.int32(batch), jnp.int32(split))
        assert ((batch * packs, split) in listed) == bool(start < end)
