"""Short calls, whose gradients are one launch, as exact, and the same each time."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper.backward_tiles import choose_backward_tiles
from tests.backends import EAGER, Backend, Results, call
from tests.cases import Case, chosen, operands
from tests.hopper.calls import Bottom, Half, spec_of
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper
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
]
OTHERS = [
    Half("long", 1, 2100, 2100, 1, 1, 64, causal=True),
    Half("long_full", 1, 1100, 1100, 1, 1, 64),
    Half("many", 8, 512, 512, 8, 8, 64, causal=True),
    Half("many_full", 3, 512, 512, 8, 8, 64),
    Half("few_queries", 1, 60, 300, 4, 1, 64),
    Half("wide", 1, 200, 200, 2, 2, 192),
    Half("latent", 1, 200, 200, 2, 2, 64, 128),
    Half("packed", 1, 200, 200, 2, 1, 64, segments="sorted", causal=True),
    Half("dropout", 1, 200, 200, 2, 2, 64, dropout=0.1),
    Case("float16", 1, 300, 140, 2, 1, 128, dtype="float16", causal=True),
]
LARGE = [
    *(Half(f"odd_{t}", 1, t, t, 8, 8, 64, causal=True) for t in (128, 257, 333, 511)),
    *(Half(f"odd_{t}_128", 1, t, t, 8, 8, 128, causal=True) for t in (257, 512)),
    Half("whole", 1, 512, 512, 8, 8, 64),
    Half("grouped", 1, 256, 256, 16, 4, 64, causal=True),
]


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_others_are_not(case: Case) -> None:
    assert not choose_backward_tiles(spec_of(case), deterministic=False).joined


@pytest.mark.parametrize("case", chosen(CASES, "short"), ids=str)
def test_interpreted_as_exact(case: Case, seed: int) -> None:
    assert choose_backward_tiles(spec_of(case), deterministic=False).joined
    check(INTERPRETED, case, seed)


def alone(backend: Backend, case: Case, seed: int) -> Callable[[Results], Results]:
    """Output and its gradients by the arrays, where nobody asks for the log-sum-exp."""
    drawn = operands(case, seed)

    def run(arrays: Results) -> Results:
        out, vjp = jax.vjp(lambda arrays: call(backend, drawn, arrays), arrays)
        return {"out": out, **vjp(jnp.asarray(drawn["dout"]))[0]}

    return run


def beside(backend: Backend, case: Case, seed: int) -> Callable[[Results], Results]:
    """The same with the log-sum-exp, whose gradients count too."""
    drawn = operands(case, seed)

    def run(arrays: Results) -> Results:
        (out, lse), vjp = jax.vjp(
            lambda arrays: call(backend, drawn, arrays, return_residual=True), arrays
        )
        cotangents = jnp.asarray(drawn["dout"]), jnp.asarray(drawn["dlse"], lse.dtype)
        return {"out": out, "lse": lse, **vjp(cotangents)[0]}

    return run


def check_repeats(run: Callable[[Results], Results], case: Case, seed: int) -> None:
    """Twenty calls give the same bits, compiled once."""
    compiled, arrays = jax.jit(run), planted(case, seed, np.nan)
    first = compiled(arrays)
    for _ in range(20):
        for name, x in compiled(arrays).items():
            np.testing.assert_array_equal(np.asarray(x), np.asarray(first[name]), err_msg=name)


def check_alone(backend: Backend, case: Case, seed: int) -> None:
    """The kernels make the row term: what the call gives is about what eager gives."""
    arrays = {name: jnp.asarray(x) for name, x in planted(case, seed, np.nan).items()}
    found, peer = (alone(x, case, seed)(arrays) for x in (backend, EAGER))
    for name, x in found.items():
        own, other = (np.asarray(y, np.float32) for y in (x, peer[name]))
        assert np.abs(own - other).max() <= 2.0**-6 * np.abs(other).max(), name


@pytest.mark.parametrize("case", chosen(CASES, "short"), ids=str)
def test_interpreted_with_its_own_row_term(case: Case, seed: int) -> None:
    check_alone(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_on_a_gpu_as_exact_and_the_same_each_time(case: Case, seed: int) -> None:
    assert choose_backward_tiles(spec_of(case), deterministic=False).joined
    check(FLASH, case, seed)
    check_repeats(beside(FLASH, case, seed), case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_on_a_gpu_with_its_own_row_term(case: Case, seed: int) -> None:
    check_alone(FLASH, case, seed)
    check_repeats(alone(FLASH, case, seed), case, seed)
