"""Thread blocks that walk lists of tiles, interpreted: enough tiles for two blocks."""

from __future__ import annotations

import math
from dataclasses import replace

import jax.numpy as jnp
import pytest

from jattn.call.spec import Operands
from pallas_kernels.hopper.forward import forward
from pallas_kernels.hopper.plan import make_plan
from pallas_kernels.hopper.tiles import choose_tiles
from tests.cases import Case, operands
from tests.hopper.calls import Half, spec_of
from tests.hopper.exact import INTERPRETED
from tests.test_semantics import check_found

CASES = [  # with as many slots for queries
    (Half("list_causal", 1, 300, 300, 3, 3, 64, causal=True), 4),
    (Half("list_full_128", 1, 256, 256, 3, 1, 128), 4),
    (Half("list_no_staging", 1, 300, 70, 2, 2, 256, window=(40, 9)), 3),
    (Half("list_sinks", 2, 130, 130, 2, 2, 192, sinks=True), 4),
]

MORE = [pytest.param(*case, marks=pytest.mark.thorough) for case in CASES[1:]]


@pytest.mark.parametrize(("case", "slots"), CASES[:1] + MORE, ids=str)
def test_lists_of_tiles_are_as_exact_as_the_formula(case: Case, slots: int, seed: int) -> None:
    spec, drawn = spec_of(case), operands(case, seed)
    tiles = replace(choose_tiles(spec, spec.queries), query_slots=slots)
    plan = make_plan(spec, tiles, multiprocessors=2)
    assert plan.is_scheduled
    names = {"q": "query", "k": "key", "v": "value", "sinks": "sinks"}
    arrays = Operands(**{names[name]: jnp.asarray(x) for name, x in drawn.differentiable.items()})
    out, top, rest = forward(spec, arrays, plan=plan, interpret=True)
    lse = top * math.log(2) + rest
    if arrays.sinks is not None:
        lse = jnp.logaddexp(lse, arrays.sinks)
    check_found({"out": out, "lse": lse}, INTERPRETED, case, seed)
