"""The Hopper kernels under jax's transformations, and on several GPUs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.backends import EAGER, Backend
from tests.hopper.exact import FLASH, hopper

__all__ = ["hopper"]

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


def normal(*shapes: tuple[int, ...]) -> list[Any]:
    """Arrays that bfloat16 holds exactly."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(jnp.bfloat16) for shape in shapes]


def squares(results: Any) -> Array:
    return sum(jnp.square(x.astype(jnp.float32)).sum() for x in results)


def same(found: Any, exact: Any, peer: Any) -> None:
    """At most 3x as far from exact as the peer is, plus a few units of rounding."""
    leaves = (jax.tree.leaves(x) for x in (found, exact, peer))
    for got, wanted, other in zip(*leaves, strict=True):
        got, wanted, other = (np.asarray(x, np.float64) for x in (got, wanted, other))
        rounding = 2 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(wanted).max()
        assert np.abs(got - wanted).max() <= 3 * np.abs(other - wanted).max() + rounding


def over_rows(attend: Backend, q: Array, k: Array, v: Array, sinks: Array) -> Array:
    """vmap, with keys that all rows share."""

    def row(q: Array, v: Array, sinks: Array) -> Any:
        return attend(q, k, v, is_causal=True, sinks=sinks, return_residual=True)

    return squares(jax.vmap(row)(q, v, sinks))


def layer(attend: Backend, x: Array, weights: Array) -> Array:
    q, k, v = jnp.einsum("btnh,chd->cbtnd", x, weights)
    return x + attend(q, k[:, :, :2], v[:, :, :2], local_window_size=(100, 0))


def over_layers(attend: Backend, x: Array, weights: Array) -> Array:
    return squares([jax.lax.scan(lambda x, w: (layer(attend, x, w), None), x, weights)[0]])


def recomputed_layers(attend: Backend, x: Array, weights: Array) -> Array:
    one = jax.checkpoint(lambda x, w: layer(attend, x, w))
    return squares([jax.lax.scan(lambda x, w: (one(x, w), None), x, weights)[0]])


ROWS = [(3, 1, 203, 4, 64), (1, 203, 2, 64), (3, 1, 203, 2, 64), (3, 4)]
LAYERS = [(1, 333, 4, 128), (3, 3, 128, 128)]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [(over_rows, ROWS), (over_layers, LAYERS), (recomputed_layers, LAYERS)],
)
def test_gradients_through_a_transformation(
    function: Callable[..., Array], shapes: list[tuple[int, ...]]
) -> None:
    arrays = normal(*shapes)
    if function is not over_rows:
        arrays[1] *= np.float32(0.1).astype(jnp.bfloat16)
    every = tuple(range(1, 1 + len(arrays)))
    gradient = jax.jit(jax.grad(function, every), static_argnums=0)
    found, peer = gradient(FLASH, *arrays), gradient(EAGER, *arrays)
    with jax.enable_x64(True):
        exact = gradient(EAGER, *(x.astype(np.float64) for x in arrays))
    same(found, exact, peer)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)], ids=["batch", "heads", "both"])
@pytest.mark.parametrize("part", ["results", "gradients"])
def test_on_several_gpus_it_is_the_same_and_nothing_is_gathered(
    shape: tuple[int, int], part: str
) -> None:
    count = shape[0] * shape[1]
    if jax.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    mesh = jax.make_mesh(
        shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:count]
    )

    def results(q: Array, k: Array, v: Array, sinks: Array, lengths: Array) -> Any:
        return FLASH(
            *(q, k, v), is_causal=True, sinks=sinks, key_value_seq_lengths=lengths,
            return_residual=True,
        )  # fmt: skip

    function = {
        "results": results,
        "gradients": jax.grad(lambda *arrays: squares(results(*arrays)), (0, 1, 2, 3)),
    }[part]
    arrays = normal((4, 520, 8, 128), (4, 520, 4, 128), (4, 520, 4, 128))
    arrays += [np.linspace(-1, 1, 8, dtype=np.float32), np.array([520, 300, 17, 1], np.int32)]
    alone = jax.jit(function)(*arrays)
    places = [NamedSharding(mesh, p) for p in (*[P("x", None, "y")] * 3, P("y"), P("x"))]
    held = [jax.device_put(x, place) for x, place in zip(arrays, places, strict=True)]
    compiled = jax.jit(function, in_shardings=tuple(places)).lower(*held).compile()
    assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())
    for got, wanted in zip(jax.tree.leaves(compiled(*held)), alone, strict=True):
        assert len(got.sharding.device_set) == count
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        rounding = 2 * float(jnp.finfo(jnp.bfloat16).eps)
        assert np.abs(got - wanted).max() <= rounding * np.abs(wanted).max()
