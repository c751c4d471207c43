"""A dense mask in the Hopper forward kernel: which blocks it visits, and how exact it is."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jattn.call.arguments import attention_call
from pallas_kernels.hopper import dense_mask
from pallas_kernels.hopper.plan import make_plan
from tests.cases import Case, first, operands, thorough
from tests.hopper.calls import Half
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper
from tests.reference import Bools

__all__ = ["hopper"]

FORMS = [f"{b}{n}{t}{s}" for b in "B1" for n in "N1" for t in "T1" for s in "S1"]
ORDINARY = ("1NTS", "B11S", "BN1S")
LENGTHS: dict[str, Any] = {"causal": True, "query_lengths": (300, 170), "key_lengths": (290, 150)}
SEGMENTS: dict[str, Any] = {"segments": "sorted"}
# Each form by itself, and each way in which the mask's lists meet ranges of blocks.
_ALWAYS = [*((form, {}) for form in ORDINARY), ("BN1S", LENGTHS), ("B11S", SEGMENTS)]
_EVERY = [(form, options) for form in FORMS for options in ({}, LENGTHS, SEGMENTS)]
LISTED = [*_ALWAYS, *thorough(*(each for each in _EVERY if each not in _ALWAYS))]


def planted(case: Case, seed: int) -> Bools:
    """The case's mask, with rows and blocks of which all is hidden, and blocks of which none is."""
    mask: Bools = operands(case, seed)["mask"]
    if mask.shape[2] > 1 and mask.shape[3] > 1:
        mask[..., 130:200, :] = False
        mask[..., :128, :128] = False
        mask[..., 128:256] = True
        mask[:, -1:, 256:, :] = np.tri(mask.shape[2] - 256, mask.shape[3], dtype=bool)
    return mask


def lists_of(case: Case, seed: int) -> tuple[Any, Any, Bools]:
    """The plan, the lists (B, N, tiles, 2 + blocks), and what all masks leave (B, N, T, S)."""
    planted(case, seed)
    drawn = operands(case, seed)
    arrays = (jnp.asarray(drawn[name]) for name in "qkv")
    call = attention_call(*arrays, **drawn.options)
    plan = make_plan(call.spec)
    lists = np.asarray(dense_mask.mask_arrays(plan, call.operands)["mask_lists"])
    full = (case.batch, case.heads)
    return (
        plan,
        np.broadcast_to(lists, (*full, *lists.shape[2:])),
        np.broadcast_to(drawn.seen, (*full, case.queries, case.keys)),
    )


@pytest.mark.parametrize(("form", "options"), LISTED, ids=str)
def test_a_tile_visits_the_blocks_that_it_sees_and_no_others(
    form: str, options: dict[str, Any], seed: int
) -> None:
    case = Half(f"lists_{form}_{sorted(options)}", 2, 300, 520, 2, 1, 64, mask=form, **options)
    case = case if form[3] == "1" or form[2] == "T" else Half(case.name, 2, 300, 520, 2, 1, 64,
        mask=form, mask_density=0.02, **options)  # fmt: skip
    plan, lists, seen = lists_of(case, seed)
    rows, size = plan.queries, plan.tiles.keys
    for b, n, tile in np.ndindex(lists.shape[:3]):
        own = seen[b, n, tile * rows : (tile + 1) * rows]
        total, mixed, *order = lists[b, n, tile]
        blocks = [own[:, i : i + size] for i in range(0, case.keys, size)]
        some = {i for i, block in enumerate(blocks) if block.any()}
        clear = {i for i, block in enumerate(blocks) if block.all() and block.shape[1] == size}
        found, tail = order[:total], order[total:]
        assert some <= set(found), (b, n, tile)
        if not options:  # ranges of segments and of lengths may take in more
            assert set(found) == some
            assert set(found[mixed:]) == clear
        assert set(found[mixed:]) <= clear
        assert not any(tail)
        for part in (found[:mixed], found[mixed:]):
            assert list(part) == sorted(part, reverse=True)


def test_many_blocks_are_put_in_order_as_few_are(monkeypatch: Any, seed: int) -> None:
    case = Half("lists_sorted", 1, 300, 520, 2, 1, 64, mask="1NTS", mask_density=0.02)
    few = lists_of(case, seed)[1]
    monkeypatch.setattr(dense_mask, "MOST_COMPARED", 1)
    np.testing.assert_array_equal(lists_of(case, seed)[1], few)


SMALL = [
    Half("mask_pairs", 1, 270, 300, 2, 1, 64, mask="1NTS"),
    Half("mask_full", 2, 260, 270, 2, 1, 64, mask="BNTS", **LENGTHS),
    Half("mask_keys", 2, 140, 300, 2, 2, 64, mask="B11S", dropout=0.2),
    Half("mask_queries", 2, 140, 300, 2, 1, 64, mask="B1T1", segments="sorted"),
    Half("mask_wide", 1, 270, 200, 2, 1, 192, 128, mask="11TS", sinks=True, soft_cap=5.0),
    Half("mask_head", 1, 140, 130, 4, 2, 128, mask="1N11", mask_density=0.5),
]  # fmt: skip
LARGE = [
    *(Half(f"mask_{form}", 2, 700, 1000, 4, 2, 128, mask=form) for form in FORMS),
    *(Half(f"mask_{h}", 2, 1030, 1030, 4, 2, h, mask="B1TS") for h in (40, 64, 96, 256)),
    Half("mask_causal_lengths", 2, 700, 900, 4, 2, 128, mask="BNTS", **LENGTHS),
    Half("mask_window", 1, 1000, 1000, 2, 2, 64, mask="11TS", window=(300, 70)),
    Half("mask_packed", 2, 1000, 1000, 2, 2, 128, mask="1NTS", segments="sorted", causal=True),
    Half("mask_offsets", 2, 600, 800, 2, 2, 128, mask="B1TS", causal=True, offset=(0, 200)),
    Half("mask_dropout", 2, 700, 700, 4, 2, 128, mask="B1TS", dropout=0.3),
]  # fmt: skip


@pytest.mark.parametrize("case", first(1, SMALL), ids=str)
def test_interpreted_as_exact_as_the_formula(case: Case, seed: int) -> None:
    planted(case, seed)
    check(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", [*SMALL, *LARGE], ids=str)
def test_as_exact_as_the_formula(case: Case, seed: int) -> None:
    planted(case, seed)
    check(FLASH, case, seed)
