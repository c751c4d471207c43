"""The gradient of a bias that nothing shares, which Hopper's kernel of dQ writes by blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.backends.flash import interpreted
from tests.cases import Case, first
from tests.hopper.calls import Half
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper

__all__ = ["hopper"]

Own = partial(Half, batch=2, queries=136, keys=200, heads=2, kv_heads=1, head_dim=64, bias="BNTS")
CASES = [
    # Zeros on both sides of what is visited.
    Own("own_small", batch=1, heads=1, queries=40, window=(30, 20)),
    Own("own_window", keys=333, window=(30, 20), bias_dtype="float32"),
    Own("own_causal", queries=300, keys=200, causal=True),
    Own("own_ragged", queries=67, keys=131, bias_dtype="float32", head_dim=128),
    Own("own_lengths", causal=True, query_lengths=(100, 0), key_lengths=(200, 70)),
    Own("own_soft_cap", soft_cap=3.0, sinks=True),
    Own("own_one_row", batch=1, bias="1NTS", head_dim=128, causal=True),
    Own("own_one_head", heads=1, bias="B1TS", segments="sorted"),
    Own("own_one_query", queries=1),
]  # fmt: skip


@pytest.mark.parametrize("case", first(1, CASES), ids=str)
def test_interpreted_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check(FLASH, case, seed)


def past_the_lengths(attend: Any) -> None:
    """What a bias holds past the lengths changes nothing and has no gradient."""
    rng = np.random.default_rng(3)
    q, k, v, d_out = (
        jnp.asarray(rng.standard_normal((2, 72, 2, 64)), jnp.bfloat16) for _ in range(4)
    )
    bias = rng.standard_normal((2, 2, 72, 72)).astype(np.float32)
    planted = bias.copy()
    queries, keys = (50, 72), (72, 40)
    for row in range(2):
        planted[row, :, queries[row] :] = np.nan
        planted[row, :, :, keys[row] :] = np.nan

    def run(bias: Any) -> Any:
        lengths = (jnp.asarray(x, jnp.int32) for x in (queries, keys))
        names = ("query_seq_lengths", "key_value_seq_lengths")
        call = partial(attend, **dict(zip(names, lengths, strict=True)))
        out, vjp = jax.vjp(lambda *x: call(*x[:3], bias=x[3]), q, k, v, jnp.asarray(bias))
        return out, vjp(d_out)

    found, wanted = (jax.tree.leaves(run(x)) for x in (planted, bias))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    d_bias = np.asarray(found[-1])
    assert np.abs(d_bias[0, :, : queries[0]]).max() > 0
    assert not d_bias[0, :, queries[0] :].any()
    assert not d_bias[1, :, :, keys[1] :].any()


@pytest.mark.thorough
def test_nothing_past_the_lengths_counts_when_interpreted() -> None:
    with interpreted():
        past_the_lengths(jattn.flash_attention)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_nothing_past_the_lengths_counts() -> None:
    past_the_lengths(jattn.flash_attention)
