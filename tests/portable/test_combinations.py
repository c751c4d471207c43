"""A bias beside a dense mask and dropout in one call: each form of the one beside one of the other.

Of every second call heads are grouped and have a sink and a soft cap; head dims are of all sizes.
"""

from __future__ import annotations

from itertools import product

import pytest

from tests.cases import Case, chosen
from tests.portable.exact import BOTH, check

FORMS = ["".join(axes) for axes in product("B1", "N1", "T1", "S1")]
HEAD_DIMS = (8, 24, 40, 64, 72, 128)


def combination(number: int) -> Case:
    """The call of a bias's form by number, beside the mask's form that is as far on, and more."""
    bias, mask = FORMS[number], FORMS[(5 * number + 3) % len(FORMS)]
    odd = number % 2 == 1
    return Case(
        f"{bias}_{mask}",
        queries=19,
        keys=37,
        heads=4,
        kv_heads=2 if odd else 4,
        head_dim=HEAD_DIMS[number % len(HEAD_DIMS)],
        dtype=("float32", "bfloat16", "float16")[number % 3],
        bias=bias,
        bias_dtype="float32" if number % 4 == 2 else None,
        mask=mask,
        mask_density=(0.9, 0.5, 0.2)[number % 3],
        dropout=0.0 if number % 5 == 4 else 0.3,
        shared_dropout=number % 7 == 3,
        soft_cap=3.0 if odd else None,
        sinks=odd,
        causal=number % 4 == 3,
    )


CASES = [combination(number) for number in range(len(FORMS))]


def test_every_form_of_a_bias_and_of_a_mask_is_among_them() -> None:
    assert {case.bias for case in CASES} == {case.mask for case in CASES} == set(FORMS)
    assert sum(case.dropout > 0 for case in CASES) > len(CASES) // 2


@pytest.mark.parametrize("case", chosen(CASES, CASES[9].name), ids=str)
def test_together_they_are_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check(BOTH[CASES.index(case) % 2], case, seed)
