"""The portable kernels on several GPUs: the same as on one, and nothing is gathered."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.backends import Backend
from tests.hopper.test_transforms import normal, squares
from tests.portable.exact import BOTH, ampere

__all__ = ["ampere"]

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("ampere")]


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)], ids=["batch", "heads", "both"])
@pytest.mark.parametrize("backend", BOTH, ids=str)
def test_results_and_gradients_are_those_of_one_gpu(
    backend: Backend, shape: tuple[int, int]
) -> None:
    count = shape[0] * shape[1]
    if jax.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    mesh = jax.make_mesh(
        shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:count]
    )
    attend = partial(
        backend, is_causal=True, dropout_rate=0.2, dropout_rng=jax.random.key(0),
        return_residual=True,
    )  # fmt: skip

    def loss(*arrays: Any) -> Any:
        q, k, v, bias, mask = arrays
        results = attend(q, k, v, bias, mask)
        return squares(results), results

    function = jax.grad(loss, (0, 1, 2, 3), has_aux=True)
    arrays = normal((4, 520, 8, 128), (4, 520, 4, 128), (4, 520, 4, 128), (1, 8, 520, 520))
    # The diagonal, so that no row is without a key: its log-sum-exp has no square.
    mask = np.random.default_rng(1).random((4, 1, 520, 520)) < 0.8
    arrays.append(mask | np.eye(520, dtype=bool))
    alone = jax.jit(function)(*arrays)
    specs = (*[P("x", None, "y")] * 3, P(None, "y"), P("x"))
    places = tuple(NamedSharding(mesh, spec) for spec in specs)
    held = [jax.device_put(x, place) for x, place in zip(arrays, places, strict=True)]
    compiled = jax.jit(function, in_shardings=places).lower(*held).compile()
    assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())
    for got, wanted in zip(jax.tree.leaves(compiled(*held)), jax.tree.leaves(alone), strict=True):
        assert len(got.sharding.device_set) == count
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        rounding = 2 * float(jnp.finfo(jnp.bfloat16).eps)
        assert np.abs(got - wanted).max() <= rounding * np.abs(wanted).max()
