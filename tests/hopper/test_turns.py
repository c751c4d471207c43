"""Tiles of keys add to dQ in the order in which they start, so that it is always the same."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.call.spec import Operands
from pallas_kernels.hopper import backward_order, backward_tiles
from pallas_kernels.hopper.backward_block import grid_of, share_at
from pallas_kernels.hopper.backward_order import documents_side_by_side
from pallas_kernels.hopper.backward_tiles import choose_backward_tiles
from pallas_kernels.hopper.visits import in_order, tiles_that_visit, visits
from tests.cases import Case, chosen, operands
from tests.hopper.calls import Bottom, Half, spec_of
from tests.hopper.exact import FLASH, INTERPRETED, check, check_repeats, compiled, hopper

__all__ = ["hopper"]

CASES = [
    Half("causal", 1, 150, 270, 2, 2, 128, causal=True),
    Half("full", 1, 130, 390, 2, 2, 96),
    Half("pieces", 1, 67, 390, 1, 1, 128),
    Half("grouped", 1, 130, 270, 4, 2, 80, sinks=True),
    Half("shares", 1, 130, 200, 4, 2, 128, causal=True),
    Half("one_key_head", 2, 270, 270, 3, 1, 96, causal=True),
    Half("window_of_heads", 1, 500, 400, 4, 2, 128, causal=True, window=(100, 0)),
    Half("shares_64", 1, 300, 270, 4, 2, 64, causal=True),
    Half("window", 1, 450, 400, 2, 2, 128, causal=True, window=(100, 0)),
    Half("both_ends", 1, 500, 400, 2, 2, 64, window=(100, 30)),
    Bottom("bottom_right", 1, 65, 264, 2, 2, 128),
    Half("full_64", 1, 330, 390, 2, 2, 64),
    Half("causal_64", 1, 300, 270, 2, 2, 64, causal=True),
    Half("documents", 1, 200, 200, 2, 2, 64, causal=True, segments="sorted"),
    Half("documents_128", 2, 390, 390, 2, 2, 128, causal=True, segments="sorted"),
    Half("documents_full", 2, 330, 390, 2, 2, 96, segments="sorted"),
    Half("documents_64", 2, 390, 390, 2, 2, 64, causal=True, segments="sorted"),
    Half("unsorted", 2, 200, 390, 2, 2, 128, causal=True, segments="unsorted"),
]
LARGE = [
    Half("causal", 4, 4096, 4096, 16, 16, 128, causal=True),
    Half("full", 2, 2049, 2049, 8, 8, 128),
    Half("grouped", 1, 3000, 3000, 8, 2, 128),
    Half("one_key_head", 1, 2048, 2048, 16, 1, 128),
    Half("window", 1, 4099, 4099, 8, 8, 128, causal=True, window=(1535, 0)),
    Half("causal_96", 2, 3000, 3000, 8, 8, 96, causal=True),
    Half("full_80", 2, 2001, 1999, 8, 2, 80),
    Half("causal_64", 2, 4096, 4096, 8, 8, 64, causal=True),
    Half("full_64", 2, 2047, 2047, 8, 8, 64),
    Half("shares", 2, 3000, 3000, 32, 8, 128, causal=True),
    Half("of_seven", 1, 4097, 4097, 14, 2, 128, causal=True),
    Half("one_key_head_causal", 2, 3001, 3001, 16, 1, 128, causal=True),
    Half("window_of_heads", 2, 4099, 4099, 12, 4, 128, causal=True, window=(2047, 0)),
    Half("shares_64", 2, 3001, 3001, 8, 2, 64, causal=True),
    Half("documents", 2, 3000, 3000, 8, 8, 128, causal=True, segments="sorted"),
    Half("documents_64", 1, 4001, 4001, 8, 8, 64, causal=True, segments="sorted"),
    Half("documents_full", 2, 2048, 2048, 8, 8, 96, segments="sorted"),
]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has short calls take turns, head by head."""
    monkeypatch.setattr(backward_tiles, "LEAST_IN_TURNS", (0, 0))
    monkeypatch.setattr(backward_tiles, "LEAST_OF_SHARES", 0)
    monkeypatch.setattr(backward_order, "SIDE_BY_SIDE", 1)
    monkeypatch.setattr(backward_order, "SHARES_SIDE_BY_SIDE", 1)
    monkeypatch.setattr(backward_order, "PLACES", 1)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("case", chosen(CASES, "shares both_ends full documents"), ids=str)
def test_interpreted_as_exact(case: Case, seed: int) -> None:
    with jattn.deterministic_gradients():
        assert choose_backward_tiles(spec_of(case), deterministic=True).in_turns
        check(INTERPRETED, case, seed)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_turns_come_in_the_order_of_launch(case: Case, seed: int) -> None:
    """Before each tile of a head those are launched whose turns at a block are before its own.

    And of shares of a tile those whose dK and dV are added before.
    """
    spec = spec_of(case)
    tiles = choose_backward_tiles(spec, deterministic=True)
    sizes = dict(grid_of(spec, tiles).axes)
    at = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
    place = {name: jnp.asarray(x, jnp.int32) for name, x in zip(sizes, at, strict=True)}
    options: Any = {"queries": tiles.queries, "keys": tiles.keys}
    none, refs = jnp.zeros(()), None
    given = Operands(none, none, none)
    if spec.has_segments:
        drawn = operands(case, seed)
        ids = {name: jnp.asarray(drawn[name]) for name in ("query_segments", "key_segments")}
        given = given._replace(**ids)
    found: Any = visits(spec, given, **options)
    ends: Any = tiles_that_visit(spec, **options)[:, None]
    if spec.has_segments:
        found, ends = in_order(found, ends.shape[-1])
        refs = SimpleNamespace(heads_together=jnp.array([2, spec.heads], jnp.int32))
    launched = np.stack([np.asarray(x) for x in share_at(spec, tiles, place, refs)], axis=1)
    shape = (spec.batch, *found.shape[1:])
    found = np.broadcast_to(found, shape)
    first, last = np.broadcast_to(ends, (2, spec.batch, ends.shape[-1]))
    before = np.zeros((spec.batch, spec.kv_heads, tiles.shares.count, first.shape[1]), np.int32)
    shares = np.zeros((spec.batch, shape[1], spec.kv_heads), np.int32)
    for batch, tile, head, part in launched:
        if tiles.adds:
            assert shares[batch, tile, head] == part
            shares[batch, tile, head] += 1
        own = shape[1] - 1 - tile if tiles.upward else tile
        start, count = found[batch, own, :2]
        blocks = slice(start, start + count)
        turn = last[batch, blocks] - own if tiles.upward else own - first[batch, blocks]
        np.testing.assert_array_equal(before[batch, head, part, blocks], turn)
        before[batch, head, part, blocks] += 1
    assert np.all(before == (last - first + 1)[:, None, None])


def test_fewer_heads_of_longer_documents_are_side_by_side() -> None:
    spec = spec_of(Half("packed", 2, 8192, 8192, 16, 16, 128, causal=True, segments="sorted"))
    tiles = choose_backward_tiles(spec, deterministic=True)
    ids = jnp.arange(8192)[None] // jnp.array([[8192], [1024]])
    given = Operands(ids, ids, ids, query_segments=ids, key_segments=ids)
    found = visits(spec, given, queries=tiles.queries, keys=tiles.keys)
    assert documents_side_by_side(spec, tiles, found).tolist() == [4, 16]


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_two_hundred_gradients_are_as_exact_and_bitwise_equal(case: Case, seed: int) -> None:
    assert choose_backward_tiles(spec_of(case), deterministic=True).in_turns
    run = compiled(FLASH, case)
    with jattn.deterministic_gradients():
        check(FLASH, case, seed, run)
        check_repeats(partial(run, operands(case, seed)), 200)


@pytest.mark.parametrize(
    "case",
    [
        Half("short", 16, 512, 512, 16, 16, 128, causal=True),
        Half("grouped_short", 4, 2048, 2048, 32, 8, 128, causal=True),
        Half("grouped_window", 1, 8192, 8192, 8, 2, 128, causal=True, window=(1023, 0)),
        Half("grouped_packed", 1, 8192, 8192, 8, 2, 128, segments="sorted", causal=True),
        Half("packed_in_a_window", 1, 8192, 8192, 8, 8, 128, segments="sorted", window=(4999, 0)),
        Half("lengths", 1, 8192, 8192, 8, 8, 128, query_lengths=(9,), key_lengths=(9,)),
        Half("unseen", 1, 8192, 4096, 8, 8, 128, causal=True, window=(2048, 0)),
        Half("wide", 1, 8192, 8192, 8, 8, 192),
        Half("dropout", 1, 8192, 8192, 8, 8, 128, dropout=0.1),
        Half("soft_cap", 1, 8192, 8192, 8, 8, 128, soft_cap=5.0),
    ],
    ids=str,
)
def test_others_have_two_kernels(case: Case) -> None:
    tiles = choose_backward_tiles(spec_of(case), deterministic=True)
    assert tiles.apart
    assert not tiles.in_turns
