"""Attention on sharded arrays: the same result, and no gather over batch or heads."""

import os
import subprocess
import sys

import pytest

PRELUDE = """
import re
import jax, jax.numpy as jnp, numpy as np
import jattn
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

q, k = (jax.random.normal(key, (4, 24, 4, 8)) for key in jax.random.split(jax.random.key(0)))

def attend(q, k):
    return jattn.memory_efficient_attention(
        q, k, k, is_causal=True, query_chunk_size=8, key_chunk_size=8
    )

def mesh_of(kind):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))

def gradient(attend):
    return jax.grad(lambda q, k: (attend(q, k) ** 2).sum(), (0, 1))

def same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)
"""

PROGRAMS = {
    "jit_over_batch_and_heads_gathers_nothing": """
mesh = mesh_of(AxisType.Auto)
place = NamedSharding(mesh, P("x", None, "y"))
for function in (attend, gradient(attend)):
    compiled = jax.jit(function, in_shardings=place).lower(q, k).compile()
    same(compiled(jax.device_put(q, place), jax.device_put(k, place)), function(q, k))
    assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())
""",
    "explicit_mesh": """
expected = attend(q, k), gradient(attend)(q, k)
mesh = mesh_of(AxisType.Explicit)
with jax.set_mesh(mesh):
    placed = [jax.device_put(x, NamedSharding(mesh, P("x", None, "y"))) for x in (q, k)]
    out = jax.jit(attend)(*placed)
    assert jax.typeof(out).sharding.spec == P("x", None, "y", None), jax.typeof(out)
    same((out, jax.jit(gradient(attend))(*placed)), expected)
""",
    "shard_map_with_keys_everywhere": """
def sharded(q, k):
    specs = P("x", None, "y"), P(None, None, "y")
    return jax.shard_map(
        lambda q, k: attend(q, jnp.broadcast_to(k[:1], (q.shape[0], *k.shape[1:]))),
        mesh=mesh_of(AxisType.Auto), in_specs=specs, out_specs=specs[0],
    )(q, k)

def whole(q, k):
    return attend(q, jnp.broadcast_to(k[:1], k.shape))

same(sharded(q, k), whole(q, k))
same(gradient(sharded)(q, k), gradient(whole)(q, k))
""",
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", PROGRAMS)
def test_sharded_attention_is_the_same(name: str) -> None:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    run = subprocess.run(
        [sys.executable, "-c", PRELUDE + PROGRAMS[name]],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
