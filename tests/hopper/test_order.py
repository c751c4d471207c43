"""Packed documents: tiles of keys start with those that most queries see."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jattn.call.spec import Operands
from pallas_kernels.hopper import visits
from tests.hopper import exact
from tests.hopper.calls import Half, spec_of

PACKED = Half("ordered", 1, 300, 300, 1, 1, 64, segments="sorted", causal=True)


def test_each_tile_once_by_falling_number_of_visits() -> None:
    case = Half("", 2, 8192, 8192, 1, 1, 64, segments="sorted", causal=True)
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 4, (2, 8192)), axis=1).astype(np.int32)
    query = jnp.zeros((2, 8192, 1, 64), jnp.bfloat16)
    segments = {"query_segments": jnp.asarray(ids), "key_segments": jnp.asarray(ids)}
    operands = Operands(query, query, query, **segments)
    found = np.asarray(visits.visits(spec_of(case), operands, queries=64, keys=128))
    for ranges in found:
        order = ranges[:, 4]
        np.testing.assert_array_equal(np.sort(order), np.arange(64))
        assert (np.diff(ranges[order, 1]) <= 0).all()
        assert (np.diff(ranges[:, 1]) > 0).any()


def test_interpreted_in_this_order_as_exact(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(visits, "ORDERED", range(1, 100))
    exact.check(exact.INTERPRETED, PACKED, seed)
