"""Queries one at a time or in chunks, on the Hopper kernels: see tests/test_positions.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper.plan import make_plan
from tests import tolerance
from tests.backends import EAGER, call
from tests.cases import Case, operands
from tests.hopper.calls import Half, spec_of
from tests.hopper.exact import FLASH, INTERPRETED, hopper
from tests.test_positions import ONE_PASS, decoded, mapped
from tests.test_semantics import check_found

__all__ = ["hopper"]


def test_interpreted_single_queries_are_those_of_one_pass(seed: int) -> None:
    """A batch row for each, of a pass whose keys are split among thread blocks."""
    case = Half("single", 1, 200, 200, 4, 2, 64, causal=True, sinks=True)
    drawn = operands(case, seed)
    at = np.array([0, 63, 64, 199])
    q, k, v = (jnp.asarray(drawn[name]) for name in "qkv")
    keys = (jnp.repeat(x, len(at), axis=0) for x in (k, v))
    out, lse = INTERPRETED(
        jnp.swapaxes(q[:, at], 0, 1),
        *keys,
        sinks=jnp.asarray(drawn["sinks"]),
        is_causal=True,
        query_offset=jnp.asarray(at, jnp.int32),
        return_residual=True,
    )
    whole, peers = drawn.exact(None), call(EAGER, drawn, drawn.differentiable, return_residual=True)
    pairs = {"out": (out, whole.out, peers[0]), "lse": (lse, whole.lse, peers[1])}
    for name, (found, exact, peer) in pairs.items():
        tolerance.check_against_peer(
            name, found[:, 0], peer[0, at], exact[0, at], whole.magnitudes()[name], case.dtype
        )


def test_the_plan_of_a_call_whose_offset_is_known_is_one_of_its_band() -> None:
    known = make_plan(spec_of(Half("known", 4, 1024, 2048, 16, 16, 128, causal=True, offset=1024)))
    assert known.lengths_known
    assert known.is_scheduled
    array = make_plan(
        spec_of(Half("array", 4, 1024, 2048, 16, 16, 128, causal=True, offset=(1024,) * 4))
    )
    assert not array.lengths_known
    last = make_plan(spec_of(Half("last", 1, 1, 4096, 8, 8, 128, causal=True, offset=4095)))
    assert not last.masked


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", ONE_PASS, ids=str)
def test_chunks_are_one_pass(case: Case, seed: int) -> None:
    long: dict[str, Any] = {"queries": 192, "keys": 192, "head_dim": 64, "dtype": "bfloat16"}
    case = replace(case, name=f"{case.name}_long", **long)
    for size in (1, 48):
        check_found(decoded(FLASH, case, seed, size), FLASH, case, seed)
    check_found(mapped(FLASH, case, seed, 64), FLASH, case, seed)
