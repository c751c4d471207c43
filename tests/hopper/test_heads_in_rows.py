"""Many heads that share keys, and few queries: heads are the rows of a tile, keys are read once."""

from __future__ import annotations

import pytest

from pallas_kernels.hopper.plan import make_plan
from tests.cases import Case, chosen
from tests.hopper.calls import Half, spec_of
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper

__all__ = ["hopper"]

# Each with the heads of a tile, and how many tiles share a key head's heads.
CASES = {
    Half("one_query", 2, 1, 300, 32, 1, 64, key_lengths=(300, 77)): (32, 1),
    Half("two_key_heads", 1, 1, 131, 32, 2, 128): (16, 1),
    Half("not_a_power_of_two", 1, 1, 200, 24, 1, 64): (24, 1),
    Half("more_than_rows", 1, 1, 70, 128, 1, 64): (64, 2),
    Half("offsets", 2, 2, 300, 32, 1, 64, causal=True, offset=(0, 200)): (32, 1),
    Half("sixteen_heads", 1, 2, 70, 16, 1, 64, causal=True, offset=(40,)): (16, 1),
    Half("window", 1, 4, 260, 16, 1, 72, causal=True, window=(100, 0),
         alignment="bottom_right"): (16, 1),
    Half("lengths", 2, 3, 140, 16, 1, 40, 96, query_lengths=(1, 3), key_lengths=(130, 0)): (16, 1),
    Half("sinks_soft_cap", 1, 2, 150, 32, 1, 64, sinks=True, soft_cap=5.0): (32, 1),
    Half("wide", 1, 1, 150, 40, 1, 256, 192): (40, 1),
    Case("float16", 1, 2, 100, 48, 2, 64, dtype="float16", scale=-0.2): (8, 3),
}  # fmt: skip

MANY_ROWS = Half("many_rows", 70, 1, 5000, 32, 1, 64, key_lengths=tuple(range(1, 4971, 71)))


@pytest.mark.parametrize("case", chosen(list(CASES), "sixteen_heads"), ids=str)
def test_interpreted_as_exact(case: Case, seed: int) -> None:
    check(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", [*CASES, MANY_ROWS], ids=str)
def test_on_a_gpu_as_exact(case: Case, seed: int) -> None:
    check(FLASH, case, seed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_keys_are_read_once_by_as_many_heads_as_fit(case: Case) -> None:
    plan, (pack, packs) = make_plan(spec_of(case)), CASES[case]
    assert plan.heads_in_rows == (pack > 8)
    assert (plan.pack, plan.head_packs) == (pack, packs * case.kv_heads)
    assert plan.query_tiles == 1


def test_each_batch_row_has_two_shares_of_its_keys_where_64_rows_share_the_chip() -> None:
    plan = make_plan(spec_of(Half("", 64, 1, 8192, 32, 1, 128)))
    assert (plan.pack, plan.works, plan.splits) == (32, 128, 2)


@pytest.mark.parametrize(
    "case",
    [
        Half("few_heads", 1, 1, 300, 32, 8, 64),
        Half("many_queries", 1, 9, 300, 32, 1, 64),
        Half("segments", 1, 1, 300, 32, 1, 64, segments="sorted"),
        Half("dropout", 1, 1, 300, 32, 1, 64, dropout=0.1),
        Half("bias", 1, 1, 300, 32, 1, 64, bias="1N1S"),
    ],
    ids=str,
)
def test_others_keep_a_head_s_queries_together(case: Case) -> None:
    assert not make_plan(spec_of(case)).heads_in_rows
