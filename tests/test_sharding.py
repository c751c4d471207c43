"""Attention on sharded arrays: the same result, and no gather over batch or heads."""

import pytest

from tests.four_devices import run

PRELUDE = """
import re
from functools import partial
import jax, jax.numpy as jnp, numpy as np
import jattn
from tests import formula
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

q, k = (jax.random.normal(key, (4, 24, 4, 8)) for key in jax.random.split(jax.random.key(0)))

def causal(attention, q, k):
    return attention(q, k, k, is_causal=True)

chunked = partial(jattn.memory_efficient_attention, query_chunk_size=8, key_chunk_size=8)
attend = partial(causal, chunked)

def mesh_of(kind):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))

def gradient(attend):
    return jax.grad(lambda q, k: (attend(q, k) ** 2).sum(), (0, 1))

# Output and gradients, of an attention.
def both(causal):
    return lambda of, q, k: (
        {"out": causal(of, q, k)}, gradient(partial(causal, of))(q, k)
    )
"""

PROGRAMS = {
    "jit_over_batch_and_heads_gathers_nothing": """
mesh = mesh_of(AxisType.Auto)
place = NamedSharding(mesh, P("x", None, "y"))
compiled = jax.jit(partial(both(causal), chunked), in_shardings=place).lower(q, k).compile()
found = compiled(jax.device_put(q, place), jax.device_put(k, place))
formula.check(found, both(causal), q, k)
assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())
""",
    "explicit_mesh": """
mesh = mesh_of(AxisType.Explicit)
with jax.set_mesh(mesh):
    placed = [jax.device_put(x, NamedSharding(mesh, P("x", None, "y"))) for x in (q, k)]
    out = jax.jit(attend)(*placed)
    assert jax.typeof(out).sharding.spec == P("x", None, "y", None), jax.typeof(out)
    found = {"out": out}, jax.jit(gradient(attend))(*placed)
formula.check(found, both(causal), q, k)
""",
    "shard_map_with_keys_everywhere": """
def sharded(q, k):
    specs = P("x", None, "y"), P(None, None, "y")
    return jax.shard_map(
        lambda q, k: attend(q, jnp.broadcast_to(k[:1], (q.shape[0], *k.shape[1:]))),
        mesh=mesh_of(AxisType.Auto), in_specs=specs, out_specs=specs[0],
    )(q, k)

def whole(of, q, k):
    return causal(of, q, jnp.broadcast_to(k[:1], k.shape))

found = {"out": sharded(q, k)}, gradient(sharded)(q, k)
formula.check(found, both(whole), q, k)
""",
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", PROGRAMS)
def test_sharded_attention_is_the_same(name: str) -> None:
    run(PRELUDE + PROGRAMS[name])
