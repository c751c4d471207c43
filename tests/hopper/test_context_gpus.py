"""Sequences cut over GPUs, by the Hopper kernels and the portable ones: as on one of them."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn.backends.kernels import only
from tests.hopper.test_transforms import normal, squares
from tests.portable.exact import ampere

__all__ = ["ampere"]

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("ampere")]

T = 2048
HOPPER: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "full": {},
    "window": {"is_causal": True, "local_window_size": (300, 0)},
    "lengths": {"is_causal": True, "key_value_seq_lengths": (2000, 1500)},
    "soft cap": {"is_causal": True, "logits_soft_cap": 20.0},
}
PORTABLE: dict[str, dict[str, Any]] = {
    "dropout": {"is_causal": True, "dropout_rate": 0.2},
    "causal": {"is_causal": True},
}
# Left to itself each GPU computes half the heads; a ring's hops see all of a causal mask's and a
# window's parts.
CALLS = [
    *((None, name, None) for name in HOPPER),
    *((None, "causal", schedule) for schedule in ("gather", "ring")),
    *(("portable", "dropout", schedule) for schedule in (None, "gather", "ring")),
    (None, "window", "ring"),
    ("portable", "causal", None),
]


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize(
    ("kernels", "name", "schedule"), CALLS, ids=lambda x: str(x).replace(" ", "_")
)
def test_results_and_gradients_are_those_of_one_gpu(
    kernels: Any, name: str, schedule: Any, devices: int
) -> None:
    options = dict((HOPPER if kernels is None else PORTABLE)[name])
    if jax.device_count() < devices:
        pytest.skip(f"needs {devices} GPUs")
    found = jax.devices()[:devices]
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,), devices=found)
    line = P(None, "x")
    if "key_value_seq_lengths" in options:
        options["key_value_seq_lengths"] = jnp.asarray(options["key_value_seq_lengths"])
    if "dropout_rate" in options:
        options["dropout_rng"] = jax.random.key(0)
    ids = jnp.sort(jax.random.randint(jax.random.key(1), (2, T), 0, 5), axis=1)

    def call(q: Any, k: Any, v: Any, ids: Any) -> Any:
        segments = {"query_segment_ids": ids, "key_value_segment_ids": ids}
        given = segments if name in ("causal", "window") else {}
        with only(kernels) if kernels else nullcontext():
            return jattn.flash_attention(q, k, v, **given, **options, return_residual=True)

    def own(*arrays: Any) -> Any:
        with jattn.context_parallel("x", schedule=schedule):
            return call(*arrays)

    def gradients(attend: Any) -> Any:
        def loss(q: Any, k: Any, v: Any, ids: Any) -> Any:
            results = attend(q, k, v, ids)
            return squares(results), results

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))

    arrays = [*normal((2, T, 8, 128), (2, T, 4, 128), (2, T, 4, 128)), ids]
    alone = gradients(call)(*arrays)
    held = [jax.device_put(x, NamedSharding(mesh, line)) for x in arrays]
    mapped = jax.shard_map(own, mesh=mesh, in_specs=(line,) * 4, out_specs=(line, line))
    attend = call if schedule is None else mapped
    compiled = gradients(attend).lower(*held).compile()
    if schedule == "ring":
        assert not re.search("all-gather|all-to-all", compiled.as_text())
    if schedule is None:
        assert re.search("collective-permute|all-to-all", compiled.as_text())
    for got, wanted in zip(jax.tree.leaves(compiled(*held)), jax.tree.leaves(alone), strict=True):
        assert len(got.sharding.device_set) == devices
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        rounding = 2 * float(jnp.finfo(jnp.bfloat16).eps)
        assert np.abs(got - wanted).max() <= rounding * np.abs(wanted).max()
