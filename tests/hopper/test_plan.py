"""The plan of a launch: every tile is computed once, and the work is shared evenly."""

from __future__ import annotations

import numpy as np
import pytest

from pallas_kernels.hopper.plan import make_plan
from tests.hopper.calls import Half, spec_of


@pytest.mark.parametrize("length", [1024, 1030, 4096])
def test_each_tile_is_in_one_list(length: int) -> None:
    case = Half("", 16384 // length, length, length, 16, 16, 128, causal=True)
    plan = make_plan(spec_of(case))
    lists = plan.schedule()
    found = np.concatenate([row[1 : 1 + row[0]] for row in lists])
    np.testing.assert_array_equal(np.sort(found), np.arange(plan.works))


def test_causal_lists_are_within_three_per_cent_of_even() -> None:
    plan = make_plan(spec_of(Half("", 4, 4096, 4096, 16, 16, 128, causal=True)))
    together = plan.heads_together
    loads = [
        sum(
            plan.query_tiles - w % (plan.query_tiles * together) // together
            for w in row[1 : 1 + row[0]]
        )
        for row in plan.schedule()
    ]
    assert max(loads) <= 1.03 * np.mean(loads)


def test_few_queries_split_the_keys_and_share_a_tile() -> None:
    plan = make_plan(spec_of(Half("", 1, 1, 8192, 32, 8, 128)))
    assert plan.pack == 4
    assert plan.works == 8 * plan.splits
    assert 100 <= plan.works <= 132
