"""Which blocks the portable kernels visit, and which of them without an element mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.call.arguments import attention_call
from pallas_kernels.portable.columns import parts
from pallas_kernels.portable.ranges import key_ranges, key_sides, query_ranges, query_sides
from tests import reference
from tests.cases import INTERVALS, SEGMENTS_AND_MASKS, Case, operands, thorough


def some(cases: list[Case]) -> list[Any]:
    """Every eighth always, the others with --thorough."""
    return [
        x for i, case in enumerate(cases) for x in ([case] if i % 8 == 5 else thorough((case,)))
    ]


CASES = [
    Case("plain"),
    Case("plain_edges", queries=37, keys=53),
    *INTERVALS,
    *(case for case in SEGMENTS_AND_MASKS if case.mask is None),
]
QUERIES, KEYS = 8, 16


def call(case: Case, seed: int) -> Any:
    """The call with its arrays, which are traced when it is checked."""
    drawn, found = operands(case, seed), []

    @jax.jit
    def checked() -> Any:
        made = attention_call(*(jnp.asarray(drawn[name]) for name in "qkv"), **drawn.options)
        found.append(made)
        return made.operands

    arrays = checked()
    return replace(found[0], operands=arrays)


def seen(case: Case, seed: int) -> reference.Bools:
    """(B, T, S)"""
    return np.broadcast_to(operands(case, seed).seen, case.shape_of("BNTS"))[:, 0]


def check(table: Any, sides: Any, visits: reference.Bools, needs_none: reference.Bools) -> None:
    """A table against what is seen: (B, tiles, blocks), any of it, and all that exists of it."""
    first, clear_first, clear_stop, stop = np.moveaxis(np.asarray(table), -1, 0)[..., None]
    assert (first <= clear_first).all()
    assert (clear_first <= clear_stop).all()
    assert (clear_stop <= stop).all()
    block = np.arange(visits.shape[2])
    visited = (block >= first) & (block < stop)
    clear = (block >= clear_first) & (block < clear_stop)
    assert (visited | ~visits).all()
    assert (needs_none | ~clear).all()
    assert sides.left or (clear_first == first).all()
    assert sides.right or (clear_stop == stop).all()


def tiled(x: reference.Bools, queries: int, keys: int, *, fill: bool) -> reference.Bools:
    """(B, T, S) as (B, query tiles, key tiles, queries, keys)."""
    b, t, s = x.shape
    x = np.pad(x, ((0, 0), (0, -t % queries), (0, -s % keys)), constant_values=fill)
    return x.reshape(b, x.shape[1] // queries, queries, -1, keys).swapaxes(2, 3)


@pytest.mark.parametrize("case", some(CASES), ids=str)
def test_blocks_of_keys_hold_all_that_a_tile_of_queries_sees(case: Case, seed: int) -> None:
    made = call(case, seed)
    table = key_ranges(made.spec, made.operands, queries=QUERIES, keys=KEYS)
    visits = tiled(seen(case, seed), QUERIES, KEYS, fill=False).any(axis=(3, 4))
    # Rows past the query lengths are no matter, nor are those that do not exist; keys are.
    whole = seen(replace(case, query_lengths=None), seed)
    whole = np.pad(whole, ((0, 0), (0, 0), (0, -case.keys % KEYS)))
    needs_none = tiled(whole, QUERIES, KEYS, fill=True).all(axis=(3, 4))
    check(table, key_sides(made.spec, KEYS), visits, needs_none)


@pytest.mark.parametrize("case", some(CASES), ids=str)
def test_blocks_of_queries_hold_all_that_see_a_tile_of_keys(case: Case, seed: int) -> None:
    made = call(case, seed)
    table = query_ranges(made.spec, made.operands, queries=QUERIES, keys=KEYS)
    visits = tiled(seen(case, seed), QUERIES, KEYS, fill=False).any(axis=(3, 4)).swapaxes(1, 2)
    whole = seen(replace(case, key_lengths=None), seed)
    whole = np.pad(whole, ((0, 0), (0, -case.queries % QUERIES), (0, 0)))
    needs_none = tiled(whole, QUERIES, KEYS, fill=True).all(axis=(3, 4)).swapaxes(1, 2)
    check(table, query_sides(made.spec, QUERIES), visits, needs_none)


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("case", some(CASES[:12]), ids=str)
def test_shares_of_a_tile_are_its_blocks_once_each(case: Case, splits: int, seed: int) -> None:
    made = call(case, seed)
    sizes = {"queries": QUERIES, "keys": 4}
    whole = np.asarray(key_ranges(made.spec, made.operands, **sizes))
    shares = np.asarray(key_ranges(made.spec, made.operands, **sizes, splits=splits))
    shares = shares.reshape(*whole.shape[:2], splits, 4)
    block = np.arange(-(-case.keys // 4))[:, None]
    for low, high in ((0, 3), (1, 2)):
        once = (block >= whole[..., None, None, low]) & (block < whole[..., None, None, high])
        each = (block >= shares[..., None, :, low]) & (block < shares[..., None, :, high])
        np.testing.assert_array_equal(each.sum(axis=3), once[..., 0])


def test_a_causal_tile_masks_one_block_of_its_own_size() -> None:
    made = call(Case("causal", queries=64, keys=64, causal=True), 0)
    table = np.asarray(key_ranges(made.spec, made.operands, queries=16, keys=16))[0]
    np.testing.assert_array_equal(table, [[0, 0, i, i + 1] for i in range(4)])
    table = np.asarray(query_ranges(made.spec, made.operands, queries=16, keys=16))[0]
    np.testing.assert_array_equal(table, [[i, i + 1, 4, 4] for i in range(4)])


@pytest.mark.parametrize("size", [1, 7, 16, 17, 40, 64, 72, 96, 128, 160, 192, 255, 256, 400, 512])
def test_a_head_dim_is_one_power_of_two_or_two(size: int) -> None:
    found = parts(size)
    assert len(found) <= 2
    covered = [i for part in found for i in range(part.start, part.start + part.used)]
    assert covered == list(range(size))
    assert all(part.width & (part.width - 1) == 0 and part.width >= 16 for part in found)
    assert sum(part.width for part in found) < 2 * size + 16
