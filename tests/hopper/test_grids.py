"""Sizes of any axis: no launch has a grid that CUDA refuses, and a flat one computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import jattn
from jattn.backends.flash import interpreted
from pallas_kernels.hopper import grid, limits
from tests.cases import Case, thorough
from tests.hopper import exact
from tests.hopper.calls import Half, spec_of
from tests.hopper.exact import hopper  # noqa: F401
from tests.reference import attention, visible
from tests.shapes import arguments
from tests.tolerance import check_against_peer

BIG = [
    Half("batch", 80_000, 16, 16, 1, 1, 64),
    Half("batch_wide", 65_537, 16, 16, 1, 1, 136),
    Half("many_heads", 1, 16, 16, 71_280, 71_280, 8, causal=True),
    Half("batch_and_heads", 80_000, 16, 16, 2, 2, 8, soft_cap=5.0),
    Half("long", 1, 8_388_609, 8_388_609, 1, 1, 8, window=(100, 0)),
]


def grids(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Those of all kernels of a program."""
    for equation in jaxpr.eqns:
        for mesh in equation.params.get("meshes", [equation.params.get("mesh")]):
            if hasattr(mesh, "grid_names"):
                yield tuple(mesh.grid)
        for inner in jaxprs_in_params(equation.params):
            yield from grids(inner)


@pytest.mark.parametrize("case", BIG, ids=str)
def test_no_axis_of_a_grid_grows_too_large(case: Case) -> None:
    floats, rest, options = arguments(case)

    def attend(floats: Any) -> Any:
        return jattn.flash_attention(**floats, **options).astype(jnp.float32).sum()

    with interpreted():
        found = list(grids(jax.make_jaxpr(jax.grad(attend))(floats).jaxpr))
    assert not rest
    assert len(found) >= 2
    for each in found:
        assert all(size <= 65_535 for size in each[:-1])
        assert prod(each) < 2**31


@pytest.mark.parametrize(
    "case",
    [
        Half("flat", 2, 70, 70, 2, 1, 64, causal=True),
        *thorough(
            (Half("flat_tiles", 2, 130, 130, 2, 1, 64, causal=True),),
            (Half("flat_wide", 2, 70, 150, 2, 2, 136),),
        ),
    ],
    ids=str,
)
def test_a_flat_grid_visits_every_tile(
    case: Case, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "MOST_OF_AN_AXIS", 0)
    exact.check(exact.INTERPRETED, case, seed)


def test_the_first_two_of_four_axes_are_launched_as_one() -> None:
    def of(*sizes: int) -> grid.Grid:
        return grid.Grid(tuple(zip("abcd", sizes, strict=False)))

    assert not of(65_535, 65_535, 100_000).is_flat
    assert of(65_536, 1, 1).is_flat
    assert not of(3, 21_845, 65_535, 100_000).is_flat
    assert of(3, 21_846, 1, 1).is_flat


def test_more_tiles_than_a_launch_may_have_are_refused() -> None:
    case = Half("", 2**26, 1, 1, 32, 32, 8)
    assert "2147483648 tiles" in limits.refusals(spec_of(case))[0]


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", BIG, ids=str)
def test_large_grids_run(case: Case) -> None:
    floats, _, options = arguments(case)
    keys = jax.random.split(jax.random.key(0), 4)

    def loss(floats: Any, weights: Any) -> Any:
        out = jattn.flash_attention(**floats, **options)
        return jnp.sum(out.astype(jnp.float32) * weights.astype(jnp.float32))

    arrays = {
        name: jax.random.normal(key, x.shape, x.dtype)
        for key, (name, x) in zip(keys, floats.items(), strict=False)
    }
    weights = jax.random.normal(keys[3], floats["query"].shape, jnp.bfloat16)
    found = jax.jit(jax.grad(loss))(arrays, weights)

    # The last batch row, head or stretch of the sequence, of which the last rows see all they need.
    def last(x: Any) -> Any:
        return np.asarray(x[-1:, -400:, -1:])

    q, k, v = (last(arrays[name]) for name in ("query", "key", "value"))
    d_out = last(weights)
    seen = visible(1, q.shape[1], k.shape[1], causal=case.causal, window=case.window)
    exact = attention(q, k, v, seen=seen, soft_cap=case.soft_cap)
    zero = np.zeros(d_out.shape[:3])
    expected, magnitudes = exact.gradients(d_out, zero), exact.magnitudes(d_out, zero)
    _, vjp = jax.vjp(lambda *x: jattn.eager_attention(*x, **options), q, k, v)
    rows = slice(-100, None)
    for letter, name, peer in zip("qkv", ("query", "key", "value"), vjp(d_out), strict=True):
        check_against_peer(
            name,
            last(found[name])[:, rows],
            np.asarray(peer)[:, rows],
            expected[letter][:, rows],
            magnitudes[letter][:, rows],
            case.dtype,
        )
