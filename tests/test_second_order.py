"""First and second derivatives in every mode, as exact as the formula's, on the table of cases."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jattn
from tests.backends import CHUNKED, DEFAULT, EAGER, Backend
from tests.cases import CASES, EVERYTHING, ORDINARY, Case, thorough
from tests.hopper import exact as hopper
from tests.portable import exact as portable
from tests.second_order import check, directions

ampere = portable.ampere
NAMES = ORDINARY.split()
BY_NAME = {case.name: case for case in CASES}
SMALL = Case("small", 2, 9, 11, 2, 1, 4, 3, bias="11TS", sinks=True, soft_cap=2.0, causal=True)


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        (CHUNKED, EVERYTHING),
        *thorough(*((CHUNKED, BY_NAME[name]) for name in NAMES if name != "everything")),
        *thorough(*((DEFAULT, case) for case in CASES if case.name not in NAMES)),
    ],
    ids=str,
)
def test_every_mode_is_as_exact_as_the_formula(
    backend: Backend, case: Case, seed: int, request: pytest.FixtureRequest
) -> None:
    """Without --thorough the two modes that run all four maps."""
    all_of_them = request.config.getoption("--thorough")
    check(backend, case, seed, *(() if all_of_them else (("forward_reverse", "reverse_forward"),)))


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        (portable.FLASH, SMALL),
        *thorough((portable.FLASH, EVERYTHING), (portable.CHUNKED, SMALL)),
        *thorough(
            (hopper.INTERPRETED, Case("hopper", 1, 70, 90, 2, 1, 64, dtype="bfloat16", causal=True))
        ),
    ],
    ids=str,
)
def test_from_what_a_kernel_saved_it_is_as_exact(backend: Backend, case: Case, seed: int) -> None:
    modes = ("tangent", "forward_reverse") if case is SMALL else ("tangent", "reverse_forward")
    check(backend, case, seed, modes)


@pytest.mark.gpu
@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("backend", [portable.FLASH, portable.CHUNKED], ids=str)
@pytest.mark.parametrize("name", ["everything", "everything-bfloat16", "odd_causal-float16"])
def test_second_derivatives_on_a_gpu_are_as_exact(backend: Backend, name: str, seed: int) -> None:
    check(backend, BY_NAME[name], seed)


@pytest.mark.thorough
@pytest.mark.parametrize("backend", [CHUNKED, EAGER], ids=str)
def test_second_derivatives_in_float64_are_finite_differences(backend: Backend, seed: int) -> None:
    """Of all operands, and an array as scale, in both modes and twice in each order."""
    with jax.enable_x64(True):
        d = directions(SMALL, seed)["x"]
        floats = {name: jnp.asarray(x.astype(np.float64)) for name, x in d.items()}
        floats["scale"] = jnp.float64(0.7)

        @jax.jit
        def results(x: dict[str, Any]) -> Any:
            out, lse = backend(
                x["q"], x["k"], x["v"], x["bias"], sinks=x["sinks"], scale=x["scale"],
                is_causal=True, logits_soft_cap=2.0, dropout_rate=0.2,
                dropout_rng=jax.random.key(1), return_residual=True,
            )  # fmt: skip
            return out, lse

        check_grads(results, (floats,), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


def test_rows_that_see_no_key_have_no_derivative(seed: int) -> None:
    x = jnp.asarray(directions(Case("rows"), seed)["x"]["q"])
    lengths = jnp.array([0, 24], jnp.int32)

    def total(x: jax.Array) -> jax.Array:
        out, lse = jattn.memory_efficient_attention(
            x, x[:, :, :2], x[:, :, :2], key_value_seq_lengths=lengths, return_residual=True,
            query_chunk_size=8, key_chunk_size=16,
        )  # fmt: skip
        return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    t = jnp.ones_like(x)
    (_, gradient), (_, tangent) = jax.jit(lambda: jax.jvp(jax.value_and_grad(total), (x,), (t,)))()
    assert (gradient[0] == 0).all()
    assert (tangent[0] == 0).all()
    assert (tangent[1] != 0).any()
