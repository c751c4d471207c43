"""The Hopper kernels, interpreted on a CPU, and on a Hopper GPU where there is one: exactness."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jattn
from pallas_kernels.hopper import limits
from tests.cases import FLOAT32, Case, chosen, operands
from tests.hopper.calls import LARGE, SHARED, SMALL, Half, has_kernel, spec_of
from tests.hopper.exact import FLASH, INTERPRETED, check, check_repeats, compiled, hopper

__all__ = ["hopper"]

thorough = pytest.mark.thorough

ON_A_GPU = SMALL + LARGE + SHARED
ORDINARY = "offsets packed one_query_split_keys latent_window dq_in_fragments"


def test_every_shared_case_without_a_mask_or_a_bias_of_narrow_heads_is_tried() -> None:
    refused = [case for case in FLOAT32 if not has_kernel(case)]
    assert len(SHARED) + len(refused) == len(FLOAT32)
    assert len(SHARED) >= 50
    for case in ON_A_GPU:
        assert limits.refusals(spec_of(case)) == [], case
    for case in refused:
        dims = case.head_dim, case.value_dim or case.head_dim
        narrow = case.bias is not None and min(dims) < 64
        assert case.mask or narrow or any(dim % 8 for dim in dims), case


@pytest.mark.parametrize("case", chosen(SMALL, ORDINARY), ids=str)
def test_interpreted_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check(INTERPRETED, case, seed)


@thorough
def test_interpreted_gradients_are_those_of_small_differences() -> None:
    """jax's own check; of the log-sum-exp, as the output has 16 bits and differences too few."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 33, 2, 64)).astype(np.float32) for _ in range(3))

    def lse(q: jax.Array, k: jax.Array) -> jax.Array:
        halves = (x.astype(jnp.bfloat16) for x in (q, k, v))
        return INTERPRETED(*halves, is_causal=True, return_residual=True)[1]

    check_grads(lse, (q, k), order=1, modes=("rev",), atol=0.02, rtol=0.02, eps=0.125)


@pytest.mark.parametrize("segments", ["sorted", pytest.param("unsorted", marks=thorough)])
def test_interpreted_deterministic_gradients_are_as_exact(segments: str, seed: int) -> None:
    with jattn.deterministic_gradients():
        check(INTERPRETED, Half("packed", 1, 140, 200, 1, 1, 64, segments=segments), seed)


# One program of a case, and one of its deterministic gradients, for all tests of it on a GPU.
_compiled = cache(partial(compiled, FLASH))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", ON_A_GPU, ids=str)
def test_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check(FLASH, case, seed, _compiled(case))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", dict.fromkeys([*LARGE[::2], LARGE[-1]]), ids=str)
def test_deterministic_gradients_are_as_exact(case: Case, seed: int) -> None:
    with jattn.deterministic_gradients():
        check(FLASH, case, seed, _compiled(case))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", LARGE[::4], ids=str)
def test_two_hundred_runs_are_bitwise_equal(case: Case, seed: int) -> None:
    check_repeats(partial(_compiled(case), operands(case, seed)), 200, "out lse")


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", dict.fromkeys([*LARGE[::4], LARGE[-1]]), ids=str)
def test_two_hundred_deterministic_gradients_are_bitwise_equal(case: Case, seed: int) -> None:
    with jattn.deterministic_gradients():
        check_repeats(partial(_compiled(case), operands(case, seed)), 200)
