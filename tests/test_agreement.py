"""Every way to compute attention on one table of calls: as exact as the formula, each of them.

On a CPU the kernels are interpreted and the table is short; on a GPU they are compiled and it is
the table of all backends.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jattn
from pallas_kernels.hopper import limits
from tests import backends
from tests.backends import EAGER, Backend, keep_mask
from tests.cases import Case, first
from tests.hopper import exact as hopper
from tests.portable import exact as portable
from tests.portable.calls import AGREED, ON_A_GPU
from tests.test_dropout import mask_of
from tests.test_semantics import check_errors, check_found, check_kinds, check_zeros

HOPPER = hopper.FLASH if portable.ON_GPU else hopper.INTERPRETED
XLA = Backend(
    "memory_efficient-xla",
    jattn.memory_efficient_attention,
    (("query_chunk_size", 32), ("key_chunk_size", 48)),
)
ampere = portable.ampere
EVERY = [HOPPER, portable.FLASH, portable.CHUNKED, XLA, EAGER]


def can(backend: Backend, case: Case) -> bool:
    """Whether it takes the call: all but the Hopper kernels take every one."""
    if backend is not HOPPER:
        return True
    if portable.ON_GPU and not hopper.has_hopper():
        return False
    return not limits.refusals(portable.spec_of(case))


# The kernels meet each feature in tests/hopper and tests/portable too.
ALWAYS = AGREED[-1], XLA
CALLS = [
    pytest.param(
        case, backend, marks=() if case is AGREED[-1] and backend is XLA else pytest.mark.thorough
    )
    for case in AGREED
    for backend in EVERY
    if can(backend, case)
]


def check(backend: Backend, case: Case, seed: int) -> None:
    if backend in (XLA, EAGER):
        found = backends.compute(backend, case, seed)
        check_errors(EAGER, case, seed)
    elif backend is HOPPER:
        found = hopper.compute(backend, case, seed)
    else:
        found = portable.compute(backend, case, seed)
    check_kinds(found, case, seed)
    check_zeros(found, case, seed)
    check_found(found, backend, case, seed)


@pytest.mark.parametrize(
    ("case", "backend"),
    CALLS,
    ids=str,
)
def test_all_agree_with_float64(case: Case, backend: Backend, seed: int) -> None:
    check(backend, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("backend", EVERY, ids=str)
@pytest.mark.parametrize("case", ON_A_GPU, ids=str)
def test_all_agree_with_float64_on_a_gpu(case: Case, backend: Backend, seed: int) -> None:
    if not can(backend, case):
        pytest.skip("not a call for the Hopper kernels, or not a GPU")
    check(backend, case, seed)


@pytest.mark.parametrize("groups", first(1, [4, 1]))
@pytest.mark.parametrize("backend", portable.BOTH, ids=str)
def test_kernels_drop_what_all_backends_drop(backend: Backend, groups: int) -> None:
    found = mask_of(backend, jax.random.key(7), groups=groups)
    np.testing.assert_array_equal(found, keep_mask(0.5, 2, 4, 12, 20))
