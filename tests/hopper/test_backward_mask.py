"""A dense mask in the Hopper backward kernel: which blocks of queries a tile of keys visits."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jattn.call.arguments import attention_call
from pallas_kernels.hopper import backward_mask
from pallas_kernels.hopper.backward_tiles import choose_backward_tiles
from pallas_kernels.hopper.visits import visits
from tests.cases import Case, first, operands
from tests.hopper.calls import Half
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper
from tests.hopper.test_dense_mask import LISTED, planted

__all__ = ["hopper"]


def lists_of(case: Case, seed: int) -> tuple[Any, Any, Any]:
    """The tiles, the lists (B, K, tiles, 2 + visits), and what all masks leave (B, N, T, S)."""
    planted(case, seed)
    drawn = operands(case, seed)
    call = attention_call(*(jnp.asarray(drawn[name]) for name in "qkv"), **drawn.options)
    tiles = choose_backward_tiles(call.spec, deterministic=False)
    ranges = visits(
        call.spec, call.operands, queries=tiles.queries, keys=tiles.keys, every=tiles.once
    )
    blocks = -(-case.queries // tiles.queries)
    made = backward_mask.arrays(call.spec, call.operands, tiles, ranges, blocks=blocks)
    lists = np.asarray(made["key_lists"])
    assert ("turned_words" in made) == (case.mask is not None and case.mask[3] == "S")
    full = (case.batch, case.heads, case.queries, case.keys)
    of_rows = (case.batch, case.kv_heads, *lists.shape[2:])
    return tiles, np.broadcast_to(lists, of_rows), np.broadcast_to(drawn.seen, full)


@pytest.mark.parametrize(("form", "options"), LISTED, ids=str)
def test_a_tile_of_keys_visits_the_blocks_that_see_it_and_no_others(
    form: str, options: dict[str, Any], seed: int
) -> None:
    case = Half(f"turned_{form}_{sorted(options)}", 2, 300, 520, 4, 2, 128, mask=form,
        mask_density=0.7 if form[2:] == "TS" else 0.02, **options)  # fmt: skip
    tiles, lists, seen = lists_of(case, seed)
    blocks = -(-case.queries // tiles.queries)
    for b, k, tile in np.ndindex(lists.shape[:3]):
        total, mixed, *order = lists[b, k, tile]
        keys = slice(tile * tiles.keys, (tile + 1) * tiles.keys)
        own = {
            h * blocks + i: seen[b, 2 * k + h, i * tiles.queries : (i + 1) * tiles.queries, keys]
            for h in range(2)
            for i in range(blocks)
        }
        some = {visit for visit, block in own.items() if block.any()}
        found = order[:total]
        assert some <= set(found), (b, k, tile)
        if not options:  # ranges of segments and of lengths may take in more
            assert set(found) == some
        for visit in found[mixed:]:  # a query that sees nothing needs no mask
            block = own[visit]
            assert block[block.any(axis=1)].all()
        assert not any(order[total:])
        for part in (found[:mixed], found[mixed:]):
            assert list(part) == sorted(part)


CASES = [
    Half("mask_one_tile", 1, 140, 90, 2, 1, 128, mask="1NTS"),
    Half("mask_fragments", 1, 140, 150, 2, 1, 128, mask="1NTS", causal=True),
    Half("mask_cap", 2, 140, 150, 2, 1, 64, mask="BNTS", soft_cap=3.0, key_lengths=(150, 9)),
    Half("mask_dropped", 1, 140, 150, 2, 2, 128, mask="11TS", dropout=0.3),
    Half("mask_key_group", 2, 140, 150, 4, 2, 64, mask="BN1S"),
    Half("mask_query_group", 2, 140, 150, 4, 2, 64, mask="BNT1"),
]  # fmt: skip


@pytest.mark.parametrize("case", first(0, CASES), ids=str)
def test_interpreted_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check(FLASH, case, seed)
