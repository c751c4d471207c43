"""`jattn.flash_attention` against float64, with NaN in what lies past the lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.backends.flash import interpreted
from tests.backends import Backend, Results, call
from tests.cases import Case, Operands, operands
from tests.test_padding import planted
from tests.test_semantics import check_found, check_kinds, check_zeros


def _interpreted(*args: Any, **options: Any) -> Any:
    with interpreted():
        return jattn.flash_attention(*args, **options)


FLASH = Backend("flash", jattn.flash_attention)
INTERPRETED = Backend("flash_interpreted", _interpreted)


@cache
def has_hopper() -> bool:
    """Whether this machine can run the kernels."""
    device = jax.devices()[0]
    return device.platform == "gpu" and device.compute_capability == "9.0"


@pytest.fixture
def hopper() -> None:
    """Skips a test of the kernels where they cannot run."""
    if not has_hopper():
        pytest.skip("needs a GPU of compute capability 9.0")


def compiled(backend: Backend, case: Case) -> Callable[[Operands], Results]:
    """Output, log-sum-exp and the gradients of both, compiled once for all operands of a case."""

    def everything(arrays: Results, rest: Results, cotangents: Any) -> Results:
        drawn = operands(case, 0)
        (out, lse), vjp = jax.vjp(
            lambda arrays: call(backend, drawn, arrays, **rest, return_residual=True), arrays
        )
        return {"out": out, "lse": lse, **vjp(cotangents)[0]}

    # The interpreter's effects cannot be compiled where a call is partitioned.
    run = everything if backend is INTERPRETED else jax.jit(everything)

    def on(drawn: Operands) -> Results:
        arrays = planted(case, drawn.seed, np.nan)
        rest = {name: x for name, x in drawn.options.items() if isinstance(x, jax.Array)}
        found: Results = run(*jax.device_put((arrays, rest, (drawn["dout"], drawn["dlse"]))))
        return found

    return on


def compute(backend: Backend, case: Case, seed: int) -> Results:
    return compiled(backend, case)(operands(case, seed))


def check(
    backend: Backend,
    case: Case,
    seed: int,
    run: Callable[[Operands], Results] | None = None,
) -> Results:
    """What the call gives is as exact as eager is.

    run: what `compiled` gave, where it is to run more than once.
    """
    found = (run or compiled(backend, case))(operands(case, seed))
    check_kinds(found, case, seed)
    check_zeros(found, case, seed)
    check_found(found, backend, case, seed)
    return found


def check_repeats(run: Callable[[], Results], times: int, names: str = "") -> None:
    """So many runs give the same bits; of the results of these names, or of all."""
    first = run()
    for i in range(1, times):
        again = run()
        for name in names.split() or first:
            assert _same_bits(again[name], first[name]), f"{name} of run {i}"


@jax.jit
def _same_bits(a: jax.Array, b: jax.Array) -> jax.Array:
    """Compared where they are: to copy and compare them on the host takes longer than to run."""
    bits = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
    return jnp.all(a.view(bits) == b.view(bits))
