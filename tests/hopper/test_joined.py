"""Short calls, whose gradients are one launch, as exact, and the same each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper.backward_tiles import choose_backward_tiles
from pallas_kernels.hopper.shares import Shares
from tests.backends import EAGER, Backend, Results, call
from tests.cases import Case, chosen, operands
from tests.hopper.calls import Bottom, Half, spec_of
from tests.hopper.exact import FLASH, INTERPRETED, check, check_repeats, compiled, hopper
from tests.test_padding import planted

__all__ = ["hopper"]

CASES = [
    Half("short", 1, 70, 130, 1, 1, 64, causal=True),
    Half("causal", 1, 257, 257, 2, 1, 64, causal=True),
    Half("full", 1, 150, 270, 2, 2, 40),
    Bottom("bottom_right", 1, 65, 264, 4, 1, 128, sinks=True),
    Half("lengths", 2, 150, 300, 2, 1, 64, query_lengths=(150, 70), key_lengths=(0, 290)),
    Half("window", 1, 300, 300, 1, 1, 64, window=(70, 20)),
    Half("window_96", 1, 70, 270, 2, 1, 96, causal=True, window=(150, None)),
    Half("soft_cap", 1, 130, 130, 2, 2, 64, sinks=True, soft_cap=5.0),
    Half("scaled", 1, 300, 140, 2, 1, 128, causal=True, scale=-0.2),
    Half("packed", 1, 200, 200, 2, 1, 64, segments="sorted", causal=True),
    Half("mixed", 2, 70, 150, 2, 2, 40, segments="unsorted"),
    Half("offsets", 2, 70, 270, 2, 1, 64, causal=True, window=(150, None), offset=(-30, 160)),
    Case("float16", 1, 300, 140, 2, 1, 128, dtype="float16", causal=True),
    Half("dropout", 1, 150, 200, 2, 2, 64, dropout=0.1),
    Case("kinds", 1, 70, 130, 1, 1, 64, dtype="float16", segments="unsorted", dropout=0.2),
    Half("packed_cap", 1, 150, 200, 2, 1, 64, segments="sorted", causal=True, soft_cap=5.0),
    Half("dropout_cap_96", 1, 130, 150, 4, 1, 96, dropout=0.3, soft_cap=5.0, causal=True),
]
OTHERS = [
    Half("long", 1, 2100, 2100, 1, 1, 64, causal=True),
    Half("long_full", 1, 1100, 1100, 1, 1, 64),
    Half("many", 8, 512, 512, 8, 8, 64, causal=True),
    Half("many_full", 3, 512, 512, 8, 8, 64),
    Half("many_heads", 1, 1024, 1024, 24, 24, 128, causal=True),
    Half("grouped_long", 1, 2048, 2048, 16, 4, 128, causal=True),
    Half("grouped_long_full", 1, 1024, 1024, 16, 4, 128),
    Half("grouped_many", 3, 512, 512, 32, 8, 128, causal=True),
    Half("few_queries", 1, 60, 300, 4, 1, 64),
    Half("wide", 1, 200, 200, 2, 2, 192),
    Half("latent", 1, 200, 200, 2, 2, 64, 128),
    Half("long_packed", 1, 1100, 1100, 1, 1, 64, causal=True, segments="sorted"),
    Half("many_packed", 4, 512, 512, 8, 8, 64, causal=True, segments="sorted"),
    Half("shares_of_one", 1, 1024, 1024, 24, 8, 128, causal=True),
    Half("long_lengths", 1, 1100, 1100, 1, 1, 64, key_lengths=(900,)),
    Half("few_keys_offsets", 2, 200, 60, 2, 2, 64, causal=True, offset=(0, 7)),
]
# The shares of a group's heads, and of each one's visits, where dQ's thread blocks are beside.
SHARED = [
    (Half("two_heads", 1, 1024, 1024, 32, 8, 128, causal=True), Shares(2)),
    (Half("two_rows", 2, 512, 512, 32, 8, 128, causal=True), Shares(2)),
    (Half("two_heads_full", 1, 512, 512, 32, 8, 128), Shares(2)),
    (Half("two_heads_of_one", 1, 1024, 1024, 32, 1, 128, causal=True), Shares(16)),
    (Half("dropout_long", 1, 2048, 2048, 8, 8, 64, causal=True, dropout=0.1), Shares()),
    (Half("few_heads", 1, 1024, 1024, 4, 4, 64), Shares()),
    (Half("few_groups", 1, 1024, 1024, 8, 2, 64), Shares(4)),
    (Half("few_long", 1, 2048, 2048, 6, 6, 128, causal=True), Shares()),
]
LARGE = [
    *(Half(f"odd_{t}", 1, t, t, 8, 8, 64, causal=True) for t in (128, 257, 333, 511)),
    *(Half(f"odd_{t}_128", 1, t, t, 8, 8, 128, causal=True) for t in (257, 512)),
    Half("whole", 1, 512, 512, 8, 8, 64),
    Half("grouped", 1, 256, 256, 16, 4, 64, causal=True),
    Half("documents", 1, 777, 777, 4, 2, 128, causal=True, segments="sorted"),
    Half("odd_offsets", 2, 333, 500, 4, 4, 128, causal=True, offset=(-100, 170)),
    Case("whole_float16", 2, 333, 333, 8, 2, 64, dtype="float16"),
    Half("odd_dropout", 2, 333, 333, 4, 2, 128, dropout=0.2, causal=True),
    *(case for case, _ in SHARED),
]


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_others_are_not_joined(case: Case) -> None:
    assert not choose_backward_tiles(spec_of(case), deterministic=False).joined


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_these_are_joined(case: Case) -> None:
    assert choose_backward_tiles(spec_of(case), deterministic=False).joined


@pytest.mark.parametrize(("case", "shares"), SHARED, ids=str)
def test_shares_leave_room_for_the_thread_blocks_of_queries(case: Case, shares: Shares) -> None:
    tiles = choose_backward_tiles(spec_of(case), deterministic=False)
    assert tiles.joined
    assert tiles.shares == shares


@pytest.mark.parametrize("case", chosen(CASES, "kinds"), ids=str)
def test_interpreted_as_exact(case: Case, seed: int) -> None:
    check(INTERPRETED, case, seed)


def alone(backend: Backend, case: Case, seed: int) -> Callable[[], Results]:
    """Output and its gradients, where nobody asks for the log-sum-exp."""
    drawn = operands(case, seed)

    def run(arrays: Results) -> Results:
        out, vjp = jax.vjp(lambda arrays: call(backend, drawn, arrays), arrays)
        return {"out": out, **vjp(jnp.asarray(drawn["dout"]))[0]}

    # The interpreter's effects cannot be compiled where a call is partitioned.
    run = run if backend is INTERPRETED else jax.jit(run)
    return partial(run, jax.device_put(planted(case, seed, np.nan)))


def check_alone(run: Callable[[], Results], case: Case, seed: int) -> None:
    """The kernels make the row term: what the call gives is about what eager gives."""
    found, peer = run(), alone(EAGER, case, seed)()
    for name, x in found.items():
        own, other = (np.asarray(y, np.float32) for y in (x, peer[name]))
        assert np.abs(own - other).max() <= 2.0**-6 * np.abs(other).max(), name


@pytest.mark.parametrize("case", chosen(CASES, "short"), ids=str)
def test_interpreted_with_its_own_row_term(case: Case, seed: int) -> None:
    check_alone(alone(INTERPRETED, case, seed), case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_on_a_gpu_as_exact_and_the_same_each_time(case: Case, seed: int) -> None:
    run = compiled(FLASH, case)
    check(FLASH, case, seed, run)
    check_repeats(partial(run, operands(case, seed)), 20)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_on_a_gpu_with_its_own_row_term(case: Case, seed: int) -> None:
    run = alone(FLASH, case, seed)
    check_alone(run, case, seed)
    check_repeats(run, 20)
