"""In whichever order thread blocks run and heads are visited, gradients are as exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import pytest

import jattn
from pallas_kernels import blocks
from pallas_kernels.hopper import backward, backward_rounds
from pallas_kernels.hopper.backward_block import grid_of
from pallas_kernels.hopper.backward_tiles import BackwardTiles, choose_backward_tiles
from pallas_kernels.hopper.shares import Shares
from tests.cases import Case, chosen
from tests.hopper.calls import Bottom, Half, spec_of
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper

__all__ = ["hopper"]

# Each with the heads side by side.
ORDERS = {
    Half("grouped", 1, 200, 200, 4, 2, 64, causal=True): 1,
    Half("in_fragments", 2, 70, 150, 4, 4, 128, causal=True): 2,
    Half("three_of_a_group", 1, 140, 270, 6, 2, 80, causal=True): 1,
    Half("two_rows", 4, 70, 130, 1, 1, 64, causal=True): 2,
    Half("lengths", 2, 150, 300, 4, 2, 64, causal=True, query_lengths=(150, 70),
         key_lengths=(0, 290)): 1,
    Half("offsets", 2, 170, 270, 4, 2, 128, causal=True, offset=(-30, 160)): 1,
    Bottom("bottom_right", 1, 130, 200, 4, 2, 64, sinks=True): 1,
    Case("float16", 1, 300, 140, 4, 2, 64, dtype="float16", causal=True, scale=-0.2): 1,
    Half("dropout", 1, 140, 150, 4, 2, 64, causal=True, dropout=0.2): 1,
    Half("soft_cap", 1, 130, 150, 4, 2, 64, causal=True, soft_cap=5.0): 1,
}  # fmt: skip


@pytest.fixture
def ordering(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has so many heads side by side, whatever would be chosen, and no tile shared."""

    def force(together: int) -> None:
        def forced(spec: Any, **options: bool) -> Any:
            tiles = choose_backward_tiles(spec, **options)
            tiles = replace(tiles, shares=Shares(), adds=False)
            return replace(tiles, heads_together=together, heads_inner=spec.group > 1)

        monkeypatch.setattr(backward, "choose_backward_tiles", forced)

    return force


LATE = [
    Half("grouped", 1, 130, 130, 2, 1, 128, causal=True),
    Half("unseen", 1, 70, 260, 2, 1, 128, causal=True),
    Half("three_of_a_group", 2, 200, 200, 6, 2, 128, causal=True),
    Half("value_64", 1, 130, 200, 4, 2, 128, 64, causal=True, sinks=True),
]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has short calls visit as long ones do."""

    def forced(spec: Any, **options: bool) -> Any:
        tiles = choose_backward_tiles(spec, **options)
        tiles = replace(tiles, shares=Shares(), adds=False, listed=0, pieces=False)
        tiles = replace(tiles, first_stores=False, late=True, shared_ds=True)
        together = min(tiles.heads_together, spec.kv_heads)
        return replace(tiles, heads_together=together, heads_inner=True, heads_turned=True)

    monkeypatch.setattr(backward, "choose_backward_tiles", forced)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("case", chosen(LATE, "grouped"), ids=str)
def test_late_and_turned_interpreted_as_exact(case: Case, seed: int) -> None:
    check(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper", "late")
@pytest.mark.parametrize(
    "case", [*LATE, Half("long", 1, 5000, 5000, 8, 2, 128, causal=True)], ids=str
)
def test_late_and_turned_on_a_gpu_as_exact(case: Case, seed: int) -> None:
    check(FLASH, case, seed)


@pytest.mark.parametrize("case", chosen(list(ORDERS), "grouped two_rows"), ids=str)
def test_interpreted_as_exact(case: Case, ordering: Callable[[int], None], seed: int) -> None:
    ordering(ORDERS[case])
    check(INTERPRETED, case, seed)


@pytest.mark.thorough
def test_deterministic_as_exact(ordering: Callable[[int], None], seed: int) -> None:
    ordering(1)
    with jattn.deterministic_gradients():
        check(INTERPRETED, Half("", 1, 140, 150, 4, 2, 64, causal=True), seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", ORDERS, ids=str)
def test_on_a_gpu_as_exact(
    case: Case, ordering: Callable[[int], None], seed: int, *, deterministic: bool
) -> None:
    ordering(ORDERS[case])
    with jattn.deterministic_gradients(deterministic):
        check(FLASH, case, seed)


@pytest.mark.parametrize(
    ("case", "together", "inner"),
    [
        (Half("one_key_head", 2, 4096, 4096, 32, 1, 128, causal=True), 4, True),
        (Half("grouped", 2, 8192, 8192, 32, 8, 128, causal=True), 2, True),
        (Half("grouped_long", 1, 16384, 16384, 32, 8, 128, causal=True), 2, True),
        (Half("of_two", 2, 8192, 8192, 16, 8, 128, causal=True), 0, True),
        (Half("of_three", 2, 8192, 8192, 24, 8, 128, causal=True), 2, False),
        (Half("long", 1, 16384, 16384, 16, 16, 128, causal=True), 2, False),
        (Half("odd", 1, 12345, 12345, 16, 16, 128, causal=True), 4, False),
        (Half("middle", 4, 4096, 4096, 16, 16, 128, causal=True), 8, False),
        (Half("short", 16, 1024, 1024, 16, 16, 128, causal=True), 0, False),
        (Half("full", 2, 8192, 8192, 32, 8, 128), 0, False),
        (Half("narrow_one_key_head", 2, 4096, 4096, 32, 1, 64, causal=True), 4, True),
        (Half("window", 1, 16384, 16384, 32, 8, 128, causal=True, window=(4095, 0)), 0, False),
        (Half("window_alone", 1, 16384, 16384, 16, 16, 128, window=(4095, 0)), 4, False),
        (Half("longer_window", 1, 32768, 32768, 16, 16, 128, window=(8191, 0)), 2, False),
        (Half("window_that_fits", 1, 16384, 16384, 16, 16, 128, window=(1023, 0)), 0, False),
        (Half("short_window", 1, 16384, 16384, 32, 8, 128, window=(127, 0)), 0, False),
        (Half("packed", 1, 16384, 16384, 32, 8, 128, segments="sorted", causal=True), 0, True),
        (Half("narrow", 1, 16384, 16384, 32, 8, 64, segments="sorted", causal=True), 0, False),
        (Half("alone", 1, 16384, 16384, 16, 16, 128, segments="sorted", causal=True), 0, False),
        (Half("wide", 2, 8192, 8192, 8, 4, 256, causal=True), 0, False),
        (Half("soft_cap", 2, 8192, 8192, 32, 8, 128, causal=True, soft_cap=5.0), 0, False),
        (Half("text", 2, 8192, 77, 8, 4, 128, causal=True), 0, False),
    ],
    ids=str,
)
def test_what_is_chosen(case: Case, together: int, inner: bool) -> None:
    spec = spec_of(case)
    tiles = choose_backward_tiles(spec, deterministic=False)
    assert (tiles.heads_together, tiles.heads_inner) == (together, inner)
    added_often = case.name in ("grouped_long", "of_two")
    assert (tiles.late, tiles.heads_turned) == (added_often, added_often)
    assert tiles.tiles_first == (case.name in ("full", "window"))
    sizes = dict(grid_of(spec, tiles).axes)
    count = -(-spec.keys // tiles.keys) * spec.batch * spec.kv_heads * tiles.shares.count
    assert sizes["batch"] * sizes["tile"] * sizes["head"] == count


@pytest.mark.parametrize(("heads", "turned"), [(1, False), (4, False), (4, True), (3, True)])
def test_every_visit_of_every_head_is_made_once(heads: int, *, turned: bool) -> None:
    from pallas_kernels.hopper.backward_block import Block
    from pallas_kernels.hopper.visits import Visits

    spec = spec_of(Half("", 1, 640, 640, heads, 1, 64, causal=True))
    tiles = replace(choose_backward_tiles(spec, deterministic=False), heads_inner=heads > 1)
    block: Any = object.__new__(Block)
    block.tiles, block.heads = replace(tiles, heads_turned=turned), heads
    block.visits, block.tile = Visits(2, 5, 2, 5), jnp.int32(2)
    found = [tuple(map(int, block.visit(jnp.int32(n)))) for n in range(5 * heads)]
    assert sorted(found) == [(h, i) for h in range(heads) for i in range(5)]
    if heads > 1:  # those that need a mask, the first two blocks, come last
        assert [i for _, i in found] == [i for i in (4, 3, 2, 1, 0) for _ in range(heads)]
        assert found[0][0] == (2 if turned else 0)


def test_as_many_heads_are_side_by_side_as_end_evenly() -> None:
    def chosen_of(batch: int, length: int, heads: int, kv_heads: int) -> tuple[int, int]:
        spec = spec_of(Half("", batch, length, length, heads, kv_heads, 128, causal=True))
        tiles = choose_backward_tiles(spec, deterministic=False)
        return tiles.shares.heads, tiles.heads_together

    assert chosen_of(1, 16384, 32, 8) == (2, 2)
    assert chosen_of(1, 12345, 28, 4) == (7, 2)
    # Two heads' 158 thread blocks are little more than one round, four heads' two and a half.
    assert chosen_of(1, 10000, 28, 4) == (7, 4)
    assert chosen_of(1, 10000, 16, 4) == (4, 4)
    # The eight heads of a row have 64 thread blocks, half a round.
    assert chosen_of(4, 1024, 32, 8) == (1, 16)
    assert chosen_of(4, 2048, 12, 4) == (1, 8)
    assert chosen_of(16, 1024, 16, 16) == (1, 0)


def test_a_launch_ends_as_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three multiprocessors, tiles of 8, 6, 4 and 2 visits, each with two more to start and end."""
    monkeypatch.setattr(backward_rounds, "MULTIPROCESSORS", 3)
    for batch, followed, end in (
        (1, 100, 10),  # 10 | 8 | 6 + 4
        (2, 100, 20),  # 10 + 8 | 8 + 10 | 6 + 4 + 6 + 4
        (2, 4, 10 + 28 / 3),  # of the second row the mean
    ):
        monkeypatch.setattr(backward_rounds, "MOST_FOLLOWED", followed)
        backward_rounds.end_of.cache_clear()
        spec = spec_of(Half("", batch, 512, 512, 1, 1, 128, causal=True))
        tiles = BackwardTiles(64)
        assert backward_rounds.last_end(spec, tiles, 1) == pytest.approx(end)
    backward_rounds.end_of.cache_clear()


def test_what_a_call_visits_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    worked_out = Counter[int]()
    query_blocks = blocks.query_blocks

    def counted(intervals: Any, start: int, *rest: int) -> Any:
        worked_out[start] += 1
        return query_blocks(intervals, start, *rest)

    monkeypatch.setattr(blocks, "query_blocks", counted)
    spec = spec_of(Half("", 3, 4999, 4999, 12, 4, 128, causal=True))
    for deterministic in (False, False, True):
        choose_backward_tiles(spec, deterministic=deterministic)
    assert len(worked_out) > 1
    assert set(worked_out.values()) == {1}
