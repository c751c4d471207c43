"""`jattn.flash_attention` on the Hopper kernel, interpreted: gradients, vmap, refusals, shards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.backends.flash import interpreted


@pytest.fixture
def on_a_cpu() -> Iterator[None]:
    with interpreted():
        yield


def operands(*lead: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (*lead, 1, 70, 2, 64), jnp.bfloat16) for key in keys[:3]]
    return [*arrays, jax.random.normal(keys[3], (*lead, 2))]


def loss(attend: Any) -> Any:
    def of(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        out, lse = attend(q, k, v, is_causal=True, sinks=sinks, return_residual=True)
        return (out.astype(jnp.float32) ** 2).sum() + lse.sum()

    return of


def same(found: Any, expected: Any, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


@pytest.mark.thorough
@pytest.mark.usefixtures("on_a_cpu")
def test_gradient_is_that_of_the_formula() -> None:
    arrays = operands()
    found = jax.grad(loss(jattn.flash_attention), (0, 1, 2, 3))(*arrays)
    same(found, jax.grad(loss(jattn.eager_attention), (0, 1, 2, 3))(*arrays), 0.03)


@pytest.mark.usefixtures("on_a_cpu")
def test_vmap_folds_into_the_batch() -> None:
    q, k, v, sinks = operands(2)
    axes = (0, None, 0, 0)

    def attend(function: Any) -> Any:
        return jax.vmap(lambda q, k, v, s: function(q, k, v, is_causal=True, sinks=s), axes)

    flash = attend(jattn.flash_attention)
    same(flash(q, k[0], v, sinks), attend(jattn.eager_attention)(q, k[0], v, sinks), 0.02)
    traced = str(jax.make_jaxpr(flash)(q, k[0], v, sinks))
    assert "bf16[2,70,2,64]" in traced


def test_what_the_kernel_cannot_do_is_refused_with_the_value() -> None:
    x = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with interpreted():
        for arguments, reason in (
            ({"mask": jnp.ones((1, 1, 8, 8), bool)}, "more than 128 queries, not 8"),
        ):
            with pytest.raises(jattn.UnsupportedAttentionError, match=reason):
                jattn.flash_attention(x, x, x, **arguments)
        with pytest.raises(jattn.UnsupportedAttentionError, match="not float32"):
            jattn.flash_attention(*(x.astype(jnp.float32),) * 3)
        wide = jnp.zeros((1, 8, 2, 264), jnp.bfloat16)
        with pytest.raises(jattn.UnsupportedAttentionError, match="not 264"):
            jattn.flash_attention(wide, wide, wide)


SHARDED = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jattn.backends import eager
from jattn.call.arguments import attention_call
from jattn.transforms.per_shard import GRADIENTS, RESULTS, per_shard
from jattn.call.spec import Operands
from tests.tolerance import of_sums

mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
seen = []

def run(kernel):
    def call(q, k, s):
        made = attention_call(q, k, k, is_causal=True, sinks=s)
        arrays = {name: x for name, x in made.operands._asdict().items() if x is not None}
        return kernel(made.spec, arrays)
    return call

def plain(spec, arrays):
    out, lse = eager.attend(spec, Operands(**arrays))
    return out, lse, lse

def stand_in(spec, arrays):
    seen.append((spec.batch, spec.heads, spec.kv_heads))
    return plain(spec, arrays)

def gradients(spec, arrays):
    sinks = arrays["sinks"]
    def loss(q, k, v):
        out, lse = eager.attend(spec, Operands(q, k, v, sinks=sinks))
        return (out ** 2).sum() + lse.sum()
    return jax.grad(loss, (0, 1, 2))(*(arrays[name] for name in ("query", "key", "value")))

for kv_heads, keys, held in (
    (4, P("x", None, "y"), (2, 2, 2)), (2, P("x", None, "y"), (2, 2, 1)), (1, P("x"), (2, 2, 1)),
):
    q = jax.random.normal(jax.random.key(0), (4, 24, 4, 8))
    k = jax.random.normal(jax.random.key(1), (4, 24, kv_heads, 8))
    places = [NamedSharding(mesh, p) for p in (P("x", None, "y"), keys, P("y"))]
    arrays = q, k, jnp.arange(4.0)
    for kernel, whole, results in (
        (stand_in, plain, RESULTS), (gradients, gradients, GRADIENTS)
    ):
        sharded = per_shard(kernel, results, takes_parts=False)
        call = jax.jit(run(sharded), in_shardings=tuple(places))
        compiled = call.lower(*arrays).compile()
        found = compiled(*map(jax.device_put, arrays, places))
        for a, b in zip(found, run(whole)(*arrays), strict=True):
            largest = np.where(np.isfinite(b), np.abs(b), 0).max()
            np.testing.assert_allclose(a, b, rtol=0, atol=of_sums(24 + 8, float(largest)))
        assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())
    assert seen[-1] == held, (seen, held)
"""


@pytest.mark.thorough
def test_each_device_runs_its_own_rows_and_heads() -> None:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4",
    }
    run = subprocess.run(
        [sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
