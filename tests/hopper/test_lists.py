"""Thread blocks that compute several tiles each, interpreted: enough tiles for two blocks."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import Barrier

from jattn.call.spec import AttentionSpec, Operands
from pallas_kernels.hopper import plan as plans
from pallas_kernels.hopper.forward import forward
from pallas_kernels.hopper.plan import Plan, make_plan
from pallas_kernels.hopper.taken import longest_first
from pallas_kernels.hopper.tiles import Tiles, choose_tiles
from tests.cases import Case, operands, thorough
from tests.cases import Operands as Drawn
from tests.hopper.calls import Half, spec_of
from tests.hopper.exact import INTERPRETED
from tests.test_semantics import check_found

CASES = [  # with as many slots for queries; those of segments by a counter
    (Half("list_window", 1, 330, 330, 2, 2, 64, window=(260, 0)), 4),
    (Half("counted", 1, 136, 136, 3, 1, 128, causal=True, segments="sorted"), 3),
    (Half("list_causal", 1, 300, 300, 3, 3, 64, causal=True), 4),
    (Half("counted_loose", 2, 264, 328, 2, 2, 96, segments="unsorted", sinks=True), 3),
    (Half("counted_window", 1, 392, 392, 2, 2, 128, window=(140, 0), segments="sorted"), 3),
    (Half("counted_64", 2, 200, 200, 3, 1, 64, causal=True, segments="sorted"), 4),
    (Half("counted_packed", 5, 20, 150, 8, 1, 128, segments="sorted"), 3),
    (Half("counted_odd", 1, 203, 203, 3, 1, 80, causal=True, segments="unsorted"), 3),
    (Half("counted_whole", 1, 40, 1203, 8, 8, 80, segments="sorted"), 3),
    (Half("list_full_128", 1, 256, 256, 3, 1, 128), 4),
    (Half("list_no_staging", 1, 300, 70, 2, 2, 256, window=(40, 9)), 3),
    (Half("list_sinks", 2, 130, 130, 2, 2, 192, sinks=True), 4),
]

KNOWN = [  # by a counter too
    (Half("latent_causal", 1, 136, 136, 2, 1, 192, 128, causal=True), 2),
    (Half("latent_sinks", 2, 150, 150, 2, 1, 192, 128, sinks=True), 2),
    (Half("full_128", 2, 256, 256, 3, 1, 128), 4),
    (Half("window_64", 1, 520, 520, 1, 1, 64, window=(400, 0)), 4),
    (Half("by_96", 2, 150, 264, 2, 1, 176), 2),
    (Half("by_80", 1, 150, 310, 2, 1, 240, sinks=True), 2),
    (Half("pieces_of_32", 1, 150, 233, 2, 1, 160, causal=True), 2),
]
MORE = [pytest.param(*case, marks=pytest.mark.thorough) for case in CASES[2:]]


def operands_of(drawn: Drawn) -> Operands:
    names = {"q": "query", "k": "key", "v": "value", "sinks": "sinks"}
    arrays = {names[name]: jnp.asarray(x) for name, x in drawn.differentiable.items()}
    if drawn.case.segments is not None:
        arrays |= {name: jnp.asarray(drawn[name]) for name in ("query_segments", "key_segments")}
    return Operands(**arrays)


@pytest.mark.parametrize(("case", "slots"), [*CASES[:2], *MORE], ids=str)
def test_lists_of_tiles_are_as_exact_as_the_formula(
    case: Case, slots: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, drawn = spec_of(case), operands(case, seed)
    tiles = replace(choose_tiles(spec, max(spec.queries, 128)), query_slots=slots)
    plan = counted_plan(spec, tiles, monkeypatch)
    if case.segments is None:
        plan = replace(plan, counted=False)
    assert plan.is_scheduled
    check(plan, drawn, seed)


@pytest.mark.parametrize(
    ("case", "slots"),
    [KNOWN[0], *(pytest.param(*case, marks=pytest.mark.thorough) for case in KNOWN[1:])],
    ids=str,
)
def test_tiles_of_known_lengths_from_a_counter_too(
    case: Case, slots: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(case)
    tiles = replace(choose_tiles(spec, max(spec.queries, 128)), query_slots=slots)
    plan = counted_plan(spec, tiles, monkeypatch)
    assert plan.counted
    assert plan.tiles.from_registers == (case.head_dim > 128)
    check(plan, operands(case, seed), seed)


@pytest.mark.parametrize("head_dim", [64, *thorough((72,), (128,))])
def test_blocks_of_no_power_of_two_of_keys(head_dim: int, seed: int) -> None:
    case = Half("", 1, 70, 201, 2, 1, head_dim)
    spec = spec_of(case)
    tiles = choose_tiles(spec, 128)
    assert tiles.keys == 112
    check(make_plan(spec, tiles, multiprocessors=1), operands(case, seed), seed)


def test_a_warpgroup_may_begin_when_its_loader_has_taken_all_that_is_free(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tiles of one block of keys: the interpreter says which phase of a barrier is missed."""
    waits = Barrier.wait
    late: set[Any] = set()

    def wait(self: Barrier, thread: Any, **options: Any) -> None:
        if thread.warpgroup_id == 1 and not late:
            late.add(thread)
            time.sleep(0.3)
        waits(self, thread, **options)

    monkeypatch.setattr(Barrier, "wait", wait)
    case = Half("", 1, 128, 128, 3, 3, 64, window=(0, 0))
    spec = spec_of(case)
    plan = counted_plan(spec, choose_tiles(spec, 128), monkeypatch)
    assert plan.counted
    check(plan, operands(case, seed), seed)
    assert late


def counted_plan(spec: AttentionSpec, tiles: Tiles, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Two thread blocks' plan of a call whose tiles are too few for a counter."""
    monkeypatch.setattr(plans, "FEWEST_COUNTED", 0)
    monkeypatch.setattr(plans, "FEWEST_VISITS", 0)
    return make_plan(spec, tiles, multiprocessors=2)


def check(plan: Plan, drawn: Drawn, seed: int) -> None:
    """Output and log-sum-exp by this plan, beside the formula's."""
    spec, arrays = plan.spec, operands_of(drawn)
    out, top, rest = forward(spec, arrays, plan=plan, interpret=True)
    lse = top * math.log(2) + rest
    if arrays.sinks is not None:
        lse = jnp.logaddexp(lse, arrays.sinks.astype(jnp.float32)[None, None])
    check_found({"out": out, "lse": lse}, INTERPRETED, drawn.case, seed)


def test_the_longest_first_are_in_an_order_of_all() -> None:
    stop = jnp.asarray([[3, 1, 4], [1, 5, 9]], jnp.int32)
    ranges = jnp.stack([jnp.zeros_like(stop), stop, stop, stop], axis=2)
    np.testing.assert_array_equal(longest_first(ranges), [5, 4, 2, 0, 1, 3])
